"""A cache of its own and a loopback hub for each test, as for the hubs; a real exporter that is small enough to follow."""

import json
import shutil

import pytest
import torch

from swift.export import EXPORTERS
from swift.model.artifact import Artifact
from tests.hub.conftest import loopback, own_cache, point_at

__all__ = ["half", "loopback", "own_cache", "point_at"]


class Half:
    """Writes float16 safetensors, and reads them back by transformers in a model of its own; ``noise`` spoils the weights."""

    noise = 0.0

    def check(self, model, config):
        self.checked = model

    def run(self, model, config, folder):
        from safetensors.torch import load_file, save_file

        for file in model.path.iterdir():
            if file.suffix in (".json", ".jinja") and file.name not in ("merge.json", "swift-snapshot.json"):
                shutil.copy(file, folder)
        for file in model.weight_files:
            tensors = {name: (tensor + self.noise * torch.randn_like(tensor)).half() for name, tensor in load_file(file).items()}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"dtype": "float16"}))
        return Artifact(folder, "float16 safetensors", tuple(file.name for file in model.weight_files))

    @torch.no_grad()
    def verify(self, artifact, reference, config):
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
        return reference.compare(f"transformers {transformers.__version__}", lambda piece: model(input_ids=torch.tensor([piece])).logits[0])


@pytest.fixture
def half(monkeypatch):
    """The exporter, registered as a plug-in would be: --to half."""
    monkeypatch.setattr(EXPORTERS, "_members", dict(EXPORTERS._members))
    return EXPORTERS.register("half")(Half())
