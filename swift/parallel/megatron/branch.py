"""The update of one of Megatron-Core's linear layers: low-rank factors for each of the linear layers that it is made of.

Beside y = x W^T stands x A^T B^T. Where W lies below one another (query, key and value; gate and up), each has its own A and
B, as PEFT keeps them: here all A are one matrix of R rows, and the B are the blocks of one of R columns, in Megatron's order.

W whose outputs are spread (column parallel): every process has A, and of B the rows of its outputs. W whose inputs are spread
(row parallel): every process has of A the columns of its inputs, and B. Either way what processes tell one another are R
numbers for each token, between A and B, so that the gradients of what all processes have are whole in each. But for processes
that share the tokens between matrices (Megatron's sequence parallelism): there they are parts of a sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm

from swift.parallel.megatron import package
from swift.parallel.megatron.layout import Dims, Operation

# t tokens of a row (here), B rows, I inputs, O outputs of this process, R ranks of all parts


@dataclass(frozen=True)
class Part:
    """One of the linear layers of transformers that make one of Megatron's."""

    name: str  # without those of the modules that it is in
    rows: int  # its outputs in this process
    rank: int = 0  # 0: it has no adapter
    scaling: float = 1.0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Place:
    """How the weight beside which a branch stands is spread over the processes of ``group``."""

    group: Any
    inputs: int  # in this process
    is_row: bool  # its inputs are spread, not its outputs
    shares_tokens: bool = False


class Branch(nn.Module):
    """x A^T B^T, scaled, of the parts of one linear layer; ``order`` puts rows of the parts into the layer's order."""

    def __init__(self, parts: Sequence[Part], place: Place, *, dropout: float, order: Operation, dims: Dims) -> None:
        """``dims`` are those of this process."""
        super().__init__()
        self.parts, self.place, self.dropout, self.order, self.dims = list(parts), place, dropout, order, dims
        self.is_on = True
        known = [part for part in parts if part.rank]
        self.lora_A = nn.ParameterDict({part.name: _empty(part.rank, place.inputs, part) for part in known})
        self.lora_B = nn.ParameterDict({part.name: _empty(part.rows, part.rank, part) for part in known})
        for parameter in (self.lora_B if place.is_row else self.lora_A).values():
            parameter.sequence_parallel = place.shares_tokens  # each process has the gradient of its tokens: sum_gradients adds them

    def attach(self, layer: Any) -> None:
        """Add to what ``layer`` gives: (t, B, O) and perhaps a bias that is added later."""
        layer.adapter = self
        layer.register_forward_hook(self._add)

    def forward(self, x_tBI: Tensor) -> Tensor:
        """(t, B, O); the same in all processes if W is row parallel."""
        kept, share = self._drop(x_tBI)
        a_RI = torch.cat([self.lora_A[part.name] for part in self.parts if part.rank]).to(x_tBI.dtype)  # a ParameterDict sorts
        middle_tBR = self._exchange(linear(kept, a_RI) / share)
        return linear(middle_tBR, self.joined_b().to(x_tBI.dtype))

    def joined_b(self) -> Tensor:
        """(O, R): the scaled B of each part in the columns of its A, rows in Megatron's order."""
        total, at, blocks = sum(part.rank for part in self.parts), 0, []
        for part in self.parts:
            if part.rank:
                blocks.append(pad(self.lora_B[part.name] * part.scaling, (at, total - at - part.rank)))
                at += part.rank
            else:
                blocks.append(next(iter(self.lora_B.values())).new_zeros(part.rows, total))
        if len(blocks) == 1:  # one matrix in transformers too: its rows are in Megatron's order already
            return blocks[0]
        return self.order.to_mcore(torch.cat(blocks), self.dims)

    def _exchange(self, middle: Tensor) -> Tensor:
        regions, place = package.part("tensor_parallel.mappings"), self.place
        if place.shares_tokens:
            if place.is_row:
                found: Tensor = regions.reduce_scatter_to_sequence_parallel_region(middle, group=place.group)
            else:
                found = regions.gather_from_sequence_parallel_region(middle, tensor_parallel_output_grad=True, group=place.group)
        elif place.is_row:
            found = regions.reduce_from_tensor_model_parallel_region(middle, group=place.group)
        else:
            found = regions.copy_to_tensor_model_parallel_region(middle, group=place.group)
        return found

    def _drop(self, x: Tensor) -> tuple[Tensor, float]:
        """(``x`` of which a share is zero, the share that is left).

        The seed is drawn by the generator of the CPU, which a step seeds alike in the processes that share a layer, and which
        recomputation puts back. Processes with the same numbers drop the same ones; those with others draw for themselves.
        """
        if not self.training or self.dropout == 0:
            return x, 1.0
        seed = int(torch.randint(2**62, ()))
        own = self.place.group.rank() if self.place.is_row or self.place.shares_tokens else 0
        generator = torch.Generator(x.device).manual_seed(seed + own)
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.dropout, generator=generator)
        return x * kept, 1 - self.dropout

    def _add(self, layer: Any, given: tuple[Tensor, ...], output: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.is_on:
            return None
        return (output[0] + self(_normed(layer, given[0])), *output[1:])


def _normed(layer: Any, x: Tensor) -> Tensor:
    """What ``layer`` multiplies: Transformer Engine has the norm before a column parallel layer within it."""
    weight = getattr(layer, "layer_norm_weight", None)
    return x if weight is None else rms_norm(x, (x.shape[-1],), weight, layer.eps)


def _empty(rows: int, columns: int, part: Part) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns, dtype=part.dtype))
