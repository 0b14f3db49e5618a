"""What a safetensors file holds, from its header alone."""

import json
import math
from pathlib import Path

from swift.errors import ModelError

BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}
LARGEST_HEADER = 100_000_000  # bytes: the limit of the format


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type and shape of every tensor in ``path``; ModelError if the file is cut short or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ModelError(f"{path} is cut short or no safetensors file", hint="fetch it again")
            header = json.loads(file.read(length))
            tensors = {name: (item["dtype"], tuple(item["shape"])) for name, item in header.items() if name != "__metadata__"}
            ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is damaged: its header cannot be read", hint="fetch it again") from None
    if max(ends, default=0) != size - 8 - length:
        raise ModelError(f"{path} is cut short: {size} bytes, {8 + length + max(ends, default=0)} expected", hint="fetch it again")
    for name, (dtype, shape) in tensors.items():
        begin, end = header[name]["data_offsets"]
        if dtype in BYTES and math.prod(shape) * BYTES[dtype] != end - begin:
            raise ModelError(f"{path} is damaged: the size of {name} does not fit its shape", hint="fetch it again")
    return tensors


def read_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same for all safetensors files in ``folder``; ModelError if the index names a file that is absent."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, OSError):
            raise ModelError(f"{index} is damaged", hint="fetch it again") from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ModelError(f"{folder} lacks {absent[0]}, which its index names", hint="fetch it again")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        tensors.update(read_header(file))
    return tensors


def bytes_of(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes that the tensors take; packed 4-bit formats count as stored."""
    return sum(math.prod(shape) * BYTES.get(dtype, 1) for dtype, shape in tensors.values())
