"""Megatron's chunks as the model of a run: trained as they are, saved as the transformers model that they are parts of."""

from pathlib import Path
from typing import Any

from torch import nn


class Holder(nn.Module):
    """The chunks of this process, and the ``shell``: the transformers model without numbers, which knows how it is saved.

    ``saved_as`` is what knows how a checkpoint is saved: the PeftModel around the shell if an adapter is trained.
    """

    def __init__(self, chunks: list[Any], shell: Any, peft_model: Any = None) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)
        self.shell: Any
        self.saved_as: Any
        object.__setattr__(self, "shell", shell)  # no module of this one: its parameters are not trained
        object.__setattr__(self, "saved_as", peft_model or self)
        self.config = shell.config

    def save_pretrained(self, path: Path, **options: Any) -> None:
        """As transformers saves it; ``state_dict()`` is what the main process has gathered, for as long as it is saved."""
        self.shell.save_pretrained(path, state_dict=self.state_dict(), **options)
