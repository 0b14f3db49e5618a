"""Reads the header of a safetensors file: names, types and shapes of the tensors, without reading a weight."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.errors import ModelError
from swift.files import machine_error

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type such as "F32", its shape, and the bytes of the file from ``begin`` to before ``end``."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (type such as "F32", shape)} of the file at ``path``; raises what ``read_entries`` does."""
    return {name: (entry.dtype, entry.shape) for name, entry in read_entries(path).items()}


def read_entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """{tensor: where it lies} of the file at ``path``.

    Raises ModelError naming the file if it is truncated or corrupt: the header must be whole, each tensor must take the
    bytes that its type and shape need, and the tensors must fill the file without gap or overlap.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise _broken(path, f"the header says {header_bytes} bytes, the file has {size}")
            text = file.read(header_bytes)
    except OSError as problem:
        raise machine_error(problem, path) from problem
    try:
        header = json.loads(text)
    except ValueError:
        raise _broken(path, "the header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    _check_offsets(path, header, size - 8 - header_bytes)
    start = 8 + header_bytes
    return {
        name: Entry(entry["dtype"], tuple(entry["shape"]), *(start + place for place in entry["data_offsets"]))
        for name, entry in header.items()
    }


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this type and shape takes in the file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _check_offsets(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            is_sane = dtype in DTYPE_BITS and all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            is_sane = False
        if not is_sane:
            raise _broken(path, f"the entry of tensor {name!r} makes no sense")
        if end - begin != num_bytes(dtype, shape):
            raise _broken(path, f"tensor {name!r} takes {end - begin} bytes, {dtype} {list(shape)} needs {num_bytes(dtype, shape)}")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _broken(path, f"tensor {name!r} begins at byte {begin}, expected {position}")
        position = end
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "longer than its header says"
        raise _broken(path, f"it is {what}: the tensors take {position} bytes, the file holds {data_bytes}")


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file: {reason}", hint="fetch the file again")
