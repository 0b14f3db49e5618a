"""Test examples in training data: what is found, what is not, and what it costs."""

import json
import tracemalloc
from dataclasses import replace

import pytest

from swift.config.evaluate import EvalConfig
from swift.errors import DataError
from swift.evaluate import contamination
from swift.evaluate.base import About, Example
from swift.evaluate.contamination import find_contamination, search, tokens

QUESTION = "A train leaves the station at noon and travels sixty miles each hour. How far has it come by six in the evening?"
CHINESE = "下列行为中,不构成我国刑法所规定的交通肇事罪的情形是哪一项?"


def example(id, *texts):
    return Example(id, "", {f"field{number}": text for number, text in enumerate(texts)})


def found(rows, *examples):
    return search([(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1)], {"task": examples}, ["rows.jsonl"]).tasks[0]


def test_texts_are_compared_without_case_punctuation_and_width():
    assert tokens("The  Train, LEAVES! 第１题:刑法(A)") == ["the", "train", "leaves", "第", "1", "题", "刑", "法", "a"]


def test_a_question_within_a_row_is_found_whatever_its_punctuation():
    row = {"messages": [{"role": "user", "content": f"Please solve:\n\n{QUESTION.upper().replace('.', ' --')}"}]}
    match = found([{"text": "nothing"}, row], example("q1", QUESTION)).matches[0]
    assert (match.id, match.share, match.is_exact, match.row) == ("q1", 1.0, True, "rows.jsonl:2")


def test_a_chinese_question_is_compared_by_characters():
    result = found([{"instruction": f"请回答:{CHINESE}", "output": "A"}], example("q1", CHINESE), example("q2", CHINESE[::-1]))
    assert [(match.id, match.is_exact) for match in result.matches] == [("q1", True)]


def test_thirteen_common_words_are_enough_and_twelve_are_not():
    words = [f"word{number}" for number in range(20)]
    twelve, thirteen = " ".join(["x", *words[3:15], "y"]), " ".join(["x", *words[3:16], "y"])
    assert found([{"text": twelve}], example("q", " ".join(words))).matches == []
    match = found([{"text": thirteen}], example("q", " ".join(words))).matches[0]
    assert (match.share, match.is_exact) == (1 / 8, False)  # 20 words have 8 runs of 13


def test_the_parts_of_a_row_are_not_joined():
    words = QUESTION.split()
    assert found([{"a": " ".join(words[:11]), "b": " ".join(words[11:])}], example("q", QUESTION)).matches == []


def test_a_short_text_has_to_be_there_as_a_whole():
    short = "What is the capital of the old kingdom?"  # 8 words
    assert found([{"text": f"Say: {short}"}], example("q", short)).matches[0].is_exact
    assert found([{"text": "What is the capital of the old republic?"}], example("q", short)).matches == []


def test_what_is_too_short_to_check_is_counted():
    result = found([{"text": "Who was he?"}], example("q1", "Who was he?", "A"), example("q2", QUESTION))
    assert (result.examples, result.unchecked, result.matches) == (2, 1, [])


def test_a_phrase_of_many_questions_is_no_evidence():
    phrase = "Read the following statements with care and choose the one that is right about"
    questions = [example(f"q{number}", f"{phrase} topic{number} alone") for number in range(11)]
    assert found([{"text": phrase}], *questions).matches == []
    assert len(found([{"text": phrase}], *questions[:10]).matches) == 10


def test_many_answers_to_a_question_are_one_question():
    question = example("q", QUESTION)
    answers = [replace(question, id=f"q#{number}") for number in range(20)]
    result = found([{"text": " ".join(QUESTION.split()[:13])}], *answers)
    assert [(match.id, match.share) for match in result.matches] == [(one.id, 1 / (len(tokens(QUESTION)) - 12)) for one in answers]


def test_each_text_of_an_example_counts_and_its_first_long_one_is_the_question():
    answer = "First she adds the twelve apples of the morning to the seven of the afternoon"
    match = found([{"text": answer}], example("q", "easy", QUESTION, answer)).matches[0]
    runs = len(tokens(QUESTION)) - 12, len(tokens(answer)) - 12
    assert match.share == pytest.approx(runs[1] / sum(runs))
    assert not match.is_exact


def test_tasks_are_told_apart():
    result = search(
        [("r:1", {"text": QUESTION})], {"one": [example("q", QUESTION)], "two": [example("q", QUESTION[5:]), example("p", "x")]}, []
    )
    assert [(task.task, [match.id for match in task.matches], task.unchecked) for task in result.tasks] == [
        ("one", ["q"], 0),
        ("two", ["q"], 1),
    ]


def test_many_rows_are_never_all_in_memory(monkeypatch):
    def rows():
        for number in range(1000):
            yield f"r:{number}", {"text": " ".join(f"w{(number * 31 + word) % 5000}" for word in range(60))}
        yield "r:last", {"text": QUESTION}

    monkeypatch.setattr(contamination, "_BATCH_TOKENS", 2000)
    search(rows(), {"task": [example("q", QUESTION)]}, [])
    tracemalloc.start()
    try:
        result = search(rows(), {"task": [example("q", QUESTION)]}, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.tasks[0].matches[0].row == "r:last"
    assert result.rows == 1001
    assert peak < 300_000  # bytes; the numbers of 61,000 tokens alone are 488,000


class ATask:
    about = About("task", "Task", "letter", "acc", 0, False, "MIT", "here", "d")

    def examples(self):
        return [example("q1", QUESTION), example("q2", CHINESE)]


def test_training_data_are_read_as_they_are_for_training(tmp_path, capsys):
    rows = [
        {"query": "hello", "response": "yes"},
        {"messages": [{"role": "user", "content": CHINESE}, {"role": "assistant", "content": "B"}]},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    config = EvalConfig(models=["m"], eval_dataset=["task"], eval_train_dataset=[str(path)])
    result = find_contamination(config, [ATask()])
    assert [(match.id, match.row) for match in result.tasks[0].matches] == [("q2", f"{path}:2")]
    assert "task: 1 of 2 examples are in the training data" in capsys.readouterr().out


def test_training_data_that_are_missing_are_told(tmp_path):
    config = EvalConfig(models=["m"], eval_dataset=["task"], eval_train_dataset=[str(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        find_contamination(config, [ATask()])
