"""Several LoRA adapters on one model: each row of a pass gets the update of the adapter that it asks for.

y = x W' + (alpha / r) x A' B' (Hu et al. 2021, arXiv:2106.09685). The base's product is computed once for all rows.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from swift.errors import CheckpointError, DataError
from swift.tuner.adapter import ADAPTER_FILE, adapter_settings, read_tensors

PREFIX = "base_model.model."
# Fields of adapter_config.json that change what is computed, and the values that ask for nothing.
PLAIN: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
}

# T rows of a pass, K inputs, N outputs, r rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """A' (K, r) and B' (r, N) of each layer, the latter times alpha / r; ``salt`` keeps its keys and values apart in the cache."""

    name: str
    salt: bytes
    layers: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Updates:
    """What the rows of a pass get, as kernels/program.cpp reads it: for each adapter the number of rows, where they are
    listed, and where for each layer its A', B' and rank are. ``kept`` holds what is pointed to."""

    parts: np.ndarray
    kept: list[Any]


@dataclass
class Rows:
    """Which rows of the pass under way get which adapter."""

    count: int = 0
    parts: list[tuple[Adapter, Any]] = field(default_factory=list)  # a slice, or indices


class AdaptedLinear(nn.Module):
    """A layer, and what the adapters of the pass add to its rows."""

    def __init__(self, base: nn.Module, name: str, rows: Rows) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.rows = rows

    @property
    def weight(self) -> Any:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        for adapter, rows in self.rows.parts:
            if (pair := adapter.layers.get(self.name)) is None:
                continue
            flat, whole = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            if len(flat) != self.rows.count:
                raise CheckpointError(
                    f"the adapter {adapter.name} changes {self.name}, which does not see each token once", hint="merge it: swift merge-lora"
                )
            update = flat[rows].to(pair[0].dtype) @ pair[0] @ pair[1]
            whole[rows] += update.to(whole.dtype)
        return out


class Adapters:
    """The adapters that are loaded beside ``model``."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._rows = Rows()
        self._loaded: dict[str, Adapter] = {}
        self._wrapped: dict[str, AdaptedLinear] = {}
        self._tables: WeakKeyDictionary[Adapter, np.ndarray] = WeakKeyDictionary()
        self._count = 0

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def salt(self, name: str) -> bytes:
        return self._loaded[name].salt

    def layers(self, name: str) -> tuple[str, ...]:
        """Names of the layers that the adapter changes."""
        return tuple(self._loaded[name].layers)

    def load(self, name: str, path: Path) -> None:
        """The adapter in ``path``, as PEFT saves it. CheckpointError if it is none of the kind, or does not fit the model."""
        if name in self._loaded:
            raise DataError(f"an adapter {name!r} is loaded already", hint="unload it before")
        layers = _read(path, self.model)
        for layer in layers:
            if layer not in self._wrapped:
                self._wrapped[layer] = self._wrap(layer)
        self._count += 1
        self._loaded[name] = Adapter(name, f"adapter {self._count}".encode(), layers)

    def unload(self, name: str) -> None:
        """DataError if it is not loaded."""
        if self._loaded.pop(name, None) is None:
            raise DataError(f"no adapter {name!r} is loaded")

    def use(self, spans: Sequence[tuple[str | None, int, int]], device: torch.device) -> None:
        """For the next pass: which adapter the rows from begin to end get; spans follow one another and cover it."""
        self._rows.parts.clear()
        self._rows.count = spans[-1][2] if spans else 0
        by_name: dict[str, list[tuple[int, int]]] = {}
        for name, begin, end in spans:
            if name is not None:
                by_name.setdefault(name, []).append((begin, end))
        for name, own in by_name.items():
            joined = all(before[1] == after[0] for before, after in itertools.pairwise(own))
            rows: Any = slice(own[0][0], own[-1][1])
            if not joined:
                rows = torch.cat([torch.arange(begin, end, device=device) for begin, end in own])
            self._rows.parts.append((self._loaded[name], rows))

    def updates(self, linears: Sequence[nn.Module]) -> Updates | None:
        """What the next pass gets, for compiled layers ``linears``; None if adapters change others too, or in other precisions."""
        parts, kept = [], []
        for adapter, rows in self._rows.parts:
            layers = self._layers(adapter, linears)
            if layers is None:
                return None
            listed = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
            parts.append([len(listed), listed.ctypes.data, layers.ctypes.data])
            kept += [listed, layers]
        return Updates(np.array(parts, dtype=np.int64), kept)

    def _layers(self, adapter: Adapter, linears: Sequence[nn.Module]) -> np.ndarray | None:
        """(layers, 3): addresses of A' and B', and the rank; zeros for a layer that ``adapter`` leaves as it is."""
        if adapter not in self._tables:
            numbers = {id(layer): number for number, layer in enumerate(linears)}
            table = np.zeros((len(linears), 3), dtype=np.int64)
            for name, (a, b) in adapter.layers.items():
                number = numbers.get(id(self._wrapped[name].base))
                if number is None or a.dtype != torch.float32:
                    return None
                table[number] = a.data_ptr(), b.data_ptr(), a.shape[1]
            self._tables[adapter] = table
        return self._tables[adapter]

    def _wrap(self, name: str) -> AdaptedLinear:
        parent, _, child = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        wrapped = AdaptedLinear(getattr(owner, child), name, self._rows)
        setattr(owner, child, wrapped)
        return wrapped


