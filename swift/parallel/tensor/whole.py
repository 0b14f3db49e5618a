"""Parts put together again, for files that any tool reads."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor


def whole(model: Any, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The state of ``model`` with whole tensors on the CPU, in the main process; {} elsewhere. All processes come to it.

    One tensor is gathered at a time. Names that share a weight share a tensor here too, so that it is saved once.
    """
    is_main = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if only is not None and not only(name):
            continue
        if id(tensor) not in seen:
            full: Any = tensor.detach()
            if isinstance(full, DTensor):
                full = full.full_tensor()
            seen[id(tensor)] = full.cpu() if is_main else full.new_empty(0)
        if is_main:
            state[name] = seen[id(tensor)]
    return state
