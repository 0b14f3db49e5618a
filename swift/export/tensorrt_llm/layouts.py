"""Which tensors of a checkpoint become which tensors of TensorRT-LLM: the table in layouts.yaml, put to a model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from swift.errors import ConfigError, ModelError
from swift.export.tensorrt_llm.cuts import CUTS, Heads

TABLE = Path(__file__).with_name("layouts.yaml")
BUFFERS = "rotary_emb.inv_freq"  # in files of old versions of transformers; computed from config.json
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Tensors:
    """One tensor of TensorRT-LLM: joined from ``sources`` of the checkpoint, cut for the ranks, ``add`` added to it."""

    sources: tuple[str, ...]
    cut: str = "whole"
    add: float = 0.0
    is_optional: bool = False


@dataclass(frozen=True)
class Layout:
    """What TensorRT-LLM calls the tensors of some architectures, and what its config.json says of them."""

    name: str
    architectures: tuple[str, ...]
    rope: tuple[str, ...]
    tensors: dict[str, Tensors]
    norm: Tensors
    constants: dict[str, Any] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    pipeline: bool = True
    embedding_scale: bool = False


@dataclass(frozen=True)
class Piece:
    """A tensor as it stands in the rank files of a pipeline stage."""

    stage: int
    name: str
    tensors: Tensors


@cache
def layouts() -> dict[str, Layout]:
    """The layout of each architecture in the table."""
    found: dict[str, Layout] = {}
    for name, entry in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items():
        layout = Layout(
            name,
            tuple(entry["architectures"]),
            tuple(entry["rope"]),
            {target: _tensors(rule) for target, rule in entry["tensors"].items()},
            _tensors(entry.get("norm", {"from": NORM})),
            entry.get("constants", {}),
            tuple(entry.get("copied", ())),
            entry.get("pipeline", True),
            entry.get("embedding_scale", False),
        )
        found |= dict.fromkeys(layout.architectures, layout)
    return found


def layout_of(name: str, config: dict[str, Any]) -> Layout:
    """The layout of the model called ``name`` with this config.json; ModelError for an architecture that has none."""
    named = (config.get("architectures") or ["none"])[0]
    if named not in layouts():
        raise ModelError(
            f"{name}: no layout of TensorRT-LLM is known for the architecture {named}",
            hint=f"known are {', '.join(sorted(layouts()))}; trtllm-serve reads many others from the Hugging Face folder itself",
        )
    return layouts()[named]


def stages(layers: int, count: int) -> list[range]:
    """Layers of each of ``count`` pipeline stages; the first ones take one more where they do not divide."""
    bounds = [chunk.tolist() for chunk in torch.arange(layers).tensor_split(count)]
    return [range(chunk[0], chunk[-1] + 1) for chunk in bounds]


def pieces(layout: Layout, names: Iterable[str], layers: int, pipeline: int, *, tied: bool) -> list[Piece]:
    """All tensors of the rank files, in the order of the network.

    ``names`` are those of the checkpoint. ModelError if one is missing, and if one would be left out. ``tied``: the head is the
    embedding, whatever else the checkpoint holds.
    """
    present = {name for name in names if not name.endswith(BUFFERS)} - ({HEAD} if tied else set())
    head = EMBEDDING if tied else HEAD
    found = [Piece(0, "transformer.vocab_embedding.weight", Tensors((EMBEDDING,), "vocabulary"))]
    for stage, own in enumerate(stages(layers, pipeline)):
        for local, layer in enumerate(own):  # layers are numbered anew on each stage
            for target, tensors in layout.tensors.items():
                sources = tuple(f"model.layers.{layer}.{source}" for source in tensors.sources)
                if tensors.is_optional and not present.intersection(sources):
                    continue
                placed = Tensors(sources, tensors.cut, tensors.add)
                found.append(Piece(stage, f"transformer.layers.{local}.{target}", placed))
    found.append(Piece(pipeline - 1, "transformer.ln_f.weight", layout.norm))
    # Also where it is the embedding: a rank that has no embedding needs it, and the builder stores equal weights once.
    found.append(Piece(pipeline - 1, HEAD, Tensors((head,), "vocabulary")))
    used = {source for piece in found for source in piece.tensors.sources}
    if used - present:
        raise ModelError(f"the tensor {min(used - present)} is missing", hint="the model is damaged, or not what its config.json says")
    if present - used:
        raise ModelError(
            f"TensorRT-LLM has no place for the tensor {min(present - used)}",
            hint=f"the layout {layout.name} does not describe this model; nothing was written",
        )
    return found


def refuse_split(layout: Layout, heads: Heads, width: int, layers: int, tensor: int, pipeline: int) -> None:
    """ConfigError if a model with these heads and this MLP ``width`` cannot be cut for the ranks."""
    if heads.query % tensor:
        raise ConfigError(
            f"--tensorrt_tp_size {tensor} does not divide {heads.query} attention heads", hint=_divisors(heads.query, heads.key_value)
        )
    if max(heads.key_value, tensor) % min(heads.key_value, tensor):
        raise ConfigError(
            f"--tensorrt_tp_size {tensor} and {heads.key_value} key/value heads do not divide each other",
            hint=_divisors(heads.query, heads.key_value),
        )
    if width % tensor:
        raise ConfigError(f"--tensorrt_tp_size {tensor} does not divide the MLP width {width}", hint="choose a smaller one")
    if pipeline > layers:
        raise ConfigError(f"--tensorrt_pp_size {pipeline} is more than the {layers} layers", hint="choose a smaller one")
    if pipeline > 1 and not layout.pipeline:
        raise ConfigError(
            f"--tensorrt_pp_size {pipeline}: TensorRT-LLM builds {layout.architectures[0]} without pipeline stages",
            hint="use --tensorrt_tp_size",
        )


def parts(tensors: Tensors, read: Callable[[str], Tensor], heads: Heads, ranks: int) -> list[Tensor]:
    """What each of ``ranks`` holds of a tensor; ``read`` gives the sources, on the device meta for shapes alone."""
    made = CUTS[tensors.cut]([read(source) for source in tensors.sources], ranks, heads)
    return [part.float() + tensors.add for part in made] if tensors.add else made


def _tensors(rule: dict[str, Any]) -> Tensors:
    written = rule["from"] if isinstance(rule["from"], list) else [rule["from"]]
    return Tensors(
        tuple(source.strip("()") for source in written), rule.get("cut", "whole"), rule.get("add", 0.0), written[0].startswith("(")
    )


def _divisors(query: int, key_value: int) -> str:
    fitting = [n for n in range(1, query + 1) if query % n == 0 and max(n, key_value) % min(n, key_value) == 0]
    return f"it may be {', '.join(map(str, fitting))}"
