"""Questions about images in the layouts of VLMEvalKit and EvalScope, as a model that reads images is asked them."""

import base64
import csv
import dataclasses
import json

import pytest

from swift.data.template import ChatTemplate
from swift.engine.answers import answers
from swift.engine.base import Completion
from swift.engine.media import ImagePrompts
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.errors import DataError
from swift.evaluate.generated import make_generated
from swift.evaluate.pictured import parts_of
from swift.evaluate.settings import Settings
from swift.evaluate.spec import find_task
from swift.model.load import load_model
from swift.model.vision import load_processor
from tests.vision import encoded, make_llava, picture

LETTERS = ["index", "image", "question", "A", "B", "C", "answer"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = make_llava(tmp_path_factory.mktemp("vision") / "llava")
    return load_model(folder, processor=load_processor(folder))


def task(name, path, loaded, most=512, **given):
    settings = Settings(mode="generate", num_fewshot=0, local_path=str(path), **given)
    return make_generated(find_task(name), settings, loaded.processor if most else None, most)


def base64_of(image):
    return base64.b64encode(encoded(image)).decode()


@pytest.fixture
def table(tmp_path):
    def write(*rows):
        with (tmp_path / "data.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(LETTERS)
            writer.writerows(rows)
        return tmp_path / "data.tsv"

    return write


def test_a_table_of_vlmevalkit_is_asked_with_its_images(table, loaded):
    """The second row shows the image of the first, by its index; the third choice of the first row is empty."""
    path = table([7, base64_of(picture(1)), "What is it?", "snow", "rain", "", "B"], [8, "7", "And this?", "a", "b", "c", "C"])
    made = task("vmcq", path, loaded)
    first, second = made.examples()
    asked = made.requests(first)
    question = "Question: What is it?\nOptions:\nA. snow\nB. rain\n\nPlease select the correct answer from the options above."
    assert asked.prompt == f"user: <image>{question}"
    reader = ImagePrompts(loaded.processor, ChatTemplate(loaded.tokenizer))
    text = ChatTemplate(loaded.tokenizer).text(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], prompt=True
    )
    ids, media = reader.ready(text, [picture(1)])
    assert (asked.request.prompt, asked.request.media.digest) == (ids, media.digest)
    assert made.requests(second).request.media.digest == media.digest
    outcome = made.score(first, asked, Completion("It is rain, so (B).", [1], "stop"))
    assert (outcome.gold, outcome.prediction, outcome.metrics["acc"]) == ("B", "B", 1.0)
    assert made.score(second, made.requests(second), Completion("C", [1], "stop")).metrics["acc"] == 1.0
    assert made.score(first, asked, Completion("C", [1], "stop")).prediction is None  # there is no third choice


def test_rows_tell_their_categories_and_show_images_of_rows_that_are_not_asked(tmp_path, loaded):
    rows = [
        {"index": 1, "image": base64_of(picture(1)), "question": "What?", "A": "a", "B": "b", "answer": "A", "category": "OCR"},
        {"index": 2, "image": "1", "question": "Where?", "A": "a", "B": "b", "answer": "B", "category": "logic"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(example.id, example.category) for example in task("vmcq", path, loaded).examples()] == [("1", "OCR"), ("2", "logic")]
    made = task("vmcq", path, loaded, subsets=("logic",))
    (example,) = made.examples()
    outcome = made.score(example, made.requests(example), Completion("B", [1], "stop"))
    assert (outcome.id, outcome.category, outcome.metrics["acc"]) == ("2", "logic", 1.0)
    with pytest.raises(DataError, match="no row has the subject 'logik'") as caught:
        task("vmcq", path, loaded, subsets=("logik",))
    assert caught.value.hint == "did you mean 'logic'?"


def test_an_engine_that_sees_answers_about_images(table, loaded):
    made = task("vmcq", table([1, base64_of(picture(1)), "Is it?", "a", "b", "c", "A"]), loaded)
    engine = NativeEngine(loaded, NativeOptions(block_size=4))
    request = dataclasses.replace(made.requests(made.examples()[0]).request, id="0")
    request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_new_tokens=4, min_new_tokens=4))
    assert len(next(answers(engine, [request])).token_ids) == 4


