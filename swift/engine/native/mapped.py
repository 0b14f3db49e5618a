"""Files of weights that are mapped into memory: what was read of them counts as memory of the process until it is let go."""

import contextlib
import ctypes
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from swift.model.quantized.linear import QuantizedLinear

MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...p [0-9a-f]+ \S+ [1-9]\d* +.*\.safetensors$")


class MappedWeights:
    """The mapped files of this process whose pages are as they are in the file, so that the system can read them again.

    A file that anything was written over in memory is none of them. Empty where the system does not tell.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        with contextlib.suppress(OSError):
            self._ranges = _unchanged(Path("/proc/self/smaps").read_text(errors="replace"))

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in one of them: what is not read of it takes no memory."""
        return any(begin <= tensor.data_ptr() < end for begin, end in self._ranges)

    def let_go(self, tensor: Tensor | None = None) -> None:
        """The pages of all files, or those that contiguous ``tensor`` alone lies in. They are read again when somebody asks for them."""
        for begin, end in self._ranges:
            if tensor is not None:
                first = tensor.data_ptr()
                last = first + tensor.numel() * tensor.element_size()  # of a contiguous one
                begin, end = max(begin, -(-first // mmap.PAGESIZE) * mmap.PAGESIZE), min(end, last // mmap.PAGESIZE * mmap.PAGESIZE)
            if begin < end:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)


def lies_in_files(model: Any) -> bool:
    """Whether all weights of ``model`` are numbers in mapped files, as they are there."""
    if getattr(model, "is_quantized", False) or any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return False
    files = MappedWeights()
    return all(files.holds(weight) for weight in model.parameters())


@contextlib.contextmanager
def layer_by_layer(model: Any) -> Iterator[MappedWeights]:
    """Within, a module's own mapped weights are let go when it has computed: those of one at a time take memory.

    Each pass finds them in the file again, for which the system keeps a copy as long as nobody else needs the memory. A page
    takes less than a microsecond then, so a pass of hundreds of tokens is not slower.
    """
    files = MappedWeights()

    def let_go(module: Any, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight.is_contiguous():
                files.let_go(weight)

    own = [module for module in model.modules() if any(files.holds(weight) for weight in module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(let_go) for module in own]
    try:
        yield files
    finally:
        for hook in hooks:
            hook.remove()
        files.let_go()


def _unchanged(smaps: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    current: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if (matched := _MAPPING.match(line)) is not None:
            current = int(matched[1], 16), int(matched[2], 16)
        elif line[:1].islower() or line[:1].isdigit():
            current = None
        elif current is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            found.append(current)
    return found
