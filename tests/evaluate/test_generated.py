"""Tasks whose answers are written: what is asked, of engines and of servers, and what is made of the answers."""

import dataclasses
import json

import pytest

from swift.engine.answers import answers
from swift.engine.base import Completion
from swift.engine.load import make_engine, source_of
from swift.errors import ConfigError, DataError, ModelError
from swift.evaluate.generated import make_generated
from swift.evaluate.settings import Settings
from swift.evaluate.spec import load_task
from tests.tiny import make_tokenizer

MCQ = """
name: snowy
title: Questions about snow
licence: CC0
split: test
shots: {split: dev, count: 1}
source: {layouts: [{splits: {test: [test.jsonl], dev: [dev.jsonl]}}]}
modes:
  generate:
    description: "Answer with a letter.\\n\\n"
    prompt: "{{ question }}\\nA. {{ A }}\\nB. {{ B }}\\nAnswer:"
    target: "{{ answer }}"
    choices: "[A, B]"
    gold: answer
    stop: ["\\n\\n"]
    max_new_tokens: 8
"""
ROWS = [
    {"question": "Is snow white?", "A": "yes", "B": "no", "answer": "A"},
    {"question": "Is ice hot?", "A": "yes", "B": "no", "answer": "B"},
]
DEV = [{"question": "Does it snow?", "A": "yes", "B": "no", "answer": "A"}]


@dataclasses.dataclass
class Options:
    """Options of generation, as a command has them."""

    eval_generation_config: dict | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    stop_words: list = dataclasses.field(default_factory=list)
    seed: int = 42


@pytest.fixture
def task(tmp_path):
    def make(text=MCQ, *, rows=ROWS, tokenizer=None, most=512, config=None, shots=1, **settings):
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEV))
        (tmp_path / "task.yaml").write_text(text)
        spec = load_task(tmp_path / "task.yaml")
        settings = Settings(mode="generate", num_fewshot=shots, data_dir=str(tmp_path), **settings)
        return make_generated(spec, settings, tokenizer or make_tokenizer(), most, config)

    return make


def asked(task, number=0):
    return task.requests(task.examples()[number])


def scored(task, text, number=0, reason="stop"):
    example = task.examples()[number]
    return task.score(example, task.requests(example), Completion(text, [5, 6], reason))


PLAIN = "Answer with a letter.\n\nDoes it snow?\nA. yes\nB. no\nAnswer: A\n\nIs snow white?\nA. yes\nB. no\nAnswer:"


