"""Reports that lie in one folder, one after the other, and what is never in one."""

import json
import os

import pytest

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.evaluate import report
from tests.evaluate.test_report import BASE, TUNED, model


def test_a_report_of_other_models_is_kept_under_another_name(tmp_path):
    report.write(tmp_path, [BASE])
    report.write(tmp_path, [BASE])
    assert sorted(path.name for path in tmp_path.glob("report*")) == ["report.html", "report.json", "report.md"]
    report.write(tmp_path, [TUNED])
    kept = sorted(path.name for path in tmp_path.glob("report-*"))
    assert [name.split(".")[1] for name in kept] == ["html", "json", "md"]
    assert json.loads((tmp_path / kept[1]).read_text(encoding="utf-8"))["models"][0]["name"] == "base"
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["models"][0]["name"] == "tuned"


def test_a_foreign_report_does_not_stop_a_finished_evaluation(tmp_path):
    (tmp_path / "report.json").write_text("mine", encoding="utf-8")
    report.write(tmp_path, [BASE])
    assert [path.read_text(encoding="utf-8") for path in tmp_path.glob("report-*.json")] == ["mine"]


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_report_of_training_in_the_same_folder_is_kept(tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    report.write(tmp_path, [BASE])
    assert [path.read_text(encoding="utf-8") for path in tmp_path.glob("report-*")] == ["mine"]


def test_reports_of_one_second_are_all_kept(tmp_path):
    for name in ("a", "b", "c"):
        report.write(tmp_path, [model(name, [True, False])])
        os.utime(tmp_path / "report.json", (1e9, 1e9))
    kept = sorted(path.name for path in tmp_path.glob("report-*.json"))
    assert [json.loads((tmp_path / path).read_text(encoding="utf-8"))["models"][0]["name"] for path in kept] == ["b", "a"]
    assert kept == ["report-20010909T014640Z-1.json", "report-20010909T014640Z.json"]


def test_keys_of_other_packages_are_not_in_the_report(tmp_path):
    said = {"judge": "gpt-4o", "judge_key": "very-secret-1", "judge_model_args": {"api_key": "very-secret-2", "max_tokens": 9}}
    options = {
        "models": ["base"],
        "eval_backend": "vlmevalkit",
        "eval_dataset": ["MMStar"],
        "extra_eval_args": said,
        "hub_token": "very-secret-3",
    }
    report.write(tmp_path, [BASE], config=build(EvalConfig, ("flag", options)))
    texts = [(tmp_path / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md", "json")]
    assert not [text for text in texts if "very-secret" in text]
    shown = {"judge": "gpt-4o", "judge_key": "***", "judge_model_args": {"api_key": "***", "max_tokens": 9}}
    assert json.loads(texts[2])["options"]["extra_eval_args"] == shown
