"""Counts what collectives send and what autograd keeps, in bytes, of real passes."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(TorchDispatchMode):
    """Bytes that this process sends to others by all-to-all and to its neighbour, as torch.distributed is asked to."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.size, self.rank = group.size(), group.rank()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d.alltoall_base_"):
            rows, splits = args[1], args[4]
            sizes = splits or [len(rows) // self.size] * self.size
            self.bytes += (sum(sizes) - sizes[self.rank]) * rows[:1].numel() * rows.element_size()
        elif name.startswith("c10d.send"):
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in args[0])
        elif name.startswith("c10d.") and not name.startswith("c10d.recv_"):
            raise AssertionError(f"{name} is not counted")
        return function(*args, **(kwargs or {}))


def kept_bytes(model: Any, function: Any) -> int:
    """Bytes that autograd keeps for the backward pass of ``function``'s result, each storage once; weights are none."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    kept: list[Any] = []  # alive, so that no address comes twice

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(found.values())
