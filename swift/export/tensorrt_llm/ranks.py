"""Rank files: safetensors whose tensors are written one after the other, none of them kept in memory."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.hub.safetensors_header import DTYPE_BITS

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class RankFile:
    """One open file. Its tensors are given in the order in which ``shapes`` names them."""

    def __init__(self, file: BinaryIO, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._file = file
        self._left = iter(shapes.items())
        self._dtype = dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name, shape in shapes.items():
            length = torch.Size(shape).numel() * DTYPE_BITS[NAMES[dtype]] // 8
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + length]}
            place += length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """ModelError if a number is too large for the type of the file."""
        assert next(self._left) == (name, tuple(tensor.shape)), f"{name} {tuple(tensor.shape)} is not the next tensor"
        stored = tensor.to(self._dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            wanted = str(self._dtype).removeprefix("torch.")
            raise ModelError(f"{name} holds numbers too large for {wanted}", hint="say --torch_dtype bfloat16; nothing was written")
        self._file.write(stored.view(torch.uint8).flatten().numpy().data)


@contextmanager
def rank_files(folder: Path, shapes: list[dict[str, tuple[int, ...]]], dtype: torch.dtype) -> Iterator[list[RankFile]]:
    """rank0.safetensors and so on in ``folder``, one for each entry of ``shapes``, open together."""
    with ExitStack() as stack:
        yield [
            RankFile(stack.enter_context((folder / f"rank{rank}.safetensors").open("wb")), entry, dtype)
            for rank, entry in enumerate(shapes)
        ]
