"""What becomes of an adapter: the merged folder is whole when it appears, and formats are written as for a model without one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from swift.api import export_model, sft
from swift.errors import MachineError
from tests.tiny import make_model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def adapter(rows, tmp_path):
    """The checkpoint of a run on a model in bfloat16 that brings a licence."""
    base = make_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (base / "LICENSE").write_text("Do what you like.\n")
    options = {"max_steps": 1, "output_dir": str(tmp_path / "run"), "add_version": False, "report_to": "none", "report_samples": 0}
    return sft(model=str(base), dataset=str(rows), **options).checkpoint


def test_a_checkpoint_for_tensorrt_llm_has_the_precision_of_the_model_that_the_adapter_belongs_to(adapter, tmp_path):
    folder = export_model(adapters=str(adapter), to="tensorrt_llm", output_dir=str(tmp_path / "out"), quant_eval_samples=0)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_licence_of_the_model_stands_in_the_modelfile_and_in_the_file(adapter, tmp_path):
    from gguf import GGUFReader

    folder = export_model(adapters=str(adapter), to="ollama", output_dir=str(tmp_path / "out"), quant_eval_samples=0)
    (file,) = folder.glob("*.gguf")
    assert GGUFReader(file).fields["general.license"].contents() == "apache-2.0"
    assert 'LICENSE """Do what you like."""' in (folder / "Modelfile").read_text()


def test_a_merged_folder_appears_with_its_card_or_not_at_all(adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = names(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(MachineError, match="No space left"):
        patch.setattr("swift.export.run.finish_merge", full)
        export_model(adapters=str(adapter), output_dir=str(tmp_path / "merged"))
    assert names(tmp_path) == before
    folder = export_model(adapters=str(adapter), output_dir=str(tmp_path / "merged"))
    assert {"README.md", "audit.jsonl", "model.safetensors"} <= set(names(folder))
    assert names(tmp_path) == sorted([*before, "merged"])
