"""What the packages of the project may import, how large a module may be, and what --help may cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "numpy", "pyarrow", "huggingface_hub", "modelscope_hub", "datasets", "matplotlib", "gguf")


def test_imports_go_in_one_direction(tmp_path):
    words = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    words += ["--config", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_a_module_has_fewer_than_400_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "swift").rglob("*.py")}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


@pytest.mark.parametrize(
    "statement",
    [
        "import swift; dir(swift)",
        "import swift.cli; swift.cli.overview()",
        "import swift.cli; swift.cli.run(['sft', '--help'])",
        "import swift.cli; swift.cli.run(['sft', '--model', 'm', '--dataset', 'd', '--lora_rank', '16'], show_config=True)",
        "from swift.config import commands, flags; flags.make_parser(commands.SftConfig, 'sft', 'fine-tune')",
    ],
)
def test_help_and_options_import_no_heavy_package(statement):
    code = f"{statement}\nimport json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
