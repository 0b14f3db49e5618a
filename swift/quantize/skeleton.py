"""A model of which only the part at hand is in memory: built without weights, filled block by block from its files.

No model is known by name. What its decoder gives to each block besides hidden states is noted while the decoder's own forward
runs with blocks that do nothing; embeddings hold only the rows of the tokens that are asked for.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ConfigError, ModelError, first_line
from swift.model.artifact import ModelFolder
from swift.model.experts import Fused, find_names, separate_experts
from swift.quantize.tensors import Checkpoint, model_checkpoint
from swift.tuner.blocks import blocks_of

# B rows, T tokens, D model width, V vocabulary


@dataclass
class Call:
    """What a block is called with behind the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Skeleton:
    """The model in ``folder`` on the meta device. ModelError if transformers does not know it or if it cannot be run by blocks."""

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.checkpoint: Checkpoint = model_checkpoint(folder)
        self.model = _empty_model(folder)
        self.decoder: Any = self.model.base_model
        try:
            self.blocks = blocks_of(self.decoder)
        except ConfigError as problem:
            raise ModelError(f"{folder.name}: {problem.message}") from None
        self.place = next(name for name, module in self.model.named_modules() if module is self.blocks)
        self.keys, self.fused = _find_keys(folder, self.model, self.checkpoint)

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, index: int) -> nn.Module:
        """Block ``index`` with its weights in float32; fused experts are modules of their own."""
        block = self.empty_block(index)
        self._fill(block, f"{self.place}.{index}.")
        return block.to(self.device).eval()

    def empty_block(self, index: int) -> nn.Module:
        """The same on the meta device."""
        block = copy.deepcopy(self.blocks[index])
        self.keys |= separate_experts(block, f"{self.place}.{index}.", self.fused)
        return block

    def key_of(self, index: int, layer: str) -> str:
        """The name in the files of the linear layer ``layer`` of a block, without .weight."""
        name = f"{self.place}.{index}.{layer}.weight"
        return self.keys[name].removesuffix(".weight")

    def calls(self, shape: tuple[int, int]) -> list[Call]:
        """What each block is called with for (B, T) tokens without padding. ModelError if that depends on which tokens they are."""
        seen = []
        for token in (0, 1):
            self._start(torch.zeros(shape, dtype=torch.long), torch.tensor([token]))
            seen.append([note.call for note in self.notes])
        for one, other in zip(*seen, strict=True):
            given, again = (_tensors_in([*call.args, *call.kwargs.values()]) for call in (one, other))
            if len(given) != len(again) or not all(map(torch.equal, given, again)):
                raise ModelError(f"{self.folder.name}: its blocks look at the tokens beside the hidden states, which is not supported")
        return seen[0]

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T, D): what the first block gets for ``ids`` (B, T)."""
        used, places = ids.unique(return_inverse=True)
        self._start(places, used)
        return self.notes[0].hidden

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """What the block makes of ``hidden`` (B, T, D)."""
        made = block(hidden, *call.args, **call.kwargs)
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        """V, padding included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @contextlib.contextmanager
    def head(self, rows: slice) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes logits (B, T, rows) of the tokens ``rows`` from what the last block gave, (B, T, D)."""
        model, head, name = self._with_head
        weight, bias = head.weight, head.bias
        head.weight = nn.Parameter(self.checkpoint.read(self.keys[f"{name}.weight"], rows).float().to(self.device), requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(self.checkpoint.read(self.keys[f"{name}.bias"], rows).float().to(self.device), requires_grad=False)

        def logits(hidden: Tensor) -> Tensor:
            self.notes[-1].gives = hidden.to(self.device)
            made: Tensor = model(inputs_embeds=torch.zeros_like(self.notes[-1].gives), use_cache=False).logits
            return made.float()

        try:
            yield logits
        finally:
            self.notes[-1].gives = None
            head.weight, head.bias = weight, bias

    @cached_property
    def notes(self) -> list["_Note"]:
        """In place of the blocks of ``_shell``."""
        returns_tuple = self._returns_tuple()
        return [_Note(block, returns_tuple) for block in self.blocks]

    @cached_property
    def _shell(self) -> Any:
        """The decoder with its weights, but for token embeddings, and with notes for blocks."""
        decoder = self._outer()
        _replace(decoder, self.blocks, nn.ModuleList(self.notes))
        return decoder

    @cached_property
    def _with_head(self) -> tuple[Any, Any, str]:
        """(the model around ``_shell``, its head without weights, that head's name)."""
        model = copy.deepcopy(self.model, {id(self.decoder): self._shell})
        return model, model.get_output_embeddings(), self._name_of(self.model.get_output_embeddings())

    def _name_of(self, wanted: nn.Module) -> str:
        return next(str(name) for name, module in self.model.named_modules() if module is wanted)

    @torch.inference_mode()
    def _start(self, ids: Tensor, tokens: Tensor) -> None:
        """Let the notes see what the decoder's own forward gives to blocks; ``ids`` (B, T) point into ``tokens``."""
        for note in self.notes:
            note.count = 0
        self._run_decoder(self._shell, ids, tokens)
        if not all(note.count == 1 for note in self.notes):
            raise ModelError(f"{self.folder.name}: its decoder does not run its {len(self)} blocks one after the other")

    def _run_decoder(self, decoder: Any, ids: Tensor, tokens: Tensor) -> None:
        embedding = decoder.get_input_embeddings()
        key = self.keys[f"{self._name_of(self.model.get_input_embeddings())}.weight"]
        weight, embedding.padding_idx = embedding.weight, None
        embedding.weight = nn.Parameter(self.checkpoint.read(key, tokens).float().to(self.device), requires_grad=False)
        try:
            decoder(input_ids=ids.to(self.device), use_cache=False)
        finally:
            embedding.weight = weight

    @torch.inference_mode()
    def _returns_tuple(self) -> bool:
        """Whether the first block gives a tuple."""
        decoder = self._outer()
        first = _Note(self.blocks[0], False, ends=True)
        _replace(decoder, self.blocks, nn.ModuleList([first, *self.blocks[1:]]))
        with contextlib.suppress(_Seen):
            self._run_decoder(decoder, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        return isinstance(self.block(0)(first.hidden, *first.call.args, **first.call.kwargs), tuple)

    def _outer(self) -> Any:
        """The decoder with its weights, but for blocks and token embeddings."""
        decoder = copy.deepcopy(self.decoder, {id(self.blocks): self.blocks})
        tokens = self.model.get_input_embeddings()
        prefix = self._name_of(self.decoder)
        prefix = f"{prefix}." if prefix else ""
        embeddings = f"{self._name_of(tokens).removeprefix(prefix)}.weight"
        inside = f"{self.place.removeprefix(prefix)}."
        self._fill(decoder, prefix, lambda name: name == embeddings or name.startswith(inside))
        return decoder.eval()

    def _fill(self, module: nn.Module, prefix: str, skips: Any = lambda name: False) -> None:
        """Read the parameters and make the buffers of ``module``, which is called ``prefix`` in the model."""
        for name, parameter in list(module.named_parameters()):
            if skips(name) or not parameter.is_meta:
                continue
            key = self.keys.get(prefix + name)
            if key is None:
                raise ModelError(f"{self.folder.name}: the weight {prefix + name} is missing", hint="fetch the model again")
            tensor = self.checkpoint.read(key)
            if tensor.shape != parameter.shape:
                raise ModelError(f"{self.folder.name}: {key} has shape {list(tensor.shape)}, expected {list(parameter.shape)}")
            _set(module, name, _loaded(nn.Parameter(tensor.float().to(self.device), requires_grad=False)))
        for part_name, part in list(module.named_modules()):
            names = [name for name, buffer in part._buffers.items() if buffer is not None and buffer.is_meta]
            if not names or skips(f"{part_name}." + names[0]):
                continue
            for name in names:
                key = None if name in part._non_persistent_buffers_set else self.keys.get(f"{prefix}{part_name}.{name}")
                shape = part._buffers[name]
                part._buffers[name] = (
                    _loaded(self.checkpoint.read(key).to(self.device)) if key else torch.zeros_like(shape, device=self.device)
                )
            with torch.no_grad():
                self.model._init_weights(part)


class _Seen(Exception):
    pass


class _Note(nn.Module):
    """In place of a block: notes what it is given, and gives the hidden states back, or ``gives``."""

    def __init__(self, block: nn.Module, returns_tuple: bool, *, ends: bool = False) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.returns_tuple = returns_tuple
        self.ends = ends
        self.count = 0
        self.call = Call()
        self.hidden = torch.empty(0)
        self.gives: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        self.hidden, self.call = hidden_states, Call(args, kwargs)
        if self.ends:
            raise _Seen
        given = hidden_states if self.gives is None else self.gives
        return (given,) if self.returns_tuple else given


def _empty_model(folder: ModelFolder) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as problem:
        raise ModelError(
            f"{folder.name}: the installed transformers does not know this model: {first_line(problem)}",
            hint="a newer transformers may know it",
        ) from problem


def _find_keys(folder: ModelFolder, model: Any, checkpoint: Checkpoint) -> tuple[dict[str, str], Fused]:
    """({name in the model: name in the files}, fused weights). ModelError if one is missing."""
    keys, fused = find_names(model, checkpoint.sources)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in dict(tied).items():
        if name not in keys and source in keys:
            keys[name] = keys[source]
        elif source not in keys and name in keys:
            keys[source] = keys[name]
    if missing := [name for name in dict(model.named_parameters()) if name not in keys and name not in fused]:
        raise ModelError(
            f"{folder.name}: {len(missing)} weights are missing, the first is {missing[0]}",
            hint="fetch the model again; a shard may be absent",
        )
    return keys, fused


def _loaded(tensor: Any) -> Any:
    """``tensor`` with the mark by which transformers leaves it alone when it makes the buffers of the same module."""
    tensor._is_hf_initialized = True
    return tensor


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Those among ``values``, and among their tuples and lists."""
    found: list[Tensor] = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else _tensors_in(value) if isinstance(value, list | tuple) else []
    return found


def _set(module: nn.Module, name: str, value: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, value)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in root.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
                return
    raise ModelError("the decoder's list of blocks was not found")
