"""Which tensors of a Hugging Face checkpoint make which of Megatron-Core's. The rules are data: names.json."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.errors import ModelError
from swift.parallel.megatron.layout import OPERATIONS, Dims, Operation

# Buffers that older checkpoints hold: computed from the configuration.
COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
STACKED = re.compile(r"(.*)\[(\d+)\]")
MCORE_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
MCORE_EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=experts\.linear_fc[12]\.weight)\d+")


@dataclass(frozen=True)
class Entry:
    """One tensor of Megatron's, and what it is made of. A name that ends in [3] is the fourth of a stack of experts."""

    mcore: tuple[str, ...]  # its names in the layer specifications that Megatron has; numbers count from the model's first layer
    hf: tuple[str, ...]
    operation: Operation
    expert: int | None = None

    def to_mcore(self, tensors: Sequence[Tensor], dims: Dims, *, rank: int = 0, size: int = 1) -> Tensor:
        """The part that process ``rank`` of ``size`` has of ``tensors``, which are those that ``hf`` names."""
        whole = self.operation.to_mcore(torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0], dims)
        return self.operation.shard(whole, rank, size).contiguous()

    def to_hf(self, shards: Sequence[Tensor], dims: Dims) -> list[Tensor]:
        """The tensors that ``hf`` names, of the parts of all processes."""
        joined = self.operation.to_hf(self.operation.unshard(shards), dims)
        if len(self.hf) == 1:
            return [joined.contiguous()]
        return [part.contiguous() for part in joined.split(self.operation.sizes(joined, dims))]


@dataclass(frozen=True)
class _Rule:
    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    operation: str

    @property
    def is_stacked(self) -> bool:
        return self.hf[0].endswith("[{expert}]")

    def pattern(self, part: int) -> re.Pattern[str]:
        text = re.escape(self.hf[part].removesuffix("[{expert}]"))
        for field in ("layer", "expert"):
            text = text.replace(re.escape("{" + field + "}"), rf"(?P<{field}>\d+)")
        return re.compile(text)


@cache
def _rules() -> list[_Rule]:
    data: dict[str, Any] = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
    return [_Rule(tuple(rule["mcore"]), tuple(names), rule["operation"]) for rule in data["rules"] for names in rule["hf"]]


@cache
def _patterns() -> list[tuple[_Rule, int, re.Pattern[str]]]:
    return [(rule, part, rule.pattern(part)) for rule in _rules() for part in range(len(rule.hf))]


def plan(names: Iterable[str], *, num_experts: int = 0, is_tied: bool = False) -> list[Entry]:
    """How the tensors ``names`` of a checkpoint become Megatron's, in the order of the checkpoint.

    ``num_experts`` is the height of stacks of experts; ``is_tied`` leaves out a head that is the embedding. Raises
    ModelError for the first tensor that Megatron's GPTModel has no place for, and for one that lacks its companions.
    """
    found: dict[tuple[_Rule, int, int | None], None] = {}
    present = set(names)
    for name in names:
        if COMPUTED.search(name) or (is_tied and name == "lm_head.weight"):
            continue
        for rule, _, pattern in _patterns():
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                experts = range(num_experts) if rule.is_stacked else [int(groups["expert"])] if groups.get("expert") else [None]
                found.update(dict.fromkeys((rule, int(groups.get("layer") or 0), expert) for expert in experts))
                break
        else:
            raise ModelError(f"Megatron-Core's GPTModel has no place for the tensor {name}", hint="train it by --strategy fsdp2")
    entries = []
    for rule, layer, expert in found:
        where = {"layer": layer, "expert": expert}
        hf = tuple(text.format(**where) for text in rule.hf)
        if missing := [name for name in hf if STACKED.sub(r"\1", name) not in present]:
            raise ModelError(f"the checkpoint has {hf[0]} but not {missing[0]}", hint="it is not whole; fetch it again")
        entries.append(Entry(tuple(text.format(**where) for text in rule.mcore), hf, OPERATIONS[rule.operation], expert))
    return entries


def read(source: Callable[[str], Tensor], name: str) -> Tensor:
    """The tensor ``name`` of ``source``; of a stack of experts, the one that is asked for."""
    match = STACKED.fullmatch(name)
    return source(match[1])[int(match[2])] if match else source(name)


def global_name(name: str, *, first_layer: int, first_expert: int) -> str:
    """Name of a process's own parameter, with numbers that count from the model's first layer and expert."""
    name = MCORE_LAYER.sub(lambda match: str(int(match[0]) + first_layer), name)
    return MCORE_EXPERT.sub(lambda match: str(int(match[0]) + first_expert), name)


def modules_in(name: str) -> list[str]:
    """Names that transformers' models give the linear layers that make Megatron's ``name`` of a block, such as linear_qkv.

    Another name stands for itself.
    """
    end = f".{name}.weight"
    found = [
        text.removesuffix(".weight").rsplit(".", 1)[-1]
        for rule in _rules()
        if rule.mcore[0].endswith(end) and "{expert}" not in rule.mcore[0]
        for text in rule.hf
    ]
    return list(dict.fromkeys(found)) if name.startswith("linear_") and found else [name]


def first_layer(chunk: Any) -> int:
    """The number, in the model, of the first layer of ``chunk``, a GPTModel."""
    layers = chunk.decoder.layers
    return int(layers[0].layer_number) - 1 if len(layers) else 0


def by_name(entries: Sequence[Entry]) -> dict[str, Entry]:
    return {name: entry for entry in entries for name in entry.mcore}
