"""Data as a hub lays them out, for packages that read no other: a folder with a README that lists subsets, splits and files.

What the authors of a task publish (``dev/SUBJECT_dev.csv``) is read by our own reader, and written anew with the columns that
the package expects. A folder that has such a README already is taken as it is.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swift.config.evaluate import EvalConfig
from swift.errors import DataError
from swift.evaluate.external.base import digest, settings
from swift.evaluate.layout import Located, locate
from swift.evaluate.read import rows
from swift.evaluate.settings import Settings
from swift.evaluate.spec import find_task
from swift.files import new_folder, write_text

LETTERS = "ABCD"
README = "README.md"


@dataclass(frozen=True)
class Hub:
    """How a hub holds a task: which splits, what a row is, and the one subset that holds all subjects ("" if each is one)."""

    splits: tuple[str, ...]
    row: Callable[[Mapping[str, Any], str], dict[str, Any]]
    subset: str = ""


def _as_it_is(row: Mapping[str, Any], subject: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name}


def _ceval(row: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """Its solved examples alone have an explanation; a hub's splits have equal columns."""
    return {name: row[name] for name in ("id", "question", *LETTERS, "answer")} | {"explanation": row.get("explanation", "")}


def _mmlu(row: Mapping[str, Any], subject: str) -> dict[str, Any]:
    return {
        "question": row["question"],
        "subject": subject,
        "choices": [row[letter] for letter in LETTERS],
        "answer": LETTERS.index(row["answer"]),
    }


def _cmmlu(row: Mapping[str, Any], subject: str) -> dict[str, Any]:
    choices = [f"({letter}) {row[letter]}" for letter in LETTERS]
    return {"question": row["Question"], "choices": choices, "answer": f"({row['Answer']})", "category": subject}


# (package, our name of the task) -> how the package expects it
HUBS: dict[tuple[str, str], Hub] = {
    ("evalscope", "mmlu"): Hub(("dev", "test"), _mmlu, "all"),
    ("evalscope", "cmmlu"): Hub(("dev", "test"), _cmmlu, "default"),
    ("evalscope", "ceval"): Hub(("dev", "val"), _ceval),
    ("evalscope", "gsm8k"): Hub(("train", "test"), _as_it_is, "main"),
    ("lm_eval", "mmlu"): Hub(("dev", "test"), _mmlu),
    ("lm_eval", "cmmlu"): Hub(("dev", "test"), _as_it_is),
    ("lm_eval", "ceval"): Hub(("dev", "val"), _ceval),
    ("lm_eval", "gsm8k"): Hub(("train", "test"), _as_it_is, "main"),
}


def subsets_of(folder: Path) -> list[str]:
    """The subsets that the README of ``folder`` lists, or [] if it has none. DataError for one that cannot be read."""
    file = folder / README
    if not file.is_file():
        return []
    try:
        _, head, *_ = file.read_text(encoding="utf-8").split("---\n", 2)
        return [str(each["config_name"]) for each in (yaml.safe_load(head) or {}).get("configs", [])]
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
        raise DataError(f"{file} does not list subsets as a hub's data set does", hint="it begins with --- and has configs:") from None


def is_laid_out(place: Path) -> bool:
    """Whether a package that reads a hub's data sets reads ``place``: a README lists subsets, or there are files of a subset."""
    return place.is_file() or bool(subsets_of(place)) or any(place.rglob("*.parquet"))


def laid_out(config: EvalConfig, package: str, task: str) -> dict[str, Any]:
    """The settings of ``task`` with a local_path that ``package`` reads; data of another layout are written anew for it.

    They go to --eval_output_dir, under a name that changes with the files. DataError if they are no data of the task.
    """
    given = settings(config, task)
    if "local_path" not in given or is_laid_out(Path(given["local_path"])) or (package, task) not in HUBS:
        return given
    wanted = HUBS[package, task]
    spec = find_task(task)
    chosen = Settings(mode=next(iter(spec.modes)), num_fewshot=0, local_path=given["local_path"])
    located = locate(spec, chosen, wanted.splits)
    files = [(str(file.path), file.path.stat().st_size, file.path.stat().st_mtime_ns) for each in located.splits.values() for file in each]
    folder = Path(config.eval_output_dir) / "data" / f"{package}-{task}-{digest(files)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write(folder, _rows(located, wanted))
    subjects = sorted({file.category for file in located.splits[wanted.splits[-1]]} - {""})
    return {"subset_list": subjects or [wanted.subset]} | given | {"local_path": str(folder.resolve())}


def _rows(located: Located, wanted: Hub) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows by subset and split, as ``wanted`` has them."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for split, files in located.splits.items():
        for file in files:
            made = found.setdefault(wanted.subset or file.category, {}).setdefault(split, [])
            for where, row in rows(file.path, located.layout.header):
                try:
                    made.append(wanted.row(row, file.category))
                except (LookupError, ValueError) as problem:
                    raise DataError(f"{where}: no row of this task: {problem}") from None
    return found


def write(folder: Path, subsets: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Rows by subset and split, as a new ``folder`` of JSON lines with the README that lists them."""
    with new_folder(folder) as made:
        configs = []
        for subset, splits in subsets.items():
            files = []
            for split, rows in splits.items():
                name = f"{subset}/{split}.jsonl"
                write_text(made / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                files.append({"split": split, "path": name})
            configs.append({"config_name": subset, "data_files": files})
        write_text(made / README, f"---\n{yaml.safe_dump({'configs': configs}, sort_keys=False, allow_unicode=True)}---\n")
