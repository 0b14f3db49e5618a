"""Weights in files that all processes of a machine map, in place of memory that each has for itself.

A weight that a safetensors file holds as the model needs it is mapped when it is loaded: its pages belong to the file, are
the same for all processes, and can go when memory is short. What loading computes is private memory: another precision,
codes of few bits, experts joined in one tensor. Here such a weight is written to a file as soon as a module has it, and mapped
in its place, so that a process that loads a model to keep a part of it never holds all of it. Pages are copied on write:
what a process changes is its own.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from swift.files import explain_os_errors

LEAST = 2**16  # bytes; smaller tensors stay in memory
MAPS = Path("/proc/self/maps")
# transformers reads the files in threads that run ahead: whole models wait in memory to be put into the modules.
ONE_AT_A_TIME = "HF_DEACTIVATE_ASYNC_LOAD"


class MappedWeights:
    """A folder of such files. Processes that put the same tensors into it, in the same order, share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def put(self, tensor: Tensor) -> Tensor:
        """``tensor`` as it lies in a file, which whoever comes first writes. MachineError if the disk is full."""
        numbers = tensor.detach().contiguous().view(-1)
        path, own = self.folder / str(self.count), self.folder / f"{self.count}.{os.getpid()}"
        self.count += 1
        if path.is_file() and torch.equal(_mapped(path, numbers).view(torch.uint8), numbers.view(torch.uint8)):
            return _mapped(path, numbers).view(tensor.shape)
        with explain_os_errors(own):
            numbers.view(torch.uint8).numpy().tofile(own)
            if not path.exists():
                own.replace(path)
        return _mapped(path if not own.exists() else own, numbers).view(tensor.shape)

    def keep(self, module: nn.Module) -> None:
        """Map the parameters of ``module`` that are private memory."""
        for parameter in module.parameters():
            self._keep(parameter)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within, each parameter is mapped as soon as a module has it, and so are those of a module that takes another's place."""
        handles = [
            register_module_parameter_registration_hook(lambda module, name, parameter: self._keep(parameter)),
            register_module_module_registration_hook(lambda module, name, child: self.keep(child) if child is not None else None),
        ]
        before = os.environ.get(ONE_AT_A_TIME)
        os.environ[ONE_AT_A_TIME] = "1"
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del os.environ[ONE_AT_A_TIME]
            os.environ |= {} if before is None else {ONE_AT_A_TIME: before}

    def _keep(self, parameter: Any) -> None:
        if parameter is None:
            return
        if is_private(parameter.data):
            parameter.data = self.put(parameter.data)
        scales = getattr(parameter, "quant_state", None)  # of bitsandbytes, which keeps them beside the codes
        if scales is not None and is_private(scales.absmax):
            scales.absmax = self.put(scales.absmax)


def is_private(tensor: Tensor) -> bool:
    """Whether ``tensor`` takes up main memory of this process alone, and enough of it to matter."""
    is_large = tensor.device.type == "cpu" and not isinstance(tensor, DTensor) and tensor.nbytes >= LEAST
    return is_large and not is_mapped(tensor)


def is_mapped(tensor: Tensor) -> bool:
    """Whether ``tensor`` lies in a file that is mapped; False where the system does not tell."""
    if tensor.device.type != "cpu" or isinstance(tensor, DTensor) or not MAPS.exists():
        return False
    address = tensor.data_ptr()
    for line in MAPS.read_text().splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        begin, end = (int(text, 16) for text in span.split("-"))
        if begin <= address < end:
            return inode != "0"
    return False


def _mapped(path: Path, like: Tensor) -> Tensor:
    """The file in ``path``, in the precision of ``like`` (n,); what is written to it is this process's own."""
    return torch.from_file(str(path), shared=False, size=len(like), dtype=like.dtype)
