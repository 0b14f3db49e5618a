"""Questions of MMLU from the files that its authors publish, in one form for all tools.

A folder has dev/SUBJECT_dev.csv and test/SUBJECT_test.csv without headers: question, four choices, letter of the right one.
Letter: the choices stand in the prompt, and their letters are scored. Choice: the prompt has the question alone, and the
texts of the choices are scored.
"""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

LETTERS = "ABCD"
MODES = ("letter", "choice")
# Of lm-eval's tasks, written in Jinja there and filled in here.
PROMPTS = {
    "letter": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "choice": "Question: {{question.strip()}}\nAnswer:",
}


@dataclass(frozen=True)
class Question:
    question: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Subject:
    name: str
    shots: list[Question]
    questions: list[Question]

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def description(self) -> str:
        return f"The following are multiple choice questions (with answers) about {self.title}.\n\n"


def read(folder: Path, count: int, num_shots: int) -> list[Subject]:
    """All subjects of ``folder``, with ``count`` questions together, as many of each as the others have, give or take one."""
    names = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not names:
        raise SystemExit(f"{folder} has no test/SUBJECT_test.csv")
    subjects = []
    for number, name in enumerate(names):
        most = count // len(names) + (number < count % len(names))
        shots = _rows(folder / "dev" / f"{name}_dev.csv")[:num_shots]
        if most:
            subjects.append(Subject(name, shots, _rows(folder / "test" / f"{name}_test.csv")[:most]))
    return subjects


def _rows(path: Path) -> list[Question]:
    with path.open(encoding="utf-8", newline="") as file:
        return [Question(row[0], row[1:5], LETTERS.index(row[5])) for row in csv.reader(file)]


def asked(question: Question, mode: str) -> str:
    """The question as it stands in a prompt."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)] if mode == "letter" else []
    first = question.question.strip() if mode == "letter" else f"Question: {question.question.strip()}"
    return "\n".join([first, *lines, "Answer:"])


def answers(question: Question, mode: str) -> list[str]:
    """What is scored behind the prompt."""
    return [f" {answer}" for answer in (LETTERS if mode == "letter" else question.choices)]


def prompts(subject: Subject, mode: str) -> list[str]:
    """One for each question: the description, the shots with their answers, the question."""
    shots = "".join(f"{asked(shot, mode)}{answers(shot, mode)[shot.answer]}\n\n" for shot in subject.shots)
    return [f"{subject.description}{shots}{asked(question, mode)}" for question in subject.questions]


def write_for_lm_eval(subjects: list[Subject], mode: str, num_shots: int, folder: Path) -> list[str]:
    """A task of lm-eval for each subject, in YAML and JSON lines in ``folder``; their names, in order."""
    folder.mkdir(parents=True)
    names = []
    for subject in subjects:
        files = {}
        for split, rows in (("dev", subject.shots), ("test", subject.questions)):
            files[split] = str(folder / f"{subject.name}_{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": f"bench_{subject.name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": num_shots,
            "output_type": "multiple_choice",
            "description": subject.description,
            "doc_to_text": PROMPTS[mode],
            "doc_to_choice": list(LETTERS) if mode == "letter" else "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{subject.name}.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")  # JSON is YAML
        names.append(str(task["task"]))
    return names
