"""What runs where another package is installed, with the package's own part replaced by a few lines of it."""

import argparse
import json
import types
from pathlib import Path

import pytest

from swift.evaluate.external.programs import opencompass, vlmevalkit


def parser():
    made = argparse.ArgumentParser()
    made.add_argument("config", nargs="?")
    made.add_argument("--debug", action="store_true")
    made.add_argument("--max-num-workers", type=int)
    return made


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--debug", "--max-num-workers", "2"], None),
        (["--debug", "yes"], "unrecognized arguments: yes"),
        (["--max-num-workers", "many"], "argument --max-num-workers: invalid int value: 'many'"),
    ],
)
def test_what_opencompass_parser_refuses_is_said_in_its_words(words, problem, monkeypatch):
    monkeypatch.setattr(opencompass, "_parser", parser)
    monkeypatch.setattr(opencompass, "_folders", list)
    monkeypatch.setattr(opencompass, "version", lambda name: "0.5.4")
    assert opencompass.check({"words": words})["problem"] == problem


def test_of_two_runs_of_vlmevalkit_the_later_one_stands_first(tmp_path, monkeypatch):
    for name, error in (("T20260101-120000", "stopped"), ("T20260102-120000", None)):
        (tmp_path / "tiny" / name).mkdir(parents=True)
        (tmp_path / "tiny" / name / "status.json").write_text(json.dumps([{"benchmark": "MMStar", "eval_error": error}]))
    replaced = {
        "vlmeval.utils.arguments": {"Arguments": dict},
        "vlmeval.run": {"run_task": lambda options: None},
        "vlmeval.smp": {"collect_run_benchmark_report": lambda folder: json.loads(Path(folder, "status.json").read_text())},
    }
    monkeypatch.setattr(vlmevalkit, "import_module", lambda name: types.SimpleNamespace(**replaced[name]))
    monkeypatch.setattr(vlmevalkit, "version", lambda name: "0.0.20")
    rows = vlmevalkit.run({"options": {"work_dir": str(tmp_path)}})["rows"]
    assert [row["eval_error"] for row in rows] == [None, "stopped"]
