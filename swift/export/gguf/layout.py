"""Where tensors of a checkpoint go in a GGUF file, and how their values are laid out there.

Names are those of gguf's tensor map. What transformers' reader does to the values of an architecture is found by trying it
on small arrays, and undone: so no architecture has code of its own here.
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.errors import ModelError

# Only names that differ by more than punctuation.
ALIASES = {"mistral": "llama", "mixtral": "llama", "cohere": "command-r", "phi": "phi2", "gpt_bigcode": "starcoder"}
IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.masked_bias$|_extra_state$")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Place:
    """The tensor ``name`` of the file, of which a tensor of the checkpoint is expert number ``expert``, or the whole."""

    name: str
    expert: int | None = None
    half: int | None = None  # 0 or 1: the tensor holds two, one after the other in the second last dimension


@dataclass(frozen=True)
class Arrangement:
    """How values lie in the file: transposed, rows in another order, more by a constant, without dimensions of 1."""

    rows: Any = None  # file[rows[i]] is row i of the checkpoint
    offset: float = 0.0
    is_transposed: bool = False
    squeezes: int | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file of a tensor that has ``shape`` in the checkpoint."""
        if self.squeezes is not None:
            shape = shape[: self.squeezes] + shape[self.squeezes + 1 :]
        return shape[::-1] if self.is_transposed else shape

    def apply(self, values: Tensor) -> Tensor:
        """The values as the file has them. Sums are of float32."""
        if self.squeezes is not None:
            values = values.squeeze(self.squeezes)
        if self.is_transposed:
            values = values.T.contiguous()
        if self.rows is not None:
            laid = torch.empty_like(values)
            laid[self.rows] = values
            values = laid
        return values.float() + self.offset if self.offset else values


class Layout:
    """Names and arrangements of one architecture."""

    def __init__(self, config: Any, processor: Any = None) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.arch = architecture(config)
        self.processor = (processor or TENSOR_PROCESSORS.get(self.arch, TensorProcessor))(config=config.to_dict())
        number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == self.arch)
        self._table = get_tensor_name_map(number, config.num_hidden_layers)
        self._arrangements: dict[tuple[Any, ...], Arrangement] = {}

    def place(self, name: str) -> Place | None:
        """Where the tensor ``name`` of a checkpoint goes; None for what no runtime reads. ModelError if that is unknown."""
        if IGNORED.search(name):
            return None
        stem, dot, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, ".", "weight")
        expert = None
        if found := EXPERT.fullmatch(stem):
            stem, expert = f"{found[1]}.{found[3]}", int(found[2])
        if stem.endswith("experts.gate_up_proj"):
            gate = self._table.get_name(stem.replace("gate_up_proj", "gate_proj"))
            if gate is not None:
                return Place(f"{gate}.{suffix}", half=0)
        place = self._table.get_name(stem) or self._table.get_name(stem.partition(".")[2]) or self._table.get_name(f"model.{stem}")
        if place is None:
            raise ModelError(f"the tensor {name} has no name in GGUF files of architecture {self.arch!r}")
        return Place(place + dot + suffix, expert)

    def places(self, name: str) -> list[Place]:
        """As ``place``, with both halves of a tensor that holds two."""
        place = self.place(name)
        if place is None:
            return []
        if place.half is None:
            return [place]
        return [place, Place(place.name.replace("ffn_gate_exps", "ffn_up_exps"), half=1)]

    def arrangement(self, name: str, shape: tuple[int, ...]) -> Arrangement:
        """How the tensor ``name`` of the file lies there, which has ``shape`` in the checkpoint."""
        key = (re.sub(r"\d+", "#", name), shape)
        if key not in self._arrangements:
            self._arrangements[key] = self._try(name, shape)
        return self._arrangements[key]

    def _try(self, name: str, shape: tuple[int, ...]) -> Arrangement:
        is_expert = "_exps." in name  # the reader stacks these itself
        if is_expert or name.startswith(("token_embd.", "output.")):
            return Arrangement()
        rows = shape[0]
        if len(shape) == 1:
            return self._arrangement(name, (rows,), lambda done: done if done.shape == (rows,) else None, Arrangement())
        few = (rows, 2)  # enough columns to tell rows from columns
        if len(shape) == 3 and shape[1] == 1:
            return self._arrangement(name, few, lambda done: done[:, 0] if done.shape == (rows, 1, 2) else None, Arrangement(squeezes=1))
        for probe, straight in ((few, Arrangement()), ((shape[-1], 2), Arrangement(is_transposed=True))):
            turned = straight.is_transposed

            def straighten(done: Any, probe: tuple[int, ...] = probe, turned: bool = turned) -> Any:
                return (done.T if turned else done) if done.shape == (probe[::-1] if turned else probe) else None

            try:
                return self._arrangement(name, probe, straighten, straight)
            except ModelError:
                if turned:
                    raise
        raise AssertionError

    def _arrangement(self, name: str, probe: tuple[int, ...], straighten: Callable[[Any], Any], base: Arrangement) -> Arrangement:
        """``base`` with the order of rows and the constant; ``straighten`` gives the processed values the shape ``probe`` or None."""

        def process(values: Any) -> Any:
            try:
                return straighten(
                    self.processor.process(weights=values, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}).weights
                )
            except (ValueError, TypeError, IndexError, AttributeError):
                return None

        zeros, ones = process(np.zeros(probe)), process(np.ones(probe))
        numbers = np.arange(np.prod(probe)).reshape(probe)
        done = process(numbers)
        known = ModelError(f"the layout of {name} in GGUF files of architecture {self.arch!r} is not known")
        if zeros is None or ones is None or done is None or np.ptp(zeros) != 0 or not np.array_equal(ones, zeros + 1):
            raise known
        offset = -float(zeros.flat[0])
        order = (done + int(offset)).reshape(probe[0], -1)[:, 0] // (probe[1] if len(probe) > 1 else 1)
        if not np.array_equal(numbers[order], done + int(offset)):
            raise known
        rows = None if np.array_equal(order, np.arange(probe[0])) else torch.from_numpy(order)
        return Arrangement(rows, offset, base.is_transposed, base.squeezes)


