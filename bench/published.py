"""Four data sets as their authors publish them, cut to some questions, and the same questions as tasks of lm-eval.

lm-eval's own tasks are used where it has them: letters of MMLU, CMMLU and C-Eval, choices of MMLU, and its Chinese XNLI for
the choices of OCNLI, which is of the same form. What it does not have is written down here.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LETTERS = "ABCD"
NLI = ("entailment", "neutral", "contradiction")
Row = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A data set: its files of a subject, and for each mode a file of lm-eval's, or what to ask instead."""

    shots: str
    questions: str
    modes: dict[str, str | Row]
    columns: tuple[str, ...] = ()  # of a file without a header


SETS = {
    "mmlu": Published(
        "dev/{}_dev.csv",
        "test/{}_test.csv",
        {"letter": "mmlu/default/mmlu_{}.yaml", "choice": "mmlu/continuation/mmlu_{}.yaml"},
        columns=("question", *LETTERS, "answer"),
    ),
    "cmmlu": Published(
        "dev/{}.csv",
        "test/{}.csv",
        {
            "letter": "cmmlu/cmmlu_{}.yaml",
            "choice": {
                "description": "以下是关于{name}的问题，请给出正确的答案。\n\n",
                "doc_to_text": "问题：{{Question.strip()}}\n答案：",
                "doc_to_choice": "{{[A, B, C, D]}}",
                "doc_to_target": "{{['A', 'B', 'C', 'D'].index(Answer)}}",
                "target_delimiter": "",
            },
        },
    ),
    "ceval": Published(
        "dev/{}_dev.csv",
        "val/{}_val.csv",
        {
            "letter": "ceval/ceval-valid_{}.yaml",
            "choice": {
                "description": "以下是中国关于{name}的问题，请给出正确的答案。\n\n",
                "doc_to_text": "问题：{{question.strip()}}\n答案：",
                "doc_to_choice": "{{[A, B, C, D]}}",
                "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
                "target_delimiter": "",
            },
        },
    ),
    "ocnli": Published(
        "train*.json*",
        "dev*.json*",
        {
            "letter": {
                "doc_to_text": "句子一：{{premise}}\n句子二：{{hypothesis}}\n问题：如果句子一成立，句子二是否成立？\n"
                "A. 一定成立\nB. 不一定成立\nC. 一定不成立\n答案：",
                "doc_to_choice": ["A", "B", "C"],
                "doc_to_target": "label",
                "target_delimiter": "",
            },
            "choice": "xnli/xnli_zh.yaml",
        },
    ),
}
MODES = ("letter", "choice")


@dataclass(frozen=True)
class Subject:
    """Questions of one file, as dictionaries, and the solved ones that are shown before them."""

    name: str
    shots: list[Row]
    questions: list[Row]


def read(folder: Path, data: str, count: int, num_shots: int) -> list[Subject]:
    """``count`` questions of all subjects of ``folder``, as many of each as of the others, give or take one."""
    published = SETS[data]
    if data == "ocnli":
        (shots,), (questions,) = sorted(folder.glob(published.shots)), sorted(folder.glob(published.questions))
        return [Subject("ocnli", _labelled(shots)[:num_shots], _labelled(questions)[:count])]
    before, behind = Path(published.questions).name.split("{}")
    names = sorted(path.name[len(before) : -len(behind)] for path in folder.glob(published.questions.format("*")))
    if not names:
        raise SystemExit(f"{folder} has no {published.questions.format('SUBJECT')}")
    subjects = []
    for number, name in enumerate(names):
        if most := count // len(names) + (number < count % len(names)):
            shots, questions = (_rows(folder / file.format(name), published) for file in (published.shots, published.questions))
            subjects.append(Subject(name, shots[:num_shots], questions[:most]))
    return subjects


def _rows(path: Path, published: Published) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, published.columns or None))


def _labelled(path: Path) -> list[Row]:
    """The rows that most annotators agree on."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["label"] in NLI]


def write(subjects: Sequence[Subject], data: str, folder: Path) -> Path:
    """The data set cut to ``subjects``, in the form in which it is published; ``folder``."""
    published = SETS[data]
    for subject in subjects:
        for file, rows in ((published.shots, subject.shots), (published.questions, subject.questions)):
            path = folder / file.format(subject.name).replace("*", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_lines(rows) if data == "ocnli" else _table(rows, published), encoding="utf-8")
    return folder


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table(rows: Sequence[Row], published: Published) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]))
        if not published.columns:
            writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def right(row: Row, data: str) -> int:
    """Which choice is the right one."""
    return NLI.index(row["label"]) if data == "ocnli" else LETTERS.index(row.get("answer") or row["Answer"])


def write_for_lm_eval(subjects: Sequence[Subject], data: str, mode: str, own: Path, folder: Path) -> list[str]:
    """A task for each subject in ``folder``, which leans on those in the folder ``own`` of lm-eval's; their names, in order."""
    folder.mkdir(parents=True)
    names = []
    for subject in subjects:
        files = {}
        for split, rows in (("dev", subject.shots), ("test", subject.questions)):
            if not rows:
                continue  # which lm-eval's reader does not take
            files[split] = str(folder / f"{subject.name}_{split}.jsonl")
            Path(files[split]).write_text(_lines([_as_on_the_hub(row, data) for row in rows]), encoding="utf-8")
        task = _task(subject.name, data, mode, own) | {
            "task": f"bench_{subject.name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "num_fewshot": len(subject.shots),
        }
        task |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}} if subject.shots else {}
        (folder / f"{subject.name}.yaml").write_text(json.dumps(task, indent=1, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
        names.append(str(task["task"]))
    return names


def _task(subject: str, data: str, mode: str, own: Path) -> Row:
    """What lm-eval's file says, with what it includes, but for where the data are; or what stands above."""
    said = SETS[data].modes[mode]
    if isinstance(said, dict):
        task = {"output_type": "multiple_choice", **said}
        if "description" in task:
            with_name = _read_yaml(own / str(SETS[data].modes["letter"]).format(subject))["description"]
            (name,) = re.findall(r"关于(.+)的单项选择题", with_name)
            task["description"] = str(task["description"]).format(name=name)
    else:
        task = _read_yaml(own / said.format(subject))
    left_out = ("dataset_name", "training_split", "validation_split", "fewshot_split", "fewshot_config", "tag", "task_alias")
    return {key: value for key, value in task.items() if key not in left_out}


def _read_yaml(path: Path) -> Row:
    task: Row = yaml.safe_load(path.read_text(encoding="utf-8"))
    included = task.pop("include", None)
    return task if included is None else _read_yaml(path.parent / included) | task


def _as_on_the_hub(row: Row, data: str) -> Row:
    """The row as the copy has it that lm-eval's tasks read."""
    if data == "mmlu":
        return {"question": row["question"], "choices": [row[letter] for letter in LETTERS], "answer": LETTERS.index(row["answer"])}
    if data == "ocnli":
        return {"premise": row["sentence1"], "hypothesis": row["sentence2"], "label": NLI.index(row["label"])}
    return row
