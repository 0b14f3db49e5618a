"""The root of a model that DeepSpeed sees: forward passes are functions of it, and names are the model's own."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class Entry(nn.Module):
    """Runs any function of ``model`` as one forward pass, so that hooks on the root are around it.

    Its parameters have the names that they have in ``model``: checkpoints are the model's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any]:
        return (function(*arguments),)  # ZeRO-3 looks for tensors in tuples, lists and dicts, and takes nothing else

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters(prefix, True, remove_duplicate) if recurse else iter(())
