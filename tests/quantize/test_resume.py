"""A run that was killed goes on where it was, and nothing else does."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swift.export.folder import REPORT_FILE, partial_folder
from tests.families import build
from tests.quantize.runs import ROWS, quantize, wide
from tests.tiny import make_tokenizer

ROOT = Path(__file__).parents[2]


def experts(path: Path) -> Path:
    """A model of which some tokens reach few experts."""
    size = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 320, "head_dim": 16}
    size |= {"num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 1, "max_position_embeddings": 512}
    build("qwen3_moe", **size, bos_token_id=None, eos_token_id=2, pad_token_id=3).save_pretrained(path)
    make_tokenizer(path)
    return path


def killed(model: Path, rows: Path, out: Path, method: str) -> None:
    """A run of ``quantize`` that died when its third block was done."""
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from swift.quantize.progress import Progress\n"
        "done = Progress.done\n"
        "def kill(self, index, errors):\n"
        "    done(self, index, errors)\n"
        "    if index == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Progress.done = kill\n"
        "from tests.quantize.runs import quantize\n"
        "from pathlib import Path\n"
        "quantize(*map(Path, sys.argv[2:5]), bare=True, quant_method=sys.argv[5], group_size=32)\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(model), str(rows), str(out), method], cwd=ROOT, capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not out.exists()
    assert partial_folder(out).is_dir()


@pytest.mark.parametrize(("make", "method"), [(wide, "gptq"), (experts, "awq")])
def test_a_killed_run_goes_on_and_gives_the_same_files(make, method, tmp_path, rows, capsys):
    model = make(tmp_path / "m", **({"num_hidden_layers": 6} if make is wide else {}))
    whole = quantize(model, rows, tmp_path / "whole", bare=True, quant_method=method, group_size=32)
    out = tmp_path / "killed"
    killed(model, rows, out, method)
    (partial_folder(out) / "model-00001-of-00009.safetensors").write_bytes(b"of a run that had come to its end")
    quantize(model, rows, out, bare=True, quant_method=method, group_size=32)
    assert "going on at block 4" in capsys.readouterr().out
    assert len(list(out.glob("*.safetensors"))) == 1
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    reports = [json.loads((folder / REPORT_FILE).read_text()) for folder in (whole, out)]
    assert reports[0]["kl"] == reports[1]["kl"]
    assert reports[0]["worst_layers"] == reports[1]["worst_layers"]
    assert not partial_folder(out).exists()


def test_other_options_do_not_go_on_with_what_a_killed_run_left(tmp_path, rows, capsys):
    model = wide(tmp_path / "m")
    work = partial_folder(tmp_path / "q") / ".work"
    work.mkdir(parents=True)
    (work / "state.json").write_text(json.dumps({"key": "another", "block": 1, "errors": {}}))
    (work.parent / "stray").write_text("x")
    out = quantize(model, rows, tmp_path / "q")
    assert not (out / "stray").exists()
    assert not (out / ".work").exists()
    assert "going on" not in capsys.readouterr().out


def test_other_text_does_not_go_on_with_what_a_killed_run_left(tmp_path, rows, capsys):
    """The file has the same name, and other rows: hidden states of the old ones lie in the folder."""
    model = wide(tmp_path / "m", num_hidden_layers=4)
    out = tmp_path / "q"
    killed(model, rows, out, "gptq")
    rows.write_text("\n".join(json.dumps(row) for row in ROWS[::-1]), encoding="utf-8")
    quantize(model, rows, out, bare=True, quant_method="gptq", group_size=32)
    assert "going on" not in capsys.readouterr().out
