"""The demo runs from its first command to its last, on a model that is too small to learn anything."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("demo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_demo_trains_merges_quantizes_and_evaluates_four_models(demo, tiny_model, tmp_path, monkeypatch, capsys):
    small = "snow-alerts:train#8 --max_length 1024 --report_samples 0 --report_to none --max_steps 2"
    train = " ".join(demo.TRAIN).replace(demo.MODEL, str(tiny_model)).replace("snow-alerts:train#96", small)
    monkeypatch.setattr(demo, "TRAIN", shlex.split(train.replace("--report_samples 2", "").replace("--num_train_epochs 1", "")))
    monkeypatch.setattr(demo, "QUANTIZE", [*demo.QUANTIZE, "--group_size", "32"])
    monkeypatch.setattr(
        demo, "EVALUATE", [*shlex.split("--eval_dataset snow-alerts --eval_limit 2 --temperature 0"), "--max_new_tokens", "8"]
    )
    monkeypatch.setattr(demo, "MODEL", str(tiny_model))
    monkeypatch.setattr(sys, "argv", ["demo", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="the validation loss fell to"):
        demo.main()
    shown = capsys.readouterr().out
    assert "AWQ, 4 bits" in shown
    assert "What to try next" in shown
    assert len(list((tmp_path).rglob("report.html"))) == 1