def _read(path: Path, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    settings = adapter_settings(path)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is an adapter of the kind {settings.get('peft_type')}, not LORA", hint="merge it: swift merge-lora")
    for name, plain in PLAIN.items():
        if settings.get(name, plain) not in (plain, None, [], {}):
            raise CheckpointError(f"{path} is no plain LoRA: {name} is {settings[name]!r}", hint="merge it: swift merge-lora")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path / ADAPTER_FILE).items():
        matched = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if matched is None:
            raise CheckpointError(f"{path} is no plain LoRA: it holds {key}", hint="merge it: swift merge-lora")
        halves.setdefault(matched[1], {})[matched[2]] = tensor
    if not halves:
        raise CheckpointError(f"{path} holds no weights")
    head = model.get_output_embeddings()
    layers = {}
    for name, pair in halves.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"{path}: the adapter has weights for {name}, which this model lacks") from None
        if module is head or module is model.get_input_embeddings():
            raise CheckpointError(
                f"{path}: the adapter changes {name}, which is not served beside others", hint="merge it: swift merge-lora"
            )
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{path}: a half of {name} is missing")
        layers[name] = _pair(path, name, pair["A"], pair["B"], settings, module)
    return layers


def _pair(path: Path, name: str, a: Tensor, b: Tensor, settings: dict[str, Any], module: Any) -> tuple[Tensor, Tensor]:
    weight = _base_weight(module)
    inputs, outputs = a.shape[1], b.shape[0]
    if a.shape[0] != b.shape[1] or {inputs, outputs} != set(weight.shape):
        raise CheckpointError(f"{path}: the adapter's {name} is ({outputs}, {inputs}), the model's {tuple(weight.shape)}")
    rank = a.shape[0]
    alpha = _of(name, settings.get("alpha_pattern") or {}, settings.get("lora_alpha", rank))
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    return a.T.to(weight.device, dtype).contiguous(), (b.T.float() * scale).to(weight.device, dtype).contiguous()


def _base_weight(module: Any) -> Tensor:
    while isinstance(module, AdaptedLinear):
        module = module.base
    weight: Tensor = module.weight
    return weight


def _of(name: str, pattern: dict[str, Any], default: Any) -> Any:
    """The value of the first key that names the layer or ends it, as PEFT looks it up."""
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), default)