def own_fields(config: Any) -> Any:
    """A copy of ``config`` without what its class does not know: config.json may say anything, as GPT-2's of heads for keys."""
    try:
        known = type(config)()
    except (TypeError, ValueError):
        return config
    copied = copy.deepcopy(config)
    for name in [name for name in vars(copied) if not name.startswith("_") and not hasattr(known, name)]:
        delattr(copied, name)
    return copied


def architecture(config: Any) -> str:
    """The name of the model's architecture in GGUF files. ModelError if gguf knows none."""
    from gguf import MODEL_ARCH_NAMES

    kind = str(config.model_type)
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ModelError(f"a model of type {kind} reads more than text, which is not written to GGUF files")
    if kind in ALIASES:
        return ALIASES[kind]
    plain = {re.sub(r"[-_]", "", name): name for name in MODEL_ARCH_NAMES.values()}
    wanted = re.sub(r"[-_]", "", kind.removesuffix("_text"))
    if wanted not in plain:
        raise ModelError(f"GGUF files know no model of type {kind}", hint="--to openvino and --to onnx know others")
    return plain[wanted]


def candidates(config: Any) -> list[Layout]:
    """Layouts worth a trial: transformers' own, and where it has none, the kinds that there are."""
    from transformers import modeling_gguf_pytorch_utils as known

    if architecture(config) in known.TENSOR_PROCESSORS:
        return [Layout(config)]
    kinds = (known.TensorProcessor, known.LlamaTensorProcessor, known.Gemma2TensorProcessor)
    return [Layout(config, kind) for kind in kinds]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint that is (a part of) a tensor of the file."""

    name: str
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Target:
    """A tensor of the file with what it is made of; ``shape`` is that of the file, outermost dimension first."""

    name: str
    sources: tuple[Source, ...]
    arrangement: Arrangement

    @cached_property
    def shape(self) -> tuple[int, ...]:
        first = self.sources[0]
        shape = self.arrangement.shape(first.shape)
        if first.place.expert is not None:
            return (len(self.sources), *shape)
        return shape if first.place.half is None else (*shape[:-2], shape[-2] // 2, shape[-1])


def targets(layout: Layout, header: Iterable[tuple[str, tuple[int, ...]]]) -> list[Target]:
    """The tensors of the file for a checkpoint with these (name, shape), in the order of the model."""
    found: dict[str, list[Source]] = {}
    for name, shape in header:
        for place in layout.places(name):
            found.setdefault(place.name, []).append(Source(name, shape, place))
    result = []
    for name in sorted(found, key=_order):
        sources = sorted(found[name], key=lambda source: source.place.expert or 0)
        numbers = [source.place.expert for source in sources]
        if numbers != [None] and numbers != list(range(len(sources))):
            raise ModelError(f"{name} would be made of {', '.join(source.name for source in sources[:3])}: some are lacking or too many")
        result.append(Target(name, tuple(sources), layout.arrangement(name, sources[0].shape)))
    return result


def _order(name: str) -> tuple[int, int, str]:
    found = re.match(r"blk\.(\d+)\.", name)
    return (1, int(found[1]), name) if found else (0 if name.startswith("token_embd") else 2, 0, name)
