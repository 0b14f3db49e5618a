"""Parts put together again, for files that any tool reads, and whole tensors from such files put into the parts."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from swift.errors import CheckpointError


def whole(model: Any, *, only: Callable[[str], bool] | None = None, is_wanted: bool | None = None) -> dict[str, Tensor]:
    """The state of ``model`` with whole tensors on the CPU, in the main process, or where it ``is_wanted``; {} elsewhere.

    All processes come to it.

    One tensor is gathered at a time. Names that share a weight share a tensor here too, so that it is saved once.
    """
    is_main = dist.get_rank() == 0 if is_wanted is None else is_wanted
    dims = _packed_names(model)
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    # Torch 2.13 says of a tensor that two axes split that it is gathered over one after the other.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if only is not None and not only(name):
            continue
        if id(tensor) not in seen:
            full: Any = tensor.detach()
            if isinstance(full, DTensor):
                full = packed(full.full_tensor(), dims.get(name))
            seen[id(tensor)] = full.cpu() if is_main else full.new_empty(0)
        if is_main:
            state[name] = seen[id(tensor)]
    return state


@torch.no_grad()
def fill(model: Any, state: Mapping[str, Tensor]) -> None:
    """Put whole tensors into the parts that ``model`` has of them; every process has ``state``, by the model's names.

    CheckpointError for a name that the model lacks, or another shape.
    """
    dims = _packed_names(model)
    own = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name not in own:
            raise CheckpointError(f"there are weights for {name}, which this model lacks")
        target, given = own[name].detach(), unpacked(tensor, dims.get(name))
        if target.shape != given.shape:
            raise CheckpointError(f"{name} has the shape {tuple(given.shape)}, and this model needs {tuple(target.shape)}")
        if isinstance(target, DTensor):
            shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
            for dim, (length, first) in enumerate(zip(shape, offset, strict=True)):
                given = given.narrow(dim, min(first, given.shape[dim] - length), length)
            target = target.to_local()
        target.copy_(given)


def packed_parameters(module: nn.Module) -> dict[str, int]:
    """{parameter of ``module``: dimension along which it has two parts}. It is kept with a dimension of its own for them.

    Split, each process has a piece of both parts. With one dimension for both that would be two pieces of the whole, which
    checkpoints of torch.distributed cannot describe.
    """
    found: dict[str, int] = vars(module).get("packed_parameters", {})
    return found


def unpacked(tensor: Tensor, dim: int | None) -> Tensor:
    """``tensor`` with the two parts along ``dim`` in a dimension of their own; as it is, if ``dim`` is None."""
    return tensor if dim is None else tensor.unflatten(dim, (2, -1))


def packed(tensor: Tensor, dim: int | None) -> Tensor:
    """The same the other way round."""
    return tensor if dim is None else tensor.flatten(dim, dim + 1)


def packing_dim(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The dimension along which a tensor of one of the two shapes is ``unpacked`` to the other; None if it is not."""
    short, long = sorted((tuple(one), tuple(other)), key=len)
    return next((dim for dim, size in enumerate(short) if (*short[:dim], 2, size / 2, *short[dim + 1 :]) == long), None)


def _packed_names(model: nn.Module) -> dict[str, int]:
    return {f"{place}.{name}": dim for place, module in model.named_modules() for name, dim in packed_parameters(module).items()}