def test_a_model_with_a_chat_template_is_asked_with_it(task):
    made = task()
    request = asked(made).request
    text = (
        "<|im_start|>system\nAnswer with a letter.\n\n<|im_end|>\n<|im_start|>user\nDoes it snow?\nA. yes\nB. no\nAnswer:<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nIs snow white?\nA. yes\nB. no\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert made.about.uses_chat_template and asked(made).prompt == text
    assert make_tokenizer().decode(request.prompt) == text
    assert (request.sampling.temperature, request.sampling.max_new_tokens, request.sampling.stop_words) == (0.0, 8, ())


def test_a_model_without_one_and_whoever_says_so_is_asked_in_plain_text(task):
    for made in (task(tokenizer=make_tokenizer(chat_template=None)), task(use_chat_template=False)):
        assert not made.about.uses_chat_template
        assert asked(made).prompt == make_tokenizer().decode(asked(made).request.prompt) == PLAIN


def test_a_server_is_sent_messages_or_text(task):
    chat, plain = task(most=None), task(most=None, use_chat_template=False)
    assert chat.about.uses_chat_template and not plain.about.uses_chat_template
    assert [message["role"] for message in asked(chat).request.messages] == ["system", "user", "assistant", "user"]
    assert asked(chat).request.text is None
    assert (asked(plain).request.messages, asked(plain).request.text) == ((), PLAIN)
    assert len({chat.about.digest, plain.about.digest, task().about.digest}) == 3


def test_another_system_message_is_another_question_for_a_server_too(task):
    digests = [task(most=None, system=system).about.digest for system in (None, "Be short.", "Be long.")]
    assert len(set(digests)) == 3
    assert asked(task(most=None, system="Be short.")).request.messages[0]["content"].startswith("Be short.")


def test_what_is_found_in_an_answer_and_what_is_not(task):
    made = task()
    right, wrong, none = scored(made, " A."), scored(made, "The answer is (B)"), scored(made, "Snow is", reason="length")
    assert (right.prediction, right.gold, right.metrics) == ("A", "A", {"acc": 1.0, "answered": 1.0})
    assert (wrong.prediction, wrong.metrics) == ("B", {"acc": 0.0, "answered": 1.0})
    assert (none.prediction, none.metrics) == (None, {"acc": 0.0, "answered": 0.0})
    assert none.detail["answer"] == "Snow is"
    assert none.detail["rule"] == "no letter of a choice; the answer was cut off at 2 tokens"
    assert wrong.detail["rule"] == "statement"


def test_thinking_is_kept_but_not_read(task):
    outcome = scored(task(), "<think>It is B.</think>A")
    assert (outcome.prediction, outcome.detail["answer"]) == ("A", "<think>It is B.</think>A")
    unfinished = scored(task(), "<think>It is B.", reason="length")
    assert unfinished.prediction is None and "the thinking has no end" in unfinished.detail["rule"]


def test_a_request_that_a_server_gave_up_is_not_answered(task):
    assert scored(task(), "A", reason="abort").detail["rule"] == "there is no answer"


def test_options_are_stronger_than_the_config_of_generation_and_that_than_the_declaration(task):
    given = Options(eval_generation_config={"max_tokens": 4, "temperature": 0.5, "stop": "!"}, max_new_tokens=3)
    first, second = (asked(task(config=given), number).request.sampling for number in (0, 1))
    assert (first.max_new_tokens, first.temperature, first.stop_words) == (3, 0.5, ("!",))
    assert first.seed != second.seed and first.seed == asked(task(config=given)).request.sampling.seed
    greedy = asked(task(config=Options(eval_generation_config={"do_sample": False}))).request.sampling
    assert (greedy.temperature, greedy.seed) == (0.0, None)
    drawn = asked(task(config=Options(eval_generation_config={"do_sample": True}))).request.sampling
    assert (drawn.temperature, drawn.seed is None) == (None, False)


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"max_token": 4}, "unknown setting 'max_token'", "did you mean 'max_tokens'?"),
        ({"temperature": "hot"}, "temperature is 'hot'", "give a number from 0 on"),
        ({"do_sample": "no"}, "do_sample is 'no'", "give true or false"),
        ({"max_tokens": 0}, "max_tokens is 0", "give a whole number from 1 on"),
        ({"stop": [1]}, r"stop is \[1\]", None),
    ],
)
def test_a_config_of_generation_that_is_wrong_is_refused(task, given, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        task(config=Options(eval_generation_config=given))
    assert caught.value.hint == hint


def test_shots_are_left_out_and_then_the_beginning_is_cut_off(task):
    plain = {"use_chat_template": False}
    size = len(asked(task(**plain)).request.prompt)
    without = len(asked(task(**plain, shots=0)).request.prompt)
    fits = asked(task(**plain, most=size + 8))
    fewer = asked(task(**plain, most=size + 7))
    least = asked(task(**plain, most=without + 7))
    assert (fits.notes, fewer.notes) == ({}, {"shots_left_out": 1})
    assert least.notes == {"shots_left_out": 1, "truncated": 1} and len(least.request.prompt) == without - 1


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("gold: answer", "gold: answer\n    extract: leter", "unknown extractor 'leter'", "did you mean 'letter'?"),
        ('choices: "[A, B]"', "extract: letter", "the extractor letter has no choices", "declare choices, or extract something else"),
        ("gold: answer", "gold: answer\n    metrics: [bleau]", "unknown metric of written answers 'bleau'", "did you mean 'bleu'?"),
        ("gold: answer", "gold: answer\n    arguments: {imges: row}", "arguments.imges is neither", None),
        ("gold: answer", "gold: answer\n    extract: [{regex: {patern: x}}]", "unknown option 'patern'", "did you mean 'pattern'?"),
    ],
)
def test_a_declaration_that_nothing_can_be_made_of_is_refused(task, old, new, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        task(MCQ.replace(old, new))
    assert caught.value.hint == hint


def test_a_right_answer_that_is_no_choice_is_refused(task):
    with pytest.raises(DataError, match=r"test.jsonl:1: the right answer 'C' is none of A, B"):
        task(rows=[{**ROWS[0], "answer": "C"}])


@pytest.mark.parametrize(
    ("first", "second", "gold", "answer"),
    [("B", "A", "A", "A"), ("C", "N", "B", "B"), ("snow", "ice", "ice", "B"), ("snow", "ice", "b", "B"), ("snow", "ice", 1, "B")],
)
def test_choices_that_are_letters_themselves_are_texts_like_others(task, first, second, gold, answer):
    outcome = scored(task(rows=[{"question": "Which?", "A": first, "B": second, "answer": gold}]), answer)
    assert (outcome.gold, outcome.prediction, outcome.metrics["acc"]) == (answer, answer, 1.0)


def test_letters_that_the_declaration_writes_out_are_the_letters(task):
    outcome = scored(task(MCQ.replace('choices: "[A, B]"', "choices: [T, F]"), rows=[{**ROWS[0], "answer": "F"}]), "The answer is F.")
    assert (outcome.gold, outcome.prediction, outcome.metrics["acc"]) == ("F", "F", 1.0)


NUMBERS = MCQ.replace('choices: "[A, B]"', "extract: [{regex: {pattern: '=(.*)', select: 0}}, number]\n    metrics: [number, rouge]")


def test_extractors_are_tried_in_their_order_and_metrics_stand_together(task):
    made = task(NUMBERS, rows=[{**ROWS[0], "answer": "7"}])
    assert made.about.metric == "acc"
    first, second = scored(made, "3 + 4 =7.0"), scored(made, "It is 7")
    assert (first.prediction, second.prediction) == ("7.0", "7")
    assert second.metrics == {"acc": 1.0, "answered": 1.0, "rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0}
    assert scored(made, "none").detail["rule"] == "no match; no number"


def test_an_engine_answers_as_generate_does(task, tiny_model):
    """The whole way with the native engine, beside transformers' own loop."""
    import torch
    from transformers import AutoModelForCausalLM

    from swift.config.evaluate import EvalConfig
    from swift.config.options import build

    config = build(
        EvalConfig, ("argument", {"model": str(tiny_model), "eval_dataset": ["x"], "max_new_tokens": 12, "weight_format": "torch"})
    )
    source = source_of(config)
    made = task(MCQ.replace('stop: ["\\n\\n"]', "stop: []"), tokenizer=source.tokenizer, config=config)
    requests = [dataclasses.replace(asked(made, number).request, id=str(number)) for number in (0, 1)]
    engine = make_engine(source)
    found = [answer.token_ids for answer in answers(engine, requests)]
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for request, ids in zip(requests, found, strict=True):
        whole = model.generate(
            torch.tensor([request.prompt]), attention_mask=torch.ones(1, len(request.prompt)), max_new_tokens=12, do_sample=False
        )
        wanted = whole[0, len(request.prompt) :].tolist()
        assert ids == (wanted[:-1] if wanted[-1] == source.tokenizer.eos_token_id else wanted)
    assert len(found[0]) > 0


def test_images_need_a_model_that_reads_them(task):
    text = MCQ.replace("gold: answer", "gold: answer\n    arguments: {images: '[A]'}").replace("shots: {split: dev, count: 1}", "")
    with pytest.raises(ModelError, match="the model reads text only"):
        task(text, shots=0, rows=[{**ROWS[0], "A": PIXEL}])
    with pytest.raises(ConfigError, match="solved examples cannot have"):
        task(MCQ.replace("gold: answer", "gold: answer\n    arguments: {images: '[A]'}"))


PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def test_several_answers_to_a_question_are_examples_of_one_cluster(task):
    made = task(arguments={"num_samples": 2}, config=Options(temperature=0.8))
    assert [example.id for example in made.examples()] == ["0#0", "0#1", "1#0", "1#1"]
    first, second = (asked(made, number).request for number in (0, 1))
    assert first.prompt == second.prompt and first.sampling.seed != second.sampling.seed
    assert scored(made, "A", number=1).detail["cluster"] == "0"


def test_a_question_of_several_answers_is_never_its_own_solved_example(task):
    made = task(MCQ.replace("split: dev, count", "split: test, count"), arguments={"num_samples": 2}, config=Options(temperature=0.8))
    for number in range(4):
        assert asked(made, number).prompt.count("Is snow white?") == 1 and asked(made, number).prompt.count("Is ice hot?") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": 2}, "num_samples 2 has no effect on greedy answers"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"run_code": True}, "snowy has no setting 'run_code'"),
    ],
)
def test_settings_of_a_task_that_have_no_effect_are_refused(task, given, message):
    with pytest.raises(ConfigError, match=message):
        task(arguments=given)


def test_the_beginning_of_an_answer_that_is_given_is_read_with_it(task):
    text = MCQ.replace("gold: answer", "gold: answer\n    prefix: 'The answer is'")
    made, remote = task(text), task(text, most=None)
    assert asked(made).prompt.endswith("assistant\nThe answer is")
    assert scored(made, " B").detail["rule"] == "statement"
    assert asked(remote).notes == {"prefix_left_out": "The answer is"} and scored(remote, " B").detail["rule"] == "beginning"
