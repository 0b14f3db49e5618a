"""Activations on disk: as many numbers as a long calibration has, in the memory of one batch."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from swift.files import reserve

LEAST, MOST = 0.25, 2.0**15  # float16 holds 65504, and 11 bits of what is above 6e-5


class Store:
    """One tensor of ``dtype`` for each batch, of any shape, in a file. What is read is a copy.

    Numbers in float16 are divided by a power of two, so that the largest of a batch is within its range.
    The bytes of the file are kept in the page cache of the system, which it takes back when it needs memory.
    """

    def __init__(self, path: Path, sizes: list[int], dtype: torch.dtype = torch.float32) -> None:
        """``sizes`` are the most numbers of each batch. An OSError says if the disk is too small, before anything is computed."""
        self.path = path
        self.dtype = dtype
        self._width = torch.empty(0, dtype=dtype).element_size()
        self._places = [0]
        for size in sizes:
            self._places.append(self._places[-1] + size * self._width)
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._scales: dict[int, float] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        reserve(self._file, self._places[-1])

    def write(self, index: int, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu()
        if self.dtype == torch.float16:
            low, high = torch.aminmax(tensor)
            largest = max(-float(low), float(high), 1e-30)
            if not LEAST < largest < MOST:
                self._scales[index] = 2.0 ** math.ceil(math.log2(largest / MOST))
                tensor = tensor / self._scales[index]
        stored = tensor.to(self.dtype).contiguous()
        if stored.numel() * self._width > self._places[index + 1] - self._places[index]:
            raise ValueError(f"batch {index} has {stored.numel()} numbers, more than its place holds")
        self._shapes[index] = tuple(tensor.shape)
        view, place = memoryview(stored.view(torch.uint8).flatten().numpy().data), self._places[index]
        while len(view):
            count = os.pwrite(self._file, view, place)
            view, place = view[count:], place + count

    def found(self, shapes: list[tuple[int, ...]]) -> None:
        """Every batch was written before, by another process, in these shapes."""
        self._shapes = dict(enumerate(shapes))

    def read(self, index: int) -> Tensor:
        """What was written for batch ``index``, in float32."""
        tensor = torch.empty(self._shapes[index], dtype=self.dtype)
        view, place = memoryview(tensor.view(torch.uint8).flatten().numpy().data), self._places[index]
        while len(view):
            count = os.preadv(self._file, [view], place)
            if not count:
                raise EOFError(f"{self.path} is too short")
            view, place = view[count:], place + count
        made = tensor.float()
        return made.mul_(self._scales[index]) if index in self._scales else made

    def __contains__(self, index: object) -> bool:
        return index in self._shapes

    def close(self) -> None:
        os.close(self._file)
