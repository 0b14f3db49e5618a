"""Writes a GGUF file tensor by tensor: in memory are one tensor of the checkpoint (or the experts of a layer) and its copy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.errors import ModelError
from swift.export.gguf.layout import Layout, Target, targets
from swift.export.gguf.settings import rope_tensors, settings
from swift.hub.safetensors_header import read_header

ROWS_AT_ONCE = 2**24  # numbers that are quantized together
# Tensors that llama.cpp reads only as float32, or quantizes never: routers, positions, what is no matrix.
EXACT = ("ffn_gate_inp", "position_embd", "token_types", "ssm_", "shortconv")


@dataclass(frozen=True)
class Checkpoint:
    """Weights in safetensors files: {name: (file, shape)}."""

    tensors: dict[str, tuple[Path, tuple[int, ...]]]

    @classmethod
    def open(cls, files: list[Path]) -> "Checkpoint":
        return cls({name: (file, tuple(shape)) for file in files for name, (_, shape) in read_header(file).items()})

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.tensors[name][0], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    @property
    def header(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, shape) for name, (_, shape) in self.tensors.items()]


@dataclass(frozen=True)
class Plan:
    """All that goes into a file: the tensors, and keys after the architecture's name."""

    layout: Layout
    targets: list[Target]
    keys: dict[str, Any]
    extra: dict[str, Any]  # tensors that are no weights


def plan(config: Any, layout: Layout, checkpoint: Checkpoint, *, window: bool) -> Plan:
    """What to write of ``checkpoint``. ModelError if a tensor has no place, or the model has one that is not there."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    found = targets(layout, [(name, shape) for name, shape in checkpoint.header if name not in tied])
    wanted = {place.name for name, _ in model.named_parameters() if name not in tied for place in layout.places(name)}
    if lacking := sorted(wanted - {target.name for target in found}):
        raise ModelError(f"the checkpoint lacks {len(lacking)} tensors of the model, the first would be {lacking[0]}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Plan(layout, found, settings(config, found, window=window), rope_tensors(config, int(head)))


def write_gguf(path: Path, plan: Plan, checkpoint: Checkpoint, number_type: str, facts: dict[str, Any]) -> None:
    """Write the new file ``path`` with weights as ``number_type`` (f32, f16, bf16, q8_0, ...); ``facts`` are whole keys.

    ModelError for weights that are no numbers, or too large for the type.
    """
    import gguf

    has_output = any(target.name == "output.weight" for target in plan.targets)
    kinds = {target.name: _kind(target, number_type, has_output) for target in plan.targets}
    with _writer(path, plan.layout.arch) as writer:
        for key, value in {**facts, **{f"{plan.layout.arch}.{key}": value for key, value in plan.keys.items()}}.items():
            _add(writer, key, value)
        for target in plan.targets:
            kind = kinds[target.name]
            writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), _num_bytes(target.shape, kind), raw_dtype=kind)
        for name, values in plan.extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, raw_dtype=gguf.GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target in plan.targets:
            _append(writer, _encode(target, checkpoint, kinds[target.name]))
        for values in plan.extra.values():
            _append(writer, values)
        writer.flush()


@contextmanager
def _writer(path: Path, arch: str) -> Iterator[Any]:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    try:
        yield writer
    finally:
        for file in writer.fout or []:
            file.close()


def _append(writer: Any, values: Any) -> None:
    """The next tensor's bytes, padded. (gguf's own way goes through numpy's tofile, whose error hides a full disk.)"""
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    file.write(memoryview(values).cast("B"))
    writer.write_padding(file, values.nbytes)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bytes) or value:
        writer.add_array(key, value)


def _kind(target: Target, number_type: str, has_output: bool) -> Any:
    """The number format of a tensor; what is wanted is not always possible.

    As llama.cpp does: vectors stay float32; rows that 32 does not divide become float16; the head, which may be the
    embedding, gets 8 bits where the rest has fewer.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = GGMLQuantizationType
    if len(target.shape) < 2 or any(part in target.name for part in EXACT):
        return kinds.F32
    kind = kinds[number_type.upper()]
    if target.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return kinds.F16
    is_head = target.name == "output.weight" or (not has_output and target.name == "token_embd.weight")
    return kinds.Q8_0 if is_head and number_type.startswith("q") else kind


def _num_bytes(shape: tuple[int, ...], kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    numbers, num_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // numbers * num_bytes


def _encode(target: Target, checkpoint: Checkpoint, kind: Any) -> Any:
    """The bytes of a tensor of the file."""
    values = _laid_out(target, checkpoint)
    rows = values.reshape(-1, target.shape[-1])
    step = max(ROWS_AT_ONCE // target.shape[-1], 1)
    encoded = np.empty(_num_bytes(target.shape, kind), dtype=np.uint8)
    place = 0
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step].float()
        data = _numbers(part, kind, target)
        encoded[place : place + len(data)] = data
        place += len(data)
    assert place == len(encoded)
    return encoded


def _laid_out(target: Target, checkpoint: Checkpoint) -> Tensor:
    parts = []
    for source in target.sources:
        values = checkpoint.read(source.name)
        if source.place.half is not None:
            values = values.chunk(2, dim=-2)[source.place.half]
        parts.append(target.arrangement.apply(values))
    values = torch.stack(parts) if target.sources[0].place.expert is not None else parts[0]
    assert tuple(values.shape) == target.shape, target
    return values


def _numbers(values: Tensor, kind: Any, target: Target) -> Any:
    """float32 ``values`` in the format ``kind``, as bytes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if not torch.isfinite(values).all():
        raise ModelError(f"{target.sources[0].name} holds NaN or infinity", hint="the training may have diverged")
    if kind == GGMLQuantizationType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
        raise ModelError(f"{target.sources[0].name} holds values that are too large for f16", hint="say --gguf_type bf16")
    return np.ascontiguousarray(quantize(values.numpy(), kind)).reshape(-1).view(np.uint8)
