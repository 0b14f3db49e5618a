"""Prompts with images: the engines beside the model's own generate on what its own processor made."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from swift.api import infer
from swift.config.commands import InferConfig
from swift.config.options import build
from swift.data.template import ChatTemplate
from swift.engine.answers import answers
from swift.engine.base import Media, Request, Sampling
from swift.engine.load import make_engine, source_of
from swift.engine.media import ImagePrompts
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.engine.transformers import TransformersEngine
from swift.errors import DataError, DependencyError, ModelError
from swift.model.load import load_model
from swift.model.vision import load_processor, reads_images
from tests.vision import MODELS, make_qwen3_vl, picture

GREEDY = Sampling(max_new_tokens=10, min_new_tokens=10, temperature=0)
FEW = {"block_size": 4, "max_num_seqs": 3, "max_num_tokens": 7}
TEXT = "Is it snowing in Nanjing today?"


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    return MODELS[request.param](tmp_path_factory.mktemp("vision") / request.param)


@pytest.fixture
def loaded(folder):
    return load_model(folder, processor=load_processor(folder))


def messages(*parts):
    """A user's message of texts and pictures."""
    return [{"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else _image(part) for part in parts]}]


def _image(image):
    return {"type": "image", "image": image}


def wanted(folder, *prompts):
    """Tokens that generate finds for each prompt alone, on what the processor made of it."""
    found = []
    loaded = load_model(folder, processor=load_processor(folder))
    for parts in prompts:
        inputs = loaded.processor.apply_chat_template(
            messages(*parts), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = loaded.model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def requests(loaded, *prompts):
    made = []
    reader = ImagePrompts(loaded.processor, ChatTemplate(loaded.tokenizer))
    assert reader.takes_images
    for number, parts in enumerate(prompts):
        contents = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        text = ChatTemplate(loaded.tokenizer).text([{"role": "user", "content": contents}], prompt=True)
        images = [part for part in parts if not isinstance(part, str)]
        ids, media = reader.ready(text, images) if images else (reader.to_ids(text), None)
        made.append(Request(id=str(number), prompt=ids, sampling=GREEDY, media=media))
    return made


def run(engine, *prompts):
    return [answer.token_ids for answer in answers(engine, requests(engine.loaded, *prompts))]


def run_of(engine, request):
    return next(answers(engine, [request])).token_ids


PROMPTS = [
    (picture(0), TEXT),
    (TEXT,),
    (TEXT, picture(1), "and", picture(2, (40, 72)), "beside?"),
    (picture(0), TEXT),
    (picture(3), TEXT),
    (picture(0), "And now?"),
]


@pytest.mark.parametrize("options", [{}, FEW, {**FEW, "weights": "auto", "num_guessed": 3}], ids=["whole", "parts", "compiled"])
def test_answers_about_images_are_those_of_generate(folder, loaded, options):
    assert run(NativeEngine(loaded, NativeOptions(**options)), *PROMPTS) == wanted(folder, *PROMPTS)


def test_the_reference_engine_answers_as_generate_does(folder, loaded):
    assert run(TransformersEngine(loaded, max_batch_size=4), *PROMPTS) == wanted(folder, *PROMPTS)


def test_prompts_that_are_put_back_are_shown_their_images_again(folder, loaded):
    size = NativeEngine(loaded, NativeOptions()).runner.bytes_per_token()
    longest = max(len(request.prompt) for request in requests(loaded, *PROMPTS))
    count = (longest + GREEDY.max_new_tokens) // 4 + 2
    engine = NativeEngine(loaded, NativeOptions(block_size=4, max_num_seqs=6, max_num_tokens=16, kv_cache_bytes=size * 4 * count))
    assert run(engine, *PROMPTS) == wanted(folder, *PROMPTS)
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.blocks.num_free == count


def test_equal_images_share_their_beginning_and_others_do_not(loaded):
    engine = NativeEngine(loaded, NativeOptions(block_size=4))
    first, same, other = requests(loaded, (picture(0), TEXT), (picture(0), TEXT), (picture(1), TEXT))
    assert first.prompt == other.prompt
    run_of(engine, first)
    engine.add(same)
    assert engine.step()[0].num_cached == len(same.prompt) - 1
    engine.add(other)
    (cached,) = [delta.num_cached for delta in engine.step() if delta.id == other.id]
    assert cached == first.media.places[0]


def test_an_image_changes_the_answer(folder):
    one, other, none = wanted(folder, (picture(0), TEXT), (picture(1), TEXT), (TEXT,))
    assert one != other and one != none


def test_images_that_the_tokens_do_not_stand_for_end_their_own_answer_alone(folder, loaded):
    engine = NativeEngine(loaded, NativeOptions(block_size=4))
    text, image = requests(loaded, (TEXT,), (TEXT, picture(0), TEXT))
    place = image.media.places[-1]
    short = Media(inputs=image.media.inputs, places=image.media.places[:-1], digest=image.media.digest)
    engine.add(text)
    engine.add(Request(id="short", prompt=image.prompt[:place] + image.prompt[place + 1 :], sampling=GREEDY, media=short))
    deltas = [delta for _ in range(20) for delta in engine.step()]
    (ended,) = [delta for delta in deltas if delta.id == "short"]
    assert ended.finish_reason == "abort" and "does not take the images" in ended.stopped_by
    tokens = [token for delta in deltas if delta.id == text.id for token in delta.token_ids]
    assert [tokens] == wanted(folder, (TEXT,))
    assert engine.is_idle
    assert run_of(engine, image) == wanted(folder, (TEXT, picture(0), TEXT))[0]


def adapter(folder, path, targets):
    """A random adapter of the layers that ``targets`` name, and the model with it in its weights."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def plain():
        return load_model(folder, processor=load_processor(folder)).model

    model = get_peft_model(plain(), LoraConfig(r=4, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(path, save_embedding_layers=False)
    return PeftModel.from_pretrained(plain(), path).merge_and_unload()


def test_an_adapter_of_the_decoder_answers_about_images_beside_the_model(folder, loaded, tmp_path):
    merged = adapter(folder, tmp_path, r".*(language_model|text_model).*\.(q_proj|down_proj)")
    plain, image, text = requests(loaded, (picture(0), TEXT), (picture(0), TEXT), (TEXT,))
    engine = NativeEngine(loaded, NativeOptions(block_size=4))
    engine.load_adapter("a", tmp_path)
    found = [answer.token_ids for answer in answers(engine, [plain, replace(image, adapter="a"), replace(text, adapter="a")])]
    alone = NativeEngine(replace(loaded, model=merged), NativeOptions())
    assert found == [*wanted(folder, (picture(0), TEXT)), run_of(alone, image), run_of(alone, text)]
    assert found[0] != found[1]


def test_an_adapter_that_changes_how_images_are_seen_answers_texts_alone(folder, loaded, tmp_path):
    merged = adapter(folder, tmp_path, "all-linear")
    plain, image, text = requests(loaded, (picture(0), TEXT), (picture(0), TEXT), (TEXT,))
    engine = NativeEngine(loaded, NativeOptions(block_size=4))
    engine.load_adapter("a", tmp_path)
    with pytest.raises(DataError, match="how images are seen"):
        engine.add(replace(image, adapter="a"))
    found = [answer.token_ids for answer in answers(engine, [plain, replace(text, adapter="a")])]
    assert found == [*wanted(folder, (picture(0), TEXT)), run_of(NativeEngine(replace(loaded, model=merged), NativeOptions()), text)]


def test_a_model_of_texts_refuses_an_image(tiny_model, loaded):
    (image,) = requests(loaded, (picture(0), TEXT))
    text_model = load_model(tiny_model)
    for engine in (NativeEngine(text_model, NativeOptions()), TransformersEngine(text_model)):
        with pytest.raises(DataError, match="text only"):
            engine.add(image)


def test_a_snapshot_reads_images_if_its_config_and_processor_say_so(folder, tiny_model):
    assert reads_images(folder) and not reads_images(tiny_model)


def test_a_text_that_holds_the_token_of_an_image_does_not_pass_for_one(loaded):
    reader = ImagePrompts(loaded.processor, ChatTemplate(loaded.tokenizer))
    with pytest.raises(DataError, match="2 times for 1 images"):
        reader.ready(f"{reader.token} and {reader.token}", [picture(0)])


def test_a_model_whose_layers_get_images_too_is_left_to_generate(tmp_path):
    folder = make_qwen3_vl(tmp_path / "qwen3_vl")
    loaded = load_model(folder, processor=load_processor(folder))
    with pytest.raises(ModelError, match="cannot show images"):
        NativeEngine(loaded, NativeOptions())
    assert run(TransformersEngine(loaded), *PROMPTS) == wanted(folder, *PROMPTS)


def rows_file(path, *rows):
    """A file of one message a row: a text, and images by their names."""
    lines = [{"messages": [{"role": "user", "content": text}], **({"images": images} if images else {})} for text, images in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"val_dataset": str(path), "result_path": str(path.with_name("out.jsonl"))}


def test_without_a_backend_that_is_named_the_engine_that_can_is_taken(tmp_path, capfd):
    folder = make_qwen3_vl(tmp_path / "qwen3_vl")
    options = {"model": str(folder), "val_dataset": "none.jsonl"}
    engine = make_engine(source_of(build(InferConfig, ("argument", options))))
    assert isinstance(engine, TransformersEngine)
    assert capfd.readouterr().err.count("cannot show images to this model") == 1


def test_a_missing_pillow_is_said_with_the_command_that_installs_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DependencyError, match="pillow is not installed") as raised:
        load_processor(folder)
    assert raised.value.hint == "pip install 'swift-llm[vision]'"


def test_texts_have_embeddings_beside_images(loaded):
    engine = NativeEngine(loaded, NativeOptions())
    (request,) = requests(loaded, (TEXT,))
    found = torch.tensor(engine.embed([request.prompt])[0])
    with torch.no_grad():
        hidden = loaded.model.base_model(input_ids=torch.tensor([request.prompt])).last_hidden_state[0, -1]
    torch.testing.assert_close(found, hidden / hidden.norm(), atol=1e-4, rtol=1e-4)


def test_infer_answers_rows_with_images_beside_the_data_file(folder, loaded, tmp_path):
    picture(0).save(tmp_path / "a.png")
    files = rows_file(tmp_path / "rows.jsonl", (f"<image>{TEXT}", ["a.png"]), (TEXT, []))
    found = infer(model=str(folder), max_new_tokens=10, temperature=0.0, **files)
    engine = NativeEngine(loaded, NativeOptions())
    free = replace(GREEDY, min_new_tokens=0)
    asked = [replace(request, sampling=free) for request in requests(loaded, (picture(0), TEXT), (TEXT,))]
    assert [row["response"] for row in found] == [answer.text for answer in answers(engine, asked)]
    assert found[0]["images"] == [str(tmp_path / "a.png")] and "images" not in found[1]


@pytest.mark.parametrize(
    ("name", "message"), [("none.png", "No such file"), ("rows.jsonl", "no PNG"), ("https://example.org/a.png", "not fetched")]
)
def test_infer_names_the_row_whose_image_cannot_be_read(folder, tmp_path, name, message):
    files = rows_file(tmp_path / "rows.jsonl", (f"<image>{TEXT}", [name]))
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{message}"):
        infer(model=str(folder), **files)


def test_infer_refuses_a_row_with_images_for_a_model_of_texts(tiny_model, tmp_path):
    with pytest.raises(DataError, match="text only"):
        infer(model=str(tiny_model), **rows_file(tmp_path / "rows.jsonl", (f"<image>{TEXT}", ["a.png"])))
