"""Tensors of a model on disk, read one by one, and written so that no more than one is in memory."""

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.errors import ConfigError, ModelError
from swift.files import machine_error, reserve, write_json
from swift.hub.safetensors_header import Entry, num_bytes, read_entries
from swift.model.artifact import ModelFolder
from swift.model.finite import is_finite

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PART = 2**24  # bytes of a large tensor that are looked at, or copied, at once
INDEX_FILE = "model.safetensors.index.json"
Source = tuple[Path, Entry]
"""A tensor and its file."""


class Checkpoint:
    """The tensors in the safetensors files of a folder. Nothing is mapped into memory: what is read is a copy."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.sources: dict[str, Source] = {name: (file, entry) for file in files for name, entry in read_entries(file).items()}

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def read(self, name: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor ``name`` as it is stored, or some of its rows. ModelError if a number in it is not finite."""
        file, entry = self.sources[name]
        if rows is None:
            tensor = read_bytes(file, entry.begin, entry.end).view(DTYPES[entry.dtype]).reshape(entry.shape)
        else:
            indices = range(entry.shape[0])[rows] if isinstance(rows, slice) else rows.tolist()
            width = (entry.end - entry.begin) // max(1, entry.shape[0])
            tensor = torch.empty(len(indices), *entry.shape[1:], dtype=DTYPES[entry.dtype])
            flat = tensor.view(torch.uint8).view(len(indices), width)
            for begin, end, first in _runs(indices):
                flat[begin:end] = read_bytes(file, entry.begin + first * width, entry.begin + (first + end - begin) * width).view(-1, width)
        if not is_finite(tensor):
            raise ModelError(f"{file}: tensor {name} holds numbers that are not finite", hint="the model is damaged; nothing was written")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sources[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.sources[name][1].dtype]


def read_bytes(file: Path, begin: int, end: int) -> Tensor:
    """(end - begin,) uint8."""
    made = torch.empty(end - begin, dtype=torch.uint8)
    view = memoryview(made.numpy().data)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while len(view):
                count = stream.readinto(view)
                if not count:
                    raise ModelError(f"{file} became shorter while it was read")
                view = view[count:]
    except OSError as problem:
        raise machine_error(problem, file) from problem
    return made


def _runs(indices: Any) -> Iterable[tuple[int, int, int]]:
    """(begin, end, first): ``indices[begin:end]`` are ``first``, ``first`` + 1, ..."""
    begin = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield begin, place, int(indices[begin])
            begin = place


def assemble(folder: Path, parts: dict[str, Source], max_bytes: int, casts: dict[str, torch.dtype]) -> tuple[str, ...]:
    """Write the tensors ``parts`` into ``folder`` as model.safetensors, or as several files of at most ``max_bytes`` with an index.

    Returns the names of the files. Bytes are copied as they are, but for those of ``casts``, which get another type of number;
    ModelError if a number among them is not finite.
    """
    shards: list[dict[str, Source]] = [{}]
    size = 0
    for name, (file, entry) in parts.items():
        length = _length(entry, casts.get(name))
        if shards[-1] and size + length > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (file, entry)
        size += length
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, casts)
    if count > 1:
        total = sum(_length(entry, casts.get(name)) for name, (_, entry) in parts.items())
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    return tuple(names)


def _length(entry: Entry, cast: torch.dtype | None) -> int:
    """Bytes of a tensor in the new file."""
    return entry.end - entry.begin if cast is None else num_bytes(NAMES[cast], entry.shape)


def _write_shard(path: Path, shard: dict[str, Source], casts: dict[str, torch.dtype]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (_, entry) in shard.items():
        length = _length(entry, casts.get(name))
        dtype = NAMES[casts[name]] if name in casts else entry.dtype
        header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [place, place + length]}
        place += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        reserve(file.fileno(), 8 + len(text) + place)
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (source, entry) in shard.items():
            for begin in range(entry.begin, entry.end, PART):
                part = read_bytes(source, begin, min(entry.end, begin + PART))
                part = part.view(DTYPES[entry.dtype])
                if name in casts:
                    part = part.to(casts[name])
                if not is_finite(part):
                    raise ModelError(
                        f"{source}: tensor {name} holds numbers that are not finite, or too large for {header[name]['dtype']}",
                        hint="nothing was written",
                    )
                file.write(part.view(torch.uint8).numpy().data)


def model_checkpoint(model: ModelFolder) -> Checkpoint:
    """The tensors of ``model``; ModelError if it has no safetensors."""
    if not model.weight_files:
        raise ModelError(f"{model.path} holds no safetensors", hint="convert the model with save_pretrained first")
    return Checkpoint(model.weight_files)


def size_in_bytes(text: str) -> int:
    """Of "5GB", "500MB", "2GiB"; ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"--max_shard_size takes a size such as 5GB, not {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
