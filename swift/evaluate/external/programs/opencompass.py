"""What runs where OpenCompass is installed: its own parser and data sets asked, and its own run."""

import argparse
import csv
import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


class _Found(Exception):
    """Carries the parser out of the function that makes it."""


def _parser() -> argparse.ArgumentParser:
    main: Any = import_module("opencompass.cli.main")
    kept = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise _Found(parser)

    argparse.ArgumentParser.parse_args = stop  # type: ignore[method-assign,assignment]
    try:
        main.parse_args()
    except _Found as found:
        parser: argparse.ArgumentParser = found.args[0]
        return parser
    finally:
        argparse.ArgumentParser.parse_args = kept  # type: ignore[method-assign]
    raise AssertionError("OpenCompass has parsed without a parser")


def _refuse(message: str) -> None:
    """In place of the parser's own, which prints and ends the process."""
    raise argparse.ArgumentTypeError(message)


def _folders() -> list[Path]:
    home = Path(str(import_module("opencompass").__file__)).parent / "configs"
    return [home / "datasets", home / "dataset_collections"]


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The names of its options and data sets, and what its parser says against ``job["words"]`` (None if nothing)."""
    parser = _parser()
    options = [
        (action.option_strings or [action.dest])[-1].lstrip("-") for action in parser._actions if action.dest not in ("help", "config")
    ]
    problem = None
    parser.error = _refuse  # type: ignore[method-assign,assignment]
    try:
        parser.parse_args(["config.py", *job["words"]])
    except argparse.ArgumentTypeError as found:
        problem = str(found)
    tasks = sorted({file.stem for folder in _folders() for file in folder.rglob("*.py") if not file.stem.startswith("_")})
    return {"version": version("opencompass"), "options": sorted(options), "tasks": tasks, "problem": problem}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate; OpenCompass writes its files below ``job["folder"]``. The answer holds the rows of its summary."""
    os.environ["OPENAI_API_KEY"] = job["key"] or "EMPTY"
    config_kind: Any = import_module("mmengine.config").Config
    match: Any = import_module("opencompass.utils.run").match_cfg_file
    folder = Path(job["folder"])
    names: dict[str, list[str]] = {}
    datasets: list[Any] = []
    for task in job["tasks"]:
        ((_, path), *_) = match([str(each) for each in _folders()], [task["name"]])
        content = config_kind.fromfile(path)
        own = [one for key in content if key.endswith("_datasets") for one in content[key]]
        for one in own:
            if job["limit"] is not None:
                one["reader_cfg"]["test_range"] = f"[:{job['limit']}]"
            if task["path"] is not None:
                one["path"] = task["path"]
        names[task["name"]] = [one["abbr"] for one in own]
        datasets += own
    before = set(folder.glob("*/summary/summary_*.csv"))
    config_file = folder / "config.py"
    config_kind({"models": [job["model"]], "datasets": datasets}).dump(str(config_file))
    sys.argv = ["opencompass", str(config_file), "--work-dir", str(folder), *job["words"]]
    import_module("opencompass.cli.main").main()
    summary = max(set(folder.glob("*/summary/summary_*.csv")) - before)  # each run writes to a new folder, named by time
    with summary.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {"version": version("opencompass"), "names": names, "rows": rows}
