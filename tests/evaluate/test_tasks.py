"""Each declared task on a row or two of our own, in the layouts of its authors and of the hub, with the prompt that lm-eval makes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from swift.engine.base import Completion
from swift.engine.scoring import Score
from swift.evaluate.declared import choices_of, declare, make_task
from swift.evaluate.prompt import render, value
from swift.evaluate.scored import Choices
from swift.evaluate.settings import settings_of
from swift.evaluate.spec import Choosing, Writing, find_task
from tests.evaluate.rows import eval_config, write
from tests.tiny import make_tokenizer

Rows = list[dict[str, Any]]

TWO = {"text": ["Ice", "Fire"], "label": ["A", "B"]}
PARTS = [{"text": "Ice", "label": "A"}, {"text": "Fire", "label": "B"}]
NUMBERED = [{"text": "Ice", "label": "1"}, {"text": "Fire", "label": "2"}]
FIVE = {"label": list("ABCDE"), "text": ["Ice", "Fire", "Fog", "Tin", "Rye"]}
OPTIONS = "A. Ice\nB. Fire\nC. Fog\nD. Tin\nE. Rye\n"


def put(folder: Path, files: Mapping[str, Rows]) -> Path:
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            import pyarrow  # type: ignore[import-untyped]
            import pyarrow.parquet  # type: ignore[import-untyped]

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


# task, mode, files, question, continuations, index of the right one
CHOICES = [
    ("arc_easy", "choice",
     {"ARC-Easy/ARC-Easy-Test.jsonl": [{"id": "q1", "question": {"stem": "Hot?", "choices": PARTS}, "answerKey": "B"}]},
     "Question: Hot?\nAnswer:", [" Ice", " Fire"], 1),
    ("arc_challenge", "choice",
     {"ARC-Challenge-Test.jsonl": [{"id": "q", "question": {"stem": "Hot?", "choices": NUMBERED}, "answerKey": "2"}]},
     "Question: Hot?\nAnswer:", [" Ice", " Fire"], 1),
    ("arc_easy", "letter", {"ARC-Easy/test-00000-of-00001.parquet": [{"id": "q1", "question": "Hot?", "choices": TWO, "answerKey": "B"}]},
     "Question: Hot?\nA. Ice\nB. Fire\nAnswer:", [" A", " B"], 1),
    ("hellaswag", "choice",
     {"hellaswag_val.jsonl": [{"ind": 1, "activity_label": "Cooking [title]", "ctx_a": "A man [step] stirs.", "ctx_b": "the POT",
                               "endings": ["boils  over.", " [header] falls. "], "label": 0}]},
     "Cooking. : A man stirs. The pot", [" boils over.", "  falls."], 0),
    ("truthfulqa_mc1", "choice", {"mc_task.json": [{"question": "Do stones fly?", "mc1_targets": {"No.": 1, "Yes.": 0}}]},
     "Q: Do stones fly?\nA:", [" No.", " Yes."], 0),
    ("truthfulqa_mc2", "choice",
     {"multiple_choice/validation-0.parquet": [{"question": "Do stones fly?", "mc2_targets": {"choices": ["No.", "Yes."],
                                                "labels": [1, 0]}}]},
     "Q: Do stones fly?\nA:", [" No.", " Yes."], 0),
    ("piqa", "choice", {"data/validation-0.parquet": [{"goal": "Cool tea", "sol1": "Wait.", "sol2": "Boil it.", "label": 0}]},
     "Question: Cool tea\nAnswer:", [" Wait.", " Boil it."], 0),
    ("boolq", "choice", {"BoolQ/val.jsonl": [{"passage": "Snow is cold.", "question": "is snow cold", "label": True}]},
     "Snow is cold.\nQuestion: is snow cold?\nAnswer:", [" no", " yes"], 1),
    ("boolq", "choice", {"dev.jsonl": [{"passage": "Snow is cold.", "question": "is snow hot", "answer": False, "title": "Snow"}]},
     "Snow is cold.\nQuestion: is snow hot?\nAnswer:", [" no", " yes"], 0),
    ("openbookqa", "choice",
     {"Data/Main/test.jsonl": [{"id": "7-1", "question": {"stem": "What burns?", "choices": PARTS}, "answerKey": "A"}]},
     "What burns?", [" Ice", " Fire"], 0),
    ("commonsense_qa", "letter", {"data/validation-0.parquet": [{"id": "a", "question": "Hot? ", "choices": FIVE, "answerKey": "B"}]},
     f"Question: Hot?\n{OPTIONS}Answer:", [" A", " B", " C", " D", " E"], 1),
    ("commonsense_qa", "choice", {"dev_rand_split.jsonl": [{"id": "a", "question": {"stem": "Hot?", "choices": PARTS}, "answerKey": "B"}]},
     "Question: Hot?\nAnswer:", [" Ice", " Fire"], 1),
    ("race", "choice",
     {"high/test-0.parquet": [{"article": "Snow fell.", "problems": str([
         {"question": "It is  _  .", "options": ["hot", "cold", "red", "old"], "answer": "B"},
         {"question": "Who fell?", "options": ["Snow", "Ann", "Tea", "Ink"], "answer": "A"},
         {"question": "Why?", "options": ["a", "b", "c", "d"], "answer": "D"}])}]},
     "Article: Snow fell.\n\nIt is cold\nQuestion: Who fell?\nAnswer: Snow\nWhy?", [" a", " b", " c", " d"], 3),
    ("afqmc", "letter", {"dev.json": [{"sentence1": "怎么还款", "sentence2": "如何还款", "label": "1"}]},
     "问题一：怎么还款\n问题二：如何还款\n这两个问题的意思相同吗？\nA. 不同\nB. 相同\n答案：", ["A", "B"], 1),
    ("c3", "choice",
     {"c3/validation-0.parquet": [{"context": ["甲：下雪了。", "乙：真冷。"],
                                 "question": "天气如何？", "choice": ["冷", "热"], "answer": "冷"}]},
     "甲：下雪了。\n乙：真冷。\n问题：天气如何？\n答案：", ["冷", "热"], 0),
    ("ocnli", "letter",
     {"ocnli/validation-0.parquet": [{"sentence1": "他在家", "sentence2": "他在睡觉", "label": 0, "idx": 0}]},
     "句子一：他在家\n句子二：他在睡觉\n问题：如果句子一成立，句子二是否成立？\n"
     "A. 一定成立\nB. 不一定成立\nC. 一定不成立\n答案：", ["A", "B", "C"], 1),
    ("cmnli", "choice", {"dev.json": [{"sentence1": "他在家", "sentence2": "他出门了", "label": "contradiction"}]},
     "", [" 他在家, 正确? 是的, 他出门了", " 他在家, 正确? 所以, 他出门了", " 他在家, 正确? 不是的, 他出门了"], 2),
    ("cmmlu", "letter",
     {"astronomy/test-0.parquet": [{"Question": "什么发光？ ", "A": "石", "B": "星", "C": "云", "D": "鱼", "Answer": "B"}]},
     "什么发光？\nA. 石\nB. 星\nC. 云\nD. 鱼\n答案：", [" A", " B", " C", " D"], 1),
    ("general_mcq", "letter", {"mine_val.jsonl": [{"question": "Hot?", "A": "Ice", "B": "Fire", "C": "", "answer": "B"}]},
     "Hot?\nA. Ice\nB. Fire\nAnswer:", [" A", " B"], 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode", "files", "question", "continuations", "gold"), CHOICES, ids=[f"{one[0]}-{one[1]}" for one in CHOICES]
)
def test_a_row_becomes_the_question_and_its_choices(
    tmp_path: Path, name: str, mode: str, files: Mapping[str, Rows], question: str, continuations: list[str], gold: int
) -> None:
    config = eval_config(eval_data_dir=str(put(tmp_path, files)), eval_mode=mode, eval_num_fewshot=0)
    tokenizer = make_tokenizer()
    task = make_task(find_task(name), config, tokenizer, 4096)
    assert isinstance(task, Choices)
    example = task.examples()[0]
    asked = task.requests(example)
    assert asked.prompt.endswith(question)
    whole = [tokenizer.decode(text.tokens) for text in asked.texts[: len(continuations)]]
    start = asked.prompt or "<|im_end|>"
    assert whole == [start + continuation for continuation in continuations]
    declared = task.declared
    spec_mode = declared.settings.mode_of(declared.spec)
    assert isinstance(spec_mode, Choosing)
    assert choices_of(spec_mode, declared.scope(example), "here")[1][0] == gold
    answer = [Score((-1.0 - (index != gold),), False) for index in range(len(asked.texts))]
    assert next(iter(task.score(example, asked, answer).metrics.values())) >= 0.5


# task, files, prompt, right answer
WRITTEN = [
    ("gsm8k", {"test.jsonl": [{"question": "1,000 and 2?", "answer": "It is <<1000+2=1002>>1,002.\n#### 1,002"}]},
     "Question: 1,000 and 2?\nAnswer:", "1002"),
    ("mmlu", {"astronomy/test-0.parquet": [{"question": "Hot?", "choices": ["Ice", "Sun", "Fog", "Tin"], "answer": 1}]},
     "Hot?\nA. Ice\nB. Sun\nC. Fog\nD. Tin\nAnswer:", "B"),
    ("bbh", {"navigate.json": [{"examples": [{"input": "Do you return?\nOptions:\n- Yes\n- No", "target": "Yes"}]}]},
     "Q: Do you return?\nOptions:\n- Yes\n- No\nA: Let's think step by step.", "Yes"),
    ("ifeval", {"input_data.jsonl": [{"key": 1, "prompt": "Write in capitals.", "instruction_id_list": ["x"], "kwargs": [{}]}]},
     "Write in capitals.", None),
    ("humaneval", {"HumanEval.jsonl": [{"task_id": "H/0", "prompt": "def f():\n", "entry_point": "f", "test": "check"}]},
     "def f():\n", "check"),
    ("mbpp", {"mbpp.jsonl": [{"task_id": 1, "text": "no", "code": "", "test_list": []},
                             {"task_id": 11, "text": "Add.", "code": "x", "test_list": ["a", "b", "c"]}]},
     "You are an expert Python programmer, and here is your task: Add. Your code should pass these tests:\n\na\nb\nc\n[BEGIN]\n",
     "a\nb\nc"),
    ("boolq", {"dev.jsonl": [{"passage": "Snow is cold.", "question": "is snow hot", "answer": False}]},
     "Snow is cold.\nQuestion: is snow hot?\nAnswer:", "no"),
    ("ocnli", {"dev.jsonl": [{"sentence1": "他在家", "sentence2": "他出门了", "label": "contradiction"}]},
     "句子一：他在家\n句子二：他出门了\n问题：如果句子一成立，句子二是否成立？\n"
     "A. 一定成立\nB. 不一定成立\nC. 一定不成立\n请回答一个字母。\n答案：", "C"),
    ("general_qa", {"mine.jsonl": [{"query": "Hot?", "response": "Fire"}]}, "Hot?", "Fire"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "prompt", "gold"), WRITTEN, ids=[one[0] for one in WRITTEN])
def test_a_row_becomes_the_prompt_and_the_right_answer(
    tmp_path: Path, name: str, files: Mapping[str, Rows], prompt: str, gold: Any
) -> None:
    spec = find_task(name)
    config = eval_config(eval_data_dir=str(put(tmp_path, files)), eval_mode="generate", eval_num_fewshot=0)
    declared = declare(spec, settings_of(spec, config), make_tokenizer())
    mode = declared.settings.mode_of(spec)
    assert isinstance(mode, Writing)
    fields = declared.scope(declared.data.examples[0])
    assert render(mode.prompt, fields) == prompt
    assert (value(mode.gold, fields) if mode.gold else None) == gold


@pytest.mark.parametrize("mode", ["letter", "choice", "generate"])
def test_choices_keep_their_letters_where_one_of_them_is_empty(tmp_path: Path, mode: str) -> None:
    put(tmp_path, {"mine.jsonl": [{"question": "Hot?", "A": "Ice", "B": "", "C": "Fire", "D": "Fog", "answer": "D"}]})
    task = make_task(find_task("general_mcq"), eval_config(eval_data_dir=str(tmp_path), eval_mode=mode), make_tokenizer(), 4096)
    (example,) = task.examples()
    asked = task.requests(example)
    answer: Any = Completion("D", [1], "stop")
    if mode != "generate":
        answer = [Score((-2.0,), False), Score((-3.0,), False), Score((-1.0,), False)] * (len(asked.texts) // 3)
    outcome = task.score(example, asked, answer)
    assert (outcome.gold, outcome.metrics["acc"]) == ("Fog" if mode == "choice" else "D", 1.0)


@pytest.mark.parametrize(
    ("answer", "found"),
    [("So the answer is (B).", "(B)"), ("So the answer is (B).\n\nLet me know if you have questions.", "(B)"), ("Perhaps (B).", None)],
)
def test_the_answer_to_bbh_is_found_wherever_its_line_stands(tmp_path: Path, answer: str, found: str | None) -> None:
    put(tmp_path, {"navigate.json": [{"examples": [{"input": "Which?", "target": "(B)"}]}]})
    task = make_task(find_task("bbh"), eval_config(eval_data_dir=str(tmp_path)), make_tokenizer(), 4096)
    (example,) = task.examples()
    assert task.score(example, task.requests(example), Completion(answer, [1], "stop")).prediction == found


def test_the_marks_of_wikitext_are_removed_and_words_counted_before(tmp_path: Path) -> None:
    page = " = Snow = \n Snow , which is 1 @,@ 000 m deep ( or @-@ so ) , isn 't warm . \n"
    put(tmp_path, {"wikitext-2-raw-v1/test-0.parquet": [{"page": page}]})
    task = make_task(find_task("wikitext"), eval_config(eval_data_dir=str(tmp_path)), make_tokenizer(), 4096)
    example = task.examples()[0]
    asked = task.requests(example)
    assert asked.prompt == " = Snow =\nSnow, which is 1,000 m deep (or-so), isn 't warm.\n"
    outcome = task.score(example, asked, [Score((-1.0,), False)])
    # Split at white space, the page has 22 parts and an empty one at either end.
    assert (outcome.metrics["words"], outcome.metrics["bytes"]) == (24.0, 76.0)
