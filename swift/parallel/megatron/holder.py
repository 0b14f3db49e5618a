"""Megatron's chunks as the model of a run: trained as they are, saved as the transformers model that they are parts of."""

from pathlib import Path
from typing import Any

from torch import nn


class Holder(nn.Module):
    """The chunks of this process, and the ``shell``: the transformers model without numbers, which knows how it is saved."""

    def __init__(self, chunks: list[Any], shell: Any) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.shell: Any
        object.__setattr__(self, "shell", shell)  # no module of this one: its parameters are not trained
        self.config = shell.config

    def save_pretrained(self, path: Path, **options: Any) -> None:
        """As transformers saves it; ``state_dict()`` is what the main process has gathered, for as long as it is saved."""
        self.shell.save_pretrained(path, state_dict=self.state_dict(), **options)