def test_rows_of_messages_and_rows_of_columns_ask_the_same(tmp_path, loaded):
    (tmp_path / "a.png").write_bytes(encoded(picture(2)))
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is it?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}], "answer": "snow"},
        {"question": "What is it?", "image": "a.png", "answer": ["snow", "ice"]},
        {"question": "What is <image>it?", "images": ["a.png"], "answer": "snow"},
    ]
    path = tmp_path / "vqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = task("general_vqa", path, loaded)
    first, second, third = (made.requests(example) for example in made.examples())
    assert first.request.prompt == second.request.prompt and first.request.media.digest == second.request.media.digest
    assert third.prompt == "user: What is <image>it?"
    outcome = made.score(made.examples()[1], second, Completion("Ice.", [1], "stop"))
    assert (outcome.gold, outcome.metrics["exact_match"]) == ("snow | ice", 1.0)


@pytest.mark.parametrize("name", ["vqa.jsonl", "vqa.json", "vqa.parquet"])
def test_images_lie_beside_the_file_whatever_its_kind(tmp_path, loaded, name):
    (tmp_path / "a.png").write_bytes(encoded(picture(2)))
    row = {"question": "What is it?", "image": "a.png", "answer": "snow"}
    if name.endswith("parquet"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps([row]) if name == "vqa.json" else json.dumps(row) + "\n")
    made = task("general_vqa", tmp_path / name, loaded)
    assert made.requests(made.examples()[0]).request.media is not None


def test_another_image_in_the_same_file_is_another_question(table, tmp_path, loaded):
    path = table([1, "a.png", "Is it?", "a", "b", "c", "A"])
    digests = []
    for number in (1, 2, 1):
        (tmp_path / "a.png").write_bytes(encoded(picture(number)))
        digests.append(task("vmcq", path, loaded).about.digest)
    assert digests[0] == digests[2] != digests[1]


def test_a_server_is_sent_the_images(table, loaded):
    made = task("vmcq", table([1, base64_of(picture(1)), "Is it?", "a", "b", "c", "A"]), loaded, most=None)
    (message,) = made.requests(made.examples()[0]).request.messages
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    raw = base64.b64decode(message["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    from swift.engine.pictures import of_bytes

    assert of_bytes(raw).tobytes() == picture(1).tobytes()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("none.png", "data.tsv:2: the image 'none.png' is neither a file nor base64"),
        ("aGVsbG8gd29ybGQ=", "data.tsv:2: the image cannot be read"),
        ("http://example.org/a.png", "data.tsv:2: an image is given as http:, which is not fetched"),
    ],
)
def test_an_image_that_cannot_be_read_names_its_row(table, loaded, image, message):
    made = task("vmcq", table([1, image, "Is it?", "a", "b", "c", "A"]), loaded)
    with pytest.raises(DataError, match=message):
        made.requests(made.examples()[0])


def test_messages_that_are_none_name_their_row(tmp_path, loaded):
    path = tmp_path / "vqa.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "video"}]}], "answer": ""}) + "\n")
    with pytest.raises(DataError, match=r"vqa.jsonl:1: a part of a message is a text, an image or an image_url, not 'video'"):
        task("general_vqa", path, loaded)


def test_images_stand_where_their_marks_are_or_first():
    image = {"type": "image"}
    assert parts_of("Is <image> as <image>?", 2) == [
        {"type": "text", "text": "Is "},
        image,
        {"type": "text", "text": " as "},
        image,
        {"type": "text", "text": "?"},
    ]
    assert parts_of("Is it?", 2) == [image, image, {"type": "text", "text": "Is it?"}]
