"""Forward passes of layers that processes share.

Parameters are DTensors, and modules compute with this process's part of them: plain tensors, on which any kernel works.
What crosses processes is said by swift.model.collectives.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from swift.model.collectives import Group, gather_last, split_last, sum_gradient, sum_parts
from swift.model.vocabulary import VocabularyPart, local
from swift.parallel.tensor.whole import packed, packed_parameters


class Entrance:
    """Where a tensor that all processes have enters layers of which each has a part: its gradient is summed once for all of them."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._last: tuple[Tensor, Tensor] | None = None

    def enter(self, x: Tensor) -> Tensor:
        """``x``, with the gradient of all processes; layers that read the same tensor one after the other share the sum."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self._last is None or self._last[0] is not x:
            self._last = (x, sum_gradient(x, self.group))
        return self._last[1]

    def leave(self) -> None:
        """Let go of the last tensor, which nothing reads any more."""
        self._last = None


class Local:
    """Takes the place of a module's forward method: its own, with this process's part of the module's parameters.

    ``is_partial``: they are replicated but see a part of the work, so that their gradients are summed.
    """

    def __init__(self, module: nn.Module, group: Group, *, is_partial: bool = False) -> None:
        self.module, self.group, self.is_partial = module, group, is_partial
        self.original: Any = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters: dict[str, Any] = self.module._parameters
        kept = {name: parameter for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
        dims = packed_parameters(self.module)
        parameters.update((name, packed(self.part(parameter), dims.get(name))) for name, parameter in kept.items())
        try:
            return self.original(*args, **kwargs)
        finally:
            parameters.update(kept)

    def part(self, parameter: Tensor) -> Tensor:
        return sum_gradient(local(parameter), self.group) if self.is_partial else local(parameter)


class Columns(Local):
    """A linear layer that gives this process's outputs, or all of them (``gathers``) of ``size``."""

    def __init__(self, layer: nn.Module, entrance: Entrance, *, gathers: bool, vocabulary: VocabularyPart | None = None) -> None:
        super().__init__(layer, entrance.group)
        self.entrance, self.gathers, self.vocabulary = entrance, gathers, vocabulary
        self.size: int = layer.out_features  # type: ignore[assignment]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.vocabulary is not None and not self.vocabulary.is_gathered:
            return self.compute(x, *args, **kwargs)
        out = self.compute(self.entrance.enter(x), *args, **kwargs)
        if self.gathers:
            self.entrance.leave()
            out = gather_last(out, self.group, self.size)
        return out

    def compute(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of a layer itself, or of LoRA around one, whose own layers are split."""
        weight = getattr(self.module, "weight", None) if isinstance(self.module, nn.Linear) else None
        if isinstance(weight, Tensor):
            return _linear(self.module, x)
        out: Tensor = self.original(x, *args, **kwargs)
        return out


class Plain(Local):
    """A linear layer of this process alone, between an entrance and a sum that others see to."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x, self.part(self.module.weight), self.bias())  # type: ignore[arg-type]

    def bias(self) -> Tensor | None:
        bias: Any = self.module.bias
        return None if bias is None else self.part(bias)


class Rows(Local):
    """A linear layer whose inputs are spread over the processes, and whose outputs are summed."""

    def __init__(self, layer: nn.Module, entrance: Entrance) -> None:
        super().__init__(layer, entrance.group)
        self.entrance = entrance

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.entrance.leave()
        out = sum_parts(F.linear(x, self.part(self.module.weight)), self.group)  # type: ignore[arg-type]
        bias: Any = self.module.bias
        return out if bias is None else out + self.part(bias)


class SplitInput(Local):
    """A layer whose inputs all processes have, each of which takes its part."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.original(split_last(x, self.group), *args, **kwargs)


class Embedding(Local):
    """An embedding of which this process has some rows; a token that is not among them is another's."""

    def __init__(self, module: nn.Embedding, group: Group) -> None:
        super().__init__(module, group)
        self.rows = VocabularyPart(module.num_embeddings, group)
        padding = module.padding_idx
        if padding is not None:  # the row that gets no gradient has another number here
            here = padding - self.rows.first
            module.padding_idx = here if 0 <= here < self.rows.size else None

    def __call__(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places, is_here = self.rows.places(ids)
        found: Tensor = super().__call__(places, *args, **kwargs)
        return sum_parts(found * is_here.unsqueeze(-1).to(found.dtype), self.group)


class Experts(Local):
    """Experts of each of which this process has a part: the tokens and their weights enter, and outputs are summed."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        routed = [sum_gradient(each, self.group) if each.is_floating_point() else each for each in args]
        out: Tensor = super().__call__(sum_gradient(hidden, self.group), *routed, **kwargs)
        return sum_parts(out, self.group)


class RotaryKey(Local):
    """The layer of latent attention (MLA) whose last ``width`` outputs are the key that all heads rotate.

    The rest enters a split layer, which sums its gradient; these go to this process's heads as they are.
    """

    def __init__(self, layer: nn.Module, group: Group, width: int) -> None:
        super().__init__(layer, group)
        self.width = width

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().__call__(*args, **kwargs)
        latent, key = out.split([out.shape[-1] - self.width, self.width], dim=-1)
        return torch.cat([latent, sum_gradient(key, self.group)], dim=-1)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, local(layer.weight), None if layer.bias is None else local(layer.bias))
