"""Tasks that are answered by log-probabilities: what is asked, and metrics worked by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.engine.scoring import Score
from swift.errors import ConfigError, DataError
from swift.evaluate.base import Asked, Example, Task
from swift.evaluate.declared import make_task
from swift.evaluate.report.details import notes
from swift.evaluate.scored import METRICS, Scored
from swift.evaluate.spec import find_task
from tests.evaluate.rows import eval_config, make_ceval, make_mmlu, make_ocnli, write
from tests.evaluate.test_encode import make_tokenizer as nine_tokens
from tests.tiny import make_tokenizer


def task_of(name: str, folder: Path, *, max_model_len: int = 2048, **options: Any) -> Task:
    return make_task(find_task(name), eval_config(eval_data_dir=str(folder), **options), make_tokenizer(), max_model_len)


def asked_texts(asked: Asked) -> list[tuple[str, str]]:
    """(context, continuation) as the tokenizer reads them."""
    tokenizer = make_tokenizer()
    return [(tokenizer.decode(text.tokens[: text.start]), tokenizer.decode(text.tokens[text.start :])) for text in asked.texts]


def scores(*sums: float) -> list[Score]:
    return [Score((total,), False) for total in sums]


def test_letters_are_asked_as_lm_eval_asks_mmlu(tmp_path: Path) -> None:
    task = task_of("mmlu", make_mmlu(tmp_path), eval_num_fewshot=1)
    asked = task.requests(task.examples()[1])
    context = (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        "What shines?\nA. Stars\nB. Stones\nC. Water\nD. Air\nAnswer: A\n\n"
        "What is cold?\nA. Fire\nB. Ice\nC. Sun\nD. Tea\nAnswer:"
    )
    assert asked.prompt == context
    assert asked_texts(asked) == [(context, " A"), (context, " B"), (context, " C"), (context, " D")]


def test_choices_are_asked_with_their_texts_and_alone(tmp_path: Path) -> None:
    task = task_of("mmlu", make_mmlu(tmp_path), eval_num_fewshot=0, eval_mode="choice")
    asked = task.requests(task.examples()[2])
    context = "The following are questions (with answers) about marketing.\n\nQuestion: What is paid?\nAnswer:"
    assert asked_texts(asked)[:2] == [(context, " A price"), (context, " A tree")]
    # The tokenizer has no first token, so its last one stands before a choice without a question.
    assert asked_texts(asked)[4:6] == [("<|im_end|>", " A price"), ("<|im_end|>", " A tree")]


def test_in_chinese_nothing_stands_between_question_and_answer(tmp_path: Path) -> None:
    task = task_of("ceval", make_ceval(tmp_path), eval_num_fewshot=1, eval_mode="choice")
    asked = task.requests(task.examples()[0])
    assert asked.prompt == "以下是中国关于法学的问题，请给出正确的答案。\n\n问题：谁立法？\n答案：议会\n\n问题：谁审判？\n答案："
    assert asked_texts(asked)[1] == (asked.prompt, "法院")


def test_with_a_chat_template_the_answer_begins_at_once(tmp_path: Path) -> None:
    task = task_of("mmlu", make_mmlu(tmp_path), eval_num_fewshot=1, use_chat_template=True)
    assert task.about.uses_chat_template
    asked = task.requests(task.examples()[2])
    assert asked.prompt.endswith("<|im_start|>assistant\n")
    # White space at the end of the context is tokenized with the continuation.
    assert asked_texts(asked)[0][1] == "\nA"


def test_the_likeliest_letter_is_the_answer(tmp_path: Path) -> None:
    task = task_of("mmlu", make_mmlu(tmp_path), eval_num_fewshot=0)
    example = task.examples()[0]
    outcome = task.score(example, task.requests(example), scores(-3.0, -2.0, -1.0, -4.0))
    assert (outcome.gold, outcome.prediction, outcome.metrics) == ("C", "C", {"acc": 1.0})
    assert outcome.detail["logprobs"] == [-3.0, -2.0, -1.0, -4.0]
    wrong = task.score(example, task.requests(example), scores(-0.5, -2.0, -1.0, -4.0))
    assert (wrong.prediction, wrong.metrics) == ("A", {"acc": 0.0})


@pytest.mark.parametrize(
    ("metric", "golds", "expected"),
    [
        # Log-probabilities -4, -9, -5; without the question -1, -8, -5; 2, 9, 2 characters, 2, 9, 6 bytes.
        ("acc", [0], 1.0),
        ("acc_norm", [1], 1.0),  # -2, -1, -2.5
        ("acc_bytes", [2], 1.0),  # -2, -1, -5 / 6
        ("acc_mutual_info", [2], 1.0),  # -3, -1, 0
        ("acc_mutual_info", [0, 1], 0.0),
        # exp(-4) / (exp(-4) + exp(-9) + exp(-5)) = 1 / (1 + exp(-5) + exp(-1)) = 1 / 1.37462
        ("probability", [0], 0.72747),
    ],
)
def test_metrics_of_choices(metric: str, golds: list[int], expected: float) -> None:
    of = Scored(["no", "certainly", "真的"], [-4.0, -9.0, -5.0], [-1.0, -8.0, -5.0], golds)
    assert METRICS[metric](of) == pytest.approx(expected, abs=1e-5)


def test_of_equal_choices_the_first_is_taken() -> None:
    assert METRICS["acc"](Scored(["a", "b"], [-1.0, -1.0], [], [0])) == 1.0


def test_premises_are_clusters_and_whole_sentences_are_compared(tmp_path: Path) -> None:
    task = task_of("ocnli", make_ocnli(tmp_path), eval_mode="choice")
    example = task.examples()[0]
    asked = task.requests(example)
    assert asked_texts(asked)[0] == ("<|im_end|>", " 他在家, 正确? 是的, 他不在外面")
    outcome = task.score(example, asked, scores(-1.0, -2.0, -3.0))
    assert (outcome.metrics["acc"], outcome.detail["cluster"]) == (1.0, "a")


def test_words_before_a_gap_differ_and_what_follows_is_scored(tmp_path: Path) -> None:
    write(
        tmp_path / "dev.jsonl",
        '{"sentence": "The box is in the bag because the _ is small.", "option1": "box", "option2": "bag", "answer": "1"}\n',
    )
    task = task_of("winogrande", tmp_path)
    asked = task.requests(task.examples()[0])
    assert asked_texts(asked) == [
        ("The box is in the bag because the box", " is small."),
        ("The box is in the bag because the bag", " is small."),
    ]


def test_a_text_longer_than_the_model_is_read_without_solved_examples_first(tmp_path: Path) -> None:
    roomy = task_of("mmlu", make_mmlu(tmp_path), eval_num_fewshot=2)
    example = roomy.examples()[2]
    longest = len(roomy.requests(example).texts[0].tokens) - 1
    assert roomy.requests(example).notes == {}
    narrow = task_of("mmlu", tmp_path, eval_num_fewshot=2, max_model_len=longest - 1).requests(example)
    assert narrow.notes == {"shots_left_out": 1}
    assert "Who buys?" not in narrow.prompt and "What sells?" in narrow.prompt
    tiny = task_of("mmlu", tmp_path, eval_num_fewshot=2, max_model_len=20).requests(example)
    assert tiny.notes["shots_left_out"] == 2 and len(tiny.texts[0].tokens) == 21
    assert asked_texts(tiny)[0][1] == " A"


def test_documents_are_scored_in_windows_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", '{"text": "Heavy snow is expected."}\n')
    task = task_of("general_text", tmp_path, eval_dataset_args={"general_text": {"local_path": str(path)}}, max_model_len=4)
    asked = task.requests(task.examples()[0])
    scored = sum(len(text.tokens) - text.start for text in asked.texts)
    assert len(asked.texts) == asked.notes["windows"] > 1
    answer = [Score((-0.5,) * (len(text.tokens) - text.start), False) for text in asked.texts]
    outcome = task.score(task.examples()[0], asked, answer)
    assert outcome.metrics == {"nll": scored * 0.5, "tokens": scored, "words": 4.0, "bytes": 23.0}


def test_the_last_word_of_a_passage_is_scored(tmp_path: Path) -> None:
    write(tmp_path / "lambada_test.jsonl", '{"text": "Snow is what falls in winter"}\n')
    task = task_of("lambada_openai", tmp_path)
    example = task.examples()[0]
    asked = task.requests(example)
    assert asked_texts(asked) == [("Snow is what falls in", " winter")]
    outcome = task.score(example, asked, [Score((-1.0, -0.5), True)])
    assert outcome.metrics == {"nll": 1.5, "words": 1.0, "acc": 1.0}


@pytest.mark.parametrize(("mode", "answer"), [("letter", "E"), ("choice", "E"), ("letter", "")])
def test_an_answer_that_is_none_of_the_choices_is_named(tmp_path: Path, mode: str, answer: str) -> None:
    path = write(make_mmlu(tmp_path) / "test" / "marketing_test.csv", f"What is paid?,A price,A tree,A cloud,A fish,{answer}\n")
    with pytest.raises(DataError) as caught:
        task_of("mmlu", tmp_path, eval_num_fewshot=0, eval_mode=mode)
    assert caught.value.message.startswith(f"{path}:1: answer") and "none of" in caught.value.message


def test_a_choice_without_text_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    path = write(make_ceval(tmp_path) / "val" / "law_val.csv", "id,question,A,B,C,D,answer\n0,谁审判？,云,,鱼,树,A\n")
    with pytest.raises(DataError, match=f"{path}:2: choice 2 of 4 is empty"):
        task_of("ceval", tmp_path, eval_num_fewshot=0, eval_mode="choice")


@pytest.mark.parametrize("mode", ["letter", "choice", "generate"])
def test_a_question_that_cannot_be_written_is_named_before_anything_is_asked(tmp_path: Path, mode: str) -> None:
    path = write(
        tmp_path / "mine.jsonl", '{"question": "2?", "A": 1, "B": 2, "answer": "B"}\n{"question": 2, "A": 1, "B": 2, "answer": "B"}\n'
    )
    with pytest.raises(DataError, match=f"{path}:2: .* cannot be computed: 'int object' has no attribute 'strip'"):
        task_of("general_mcq", tmp_path, eval_mode=mode)


def test_a_text_that_is_empty_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", '{"text": "Snow."}\n{"text": ""}\n')
    with pytest.raises(DataError, match=f"{path}:2: the text is empty"):
        task_of("general_text", tmp_path)


def test_a_choice_that_is_longer_than_the_model_is_named(tmp_path: Path) -> None:
    task = task_of("mmlu", make_mmlu(tmp_path), eval_num_fewshot=0, eval_mode="choice", max_model_len=1)
    with pytest.raises(DataError, match=r"astronomy_test.csv:1: the text to score has \d+ tokens, the model reads 1"):
        task.requests(task.examples()[0])


def test_choices_that_the_tokenizer_joins_to_the_question_are_counted(tmp_path: Path) -> None:
    write(
        tmp_path / "mine.yaml",
        'name: mine\ntitle: Mine\nlicence: MIT\nsplit: test\nsource: {layouts: [{splits: {test: ["*.jsonl"]}}]}\n'
        'modes:\n  choice: {prompt: "{{ q }}", choices: c, gold: "0", delimiter: ""}\n',
    )
    write(tmp_path / "rows.jsonl", '{"q": "xa", "c": ["bb", "xb"]}\n{"q": "xx", "c": ["bb", "xb"]}\n')
    task = make_task(find_task(str(tmp_path / "mine.yaml")), eval_config(eval_data_dir=str(tmp_path)), nine_tokens(), 64)
    joined, apart = (task.requests(example) for example in task.examples())
    # "xabb" is x ab b: of "bb" one b is scored, as lm-eval has it.
    assert [len(text.tokens) - text.start for text in (*joined.texts, *apart.texts)] == [1, 2, 2, 2]
    outcomes = [task.score(example, asked, scores(-1.0, -2.0)) for example, asked in zip(task.examples(), (joined, apart), strict=True)]
    assert notes(outcomes) == {"joined_to_question": 1}


def test_fewer_solved_examples_than_wanted_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 solved examples of law, not 3") as caught:
        task_of("ceval", make_ceval(tmp_path), eval_num_fewshot=3)
    assert caught.value.hint == "give --eval_num_fewshot 1"


def test_equal_settings_have_equal_digests_and_others_have_not(tmp_path: Path) -> None:
    make_mmlu(tmp_path)
    first = task_of("mmlu", tmp_path, eval_num_fewshot=1).about.digest
    assert task_of("mmlu", tmp_path, eval_num_fewshot=1, eval_limit=1).about.digest == first
    others = [
        task_of("mmlu", tmp_path, eval_num_fewshot=2),
        task_of("mmlu", tmp_path, eval_num_fewshot=1, eval_mode="choice"),
        task_of("mmlu", tmp_path, eval_num_fewshot=1, use_chat_template=True),
    ]
    assert len({first, *(task.about.digest for task in others)}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "Be short."}, "--system has no effect without the chat template"),
        ({"max_new_tokens": 5}, "--max_new_tokens has no effect where no answers are written"),
        ({"eval_generation_config": {"temperature": 1}}, "--eval_generation_config has no effect where no answers are written"),
    ],
)
def test_options_that_no_task_reads_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    def make(*names: str) -> Task:
        given = {"models": ["m"], "eval_dataset": list(names), "eval_data_dir": str(make_mmlu(tmp_path)), "eval_num_fewshot": 0, **options}
        return make_task(find_task("mmlu"), build(EvalConfig, ("argument", given)), make_tokenizer(), 2048)

    with pytest.raises(ConfigError, match=message):
        make("mmlu")
    assert make("mmlu", "gsm8k").about.mode == "letter"  # of which the second writes answers, with the template


@pytest.mark.parametrize(
    "mode",
    [
        "choice: {prompt: x, choices: [A, B], gold: '0', contexts: '[a'}",
        "choice: {prompt: x, choices: [A, B], gold: '0', ending: '{{ a'}",
        "generate: {prompt: x, gold: a, prefix: '{{ a'}",
        "generate: {prompt: x, gold: a, target: '{{ a'}",
        "perplexity: {text: x, original: '[a'}",
    ],
)
def test_every_text_of_a_declaration_is_checked_before_data_are_read(tmp_path: Path, mode: str) -> None:
    path = write(
        tmp_path / "mine.yaml",
        f'name: mine\ntitle: Mine\nlicence: MIT\nsplit: test\nsource: {{layouts: [{{splits: {{test: ["*.jsonl"]}}}}]}}\nmodes:\n  {mode}\n',
    )
    with pytest.raises(DataError, match="is no Jinja"):
        make_task(find_task(str(path)), eval_config(eval_data_dir=str(tmp_path)), make_tokenizer(), 64)


def test_an_unknown_metric_is_refused_with_a_near_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.yaml",
        'name: mine\ntitle: Mine\nlicence: MIT\nsplit: test\nsource: {layouts: [{splits: {test: ["*.jsonl"]}}]}\n'
        'modes:\n  choice: {prompt: "{{ q }}", choices: "[a, b]", gold: "0", metrics: [acc_nrom]}\n',
    )
    write(tmp_path / "rows.jsonl", '{"q": "x", "a": "y", "b": "z"}\n')
    with pytest.raises(ConfigError, match="unknown metric 'acc_nrom' in mode choice") as caught:
        make_task(find_task(str(path)), eval_config(eval_data_dir=str(tmp_path)), make_tokenizer(), 64)
    assert caught.value.hint == "did you mean 'acc_norm'?"


def test_scores_that_are_minus_infinity_do_not_break_a_metric() -> None:
    assert METRICS["probability"](Scored(["a", "b"], [-math.inf, -1.0], [], [1])) == 1.0


def test_examples_are_those_of_the_data(tmp_path: Path) -> None:
    task = task_of("ocnli", make_ocnli(tmp_path))
    assert all(isinstance(example, Example) for example in task.examples())
    assert task.about.counts == {"no majority label (-)": 1}
