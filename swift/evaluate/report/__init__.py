"""What an evaluation leaves for readers: report.json (see ``schema``), report.md, report.html, and tables on the terminal.

An outcome's ``detail`` may say more than its metrics, and the report shows it: ``choices`` and their ``logprobs`` (two lists),
``notes`` (those of Asked), ``answer`` (what the model wrote) and ``cluster`` (see ``statistics``).
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from swift.config.options import Config
from swift.errors import DataError
from swift.evaluate.base import About, ModelResult, TaskResult
from swift.evaluate.contamination import Contamination
from swift.evaluate.report import html, markdown, terminal
from swift.evaluate.report.build import build
from swift.evaluate.report.schema import VERSION
from swift.evaluate.results import read
from swift.files import explain_os_errors, write_json, write_text

__all__ = ["build", "load", "show", "write"]

NAME = "report"


def write(
    folder: Path,
    models: Sequence[ModelResult],
    *,
    baselines: Sequence[ModelResult] = (),
    contamination: Contamination | None = None,
    config: Config | None = None,
) -> Path:
    """Write the report of ``models`` into ``folder`` and return it. A report of other models or tasks there is renamed first."""
    report = build(models, baselines, contamination or None, config)
    value = _plain(asdict(report))
    texts = {"md": markdown.render(report), "html": html.render(report)}
    _keep_other(folder, value)
    for ending, text in texts.items():
        write_text(folder / f"{NAME}.{ending}", _encodable(text))
    write_json(folder / f"{NAME}.json", value)
    return folder


def show(models: Sequence[ModelResult], baselines: Sequence[ModelResult] = (), contamination: Contamination | None = None) -> None:
    """Tables on the terminal."""
    terminal.show(build(models, baselines, contamination or None))


def load(folder: Path) -> list[ModelResult]:
    """The models of the report in ``folder`` with all their outcomes, baselines left out. DataError if it is none."""
    value = _read(folder)
    if value is None:
        raise DataError(
            f"{folder} holds no report of swift eval", hint="--eval_baseline takes the --eval_output_dir of an earlier evaluation"
        )
    try:
        found = {model["name"]: ModelResult(model["name"], [], model["facts"]) for model in value["models"] if not model["is_baseline"]}
        for part in value["tasks"]:
            for result in part["results"]:
                if result["model"] in found:
                    found[result["model"]].tasks.append(_task(folder, result))
    except (KeyError, TypeError):
        raise DataError(f"{folder / NAME}.json lacks parts of a report", hint="evaluate these models again") from None
    return list(found.values())


def _task(folder: Path, result: dict[str, Any]) -> TaskResult:
    if not result["file"]:
        raise DataError(
            f"{folder} holds results of {result['about']['mode']}, whose answers are in files of its own",
            hint="--eval_baseline takes those of swift's own evaluation; name both models in one command",
        )
    path = folder / result["file"]
    if not path.is_file():
        raise DataError(
            f"{path} is missing: the answers of {result['model']} on {result['about']['name']}",
            hint="copy the folder items with the report, or evaluate this model again",
        )
    head, outcomes = read(path)
    about = About(**result["about"])
    if head["about"].get("digest") != about.digest:
        raise DataError(f"{path} holds answers to other questions than the report in {folder}", hint="evaluate this model again")
    if len(outcomes) < result["items"]:
        raise DataError(f"{path} holds {len(outcomes)} answers, the report {result['items']}", hint="evaluate this model again")
    return TaskResult(about, outcomes, result["facts"])


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / f"{NAME}.json"
    if not path.is_file():
        return None
    with explain_os_errors(path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
        known = isinstance(value, dict) and isinstance(value["version"], int)
    except (ValueError, KeyError):
        known = False
    if not known:
        raise DataError(f"{path} is no report of swift eval", hint="remove it, or name another folder")
    if value["version"] > VERSION:
        raise DataError(f"{path} was written by a newer swift ({value['swift']})", hint="update swift")
    return dict(value)


def _keep_other(folder: Path, value: dict[str, Any]) -> None:
    """Rename a report on other models or tasks, or what else has this name, by the time at which it was written."""
    there = [path for ending in ("html", "md", "json") if (path := folder / f"{NAME}.{ending}").exists()]
    try:
        old = _read(folder)
        if not there or (old is not None and _subject(old) == _subject(value)):
            return
    except DataError:
        pass
    made = datetime.fromtimestamp(there[-1].stat().st_mtime, UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (f"{NAME}-{made}" + (f"-{number}" if number else "") for number in count())
    free = next(name for name in names if not any((folder / f"{name}{path.suffix}").exists() for path in there))
    for path in there:
        with explain_os_errors(path):
            os.replace(path, folder / f"{free}{path.suffix}")


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: null for what is no finite number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return _encodable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encodable(text: str) -> str:
    """Halves of surrogate pairs, which a data set or a model may have written, have no bytes in UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _subject(value: dict[str, Any]) -> Any:
    tasks = [
        (result["model"], result["about"]["name"], result["about"]["digest"], result["file"])
        for part in value["tasks"]
        for result in part["results"]
    ]
    return tasks, [model["name"] for model in value["models"]]
