"""What a decoder does before, in and after its blocks: seen in one forward pass, so that no model is known by name."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ConfigError, TrainingError
from swift.model.policy import evaluating, is_close, probe_ids
from swift.tuner.blocks import blocks_of

# B rows, T tokens of a row, D model width

ROWS, TOKENS = 2, 6
HINT = "leave --pipeline_model_parallel_size away"


class Gap(nn.Module):
    """Stands where a block is not: hands on the hidden states that come, or those that were ``given`` once, and remembers them."""

    def __init__(self, block: nn.Module, *, is_tuple: bool, keyword: str | None) -> None:
        super().__init__()
        self.is_tuple, self.keyword = is_tuple, keyword
        self.given: Tensor | None = None
        self.is_spent = False
        self.seen: Tensor | None = None
        for name, value in vars(block).items():  # decoders ask their blocks, as which kind of attention one has
            if not name.startswith("_") and name not in vars(self) and isinstance(value, (str, int, float, bool)):
                setattr(self, name, value)

    def give(self, hidden_BTD: Tensor | None) -> None:
        self.given, self.is_spent = hidden_BTD, False

    def take(self) -> Tensor:
        """What was handed on last; it is not kept."""
        seen, self.seen = self.seen, None
        assert seen is not None
        return seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if self.keyword is None else kwargs[self.keyword]
        if self.given is not None:
            if self.is_spent:
                raise TrainingError("this objective runs the model more than once for a batch, which a pipeline cannot do", hint=HINT)
            hidden, self.is_spent = self.given, True
        self.seen = hidden
        return (hidden,) if self.is_tuple else hidden


class StandIn(nn.Module):
    """Stands where an embedding, a norm or a head is not: gives something of the right shape.

    Before the blocks each token gets another pattern along the width: of constants, and of multiples of one pattern, a norm
    makes the same, and what is the same everywhere passes any trial. After them it takes next to no memory, as logits would.
    """

    unit: Tensor
    along_D: Tensor

    def __init__(self, module: nn.Module, width: int, dtype: torch.dtype, *, is_before: bool) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype
        weight = getattr(module, "weight", None)
        self._shape = tuple(weight.shape) if isinstance(weight, Tensor) else (width,)
        like = next(module.parameters())
        self.register_buffer("unit", torch.ones((), dtype=like.dtype, device=like.device), persistent=False)
        self.register_buffer("along_D", torch.arange(width if is_before else 1, device=like.device) % 7, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Ones in the shape of the weight that is elsewhere."""
        return self.unit.expand(self._shape)

    def forward(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        if not inputs.is_floating_point():
            inputs = (inputs % 5)[..., None]
        elif inputs.shape[-1] == self.width:
            return inputs
        given = ((inputs[..., :1] + self.along_D) % 7).to(self.dtype)
        return given.expand(*given.shape[:-1], self.width)


@dataclass(frozen=True)
class Side:
    """A part of a model that is not among its blocks: ``parent.name``."""

    parent: nn.Module
    name: str
    is_before: bool  # whether it is used before the first block (or never), else after the last one
    width: int
    dtype: torch.dtype

    def stand_in(self) -> StandIn:
        module = self.parent._modules[self.name]
        assert module is not None
        return StandIn(module, self.width, self.dtype, is_before=self.is_before)


@dataclass(frozen=True)
class Structure:
    """The blocks of a model, and what is beside them and can be left out where it is not used."""

    inner: Any
    blocks: nn.ModuleList
    sides: list[Side]
    is_tuple: bool
    keyword: str | None  # by which hidden states come; None if they come first
    width: int
    dtypes: list[torch.dtype]  # of the hidden states that each block gives

    def gap(self, block: nn.Module) -> Gap:
        return Gap(block, is_tuple=self.is_tuple, keyword=self.keyword)


@dataclass
class _Seen:
    """What one forward pass shows."""

    phases: dict[int, set[str]]
    outputs: dict[int, Any]
    inputs: Any = None
    is_tuple: bool = False
    running: int = -1
    is_over: bool = False

    @property
    def phase(self) -> str:
        return "after" if self.is_over else "before" if self.running < 0 else "in"


@torch.no_grad()
def observe(model: Any, autocast: Any = contextlib.nullcontext) -> Structure:
    """The structure of ``model`` (of transformers, bare or inside PEFT). ConfigError, in one line, if it cannot be told."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        blocks = blocks_of(inner)
    except ConfigError as problem:
        raise ConfigError(f"a pipeline cannot be made of {type(inner).__name__}: {problem.message}", hint=HINT) from None
    outside = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in inner.parameters()}
    if outside:
        raise ConfigError("a pipeline cannot be made of a tuner that keeps parameters outside of the decoder", hint=HINT)
    places = [place for place in _sides(inner, blocks) if next(place[2].parameters(), None) is not None]
    seen = _Seen({id(module): set() for _, _, module in places}, {})
    with evaluating(model), _watching(seen, blocks, [module for _, _, module in places]), autocast():
        inner(**probe(inner), use_cache=False)
    hiddens = [seen.outputs.get(id(block)) for block in blocks]
    if seen.inputs is None or not all(isinstance(each, tuple) and len(each[0]) == 3 for each in hiddens):
        reason = "its blocks do not hand on hidden states of each token"
        raise ConfigError(f"a pipeline cannot be made of {type(inner).__name__}: {reason}", hint=HINT)
    args, kwargs = seen.inputs
    keyword = None if args else next((name for name, value in kwargs.items() if _is_hidden(value)), None)
    sides = []
    for parent, name, module in places:
        phases, output = seen.phases[id(module)], seen.outputs.get(id(module))
        if len(phases) > 1 or phases == {"in"} or (phases and output is None):
            continue  # needed everywhere
        width, dtype = (output[0][-1], output[1]) if output is not None else (1, torch.float32)
        sides.append(Side(parent, name, phases != {"after"}, width, dtype))
    shapes = [each for each in hiddens if each is not None]
    return Structure(inner, blocks, sides, seen.is_tuple, keyword, shapes[0][0][-1], [dtype for _, dtype in shapes])


def probe(inner: Any) -> dict[str, Tensor]:
    """Two rows, one of them padded."""
    ids = probe_ids(inner, ROWS * TOKENS).view(ROWS, TOKENS)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def agrees(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and is_close(found, wanted, exactly=True)


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _sides(module: nn.Module, blocks: nn.ModuleList) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of the largest parts that have no block in them."""
    for name, child in module.named_children():
        if child is blocks:
            continue
        if any(part is blocks for part in child.modules()):
            yield from _sides(child, blocks)
        else:
            yield module, name, child


@contextlib.contextmanager
def _watching(seen: _Seen, blocks: nn.ModuleList, sides: list[nn.Module]) -> Iterator[None]:
    index = {id(block): at for at, block in enumerate(blocks)}

    def begins(block: nn.Module, args: Any, kwargs: Any) -> None:
        seen.running = index[id(block)]
        seen.inputs = (args, kwargs)

    def ends(block: nn.Module, args: Any, output: Any) -> None:
        seen.is_tuple = isinstance(output, tuple)
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor):
            seen.outputs[id(block)] = (tuple(hidden.shape), hidden.dtype)
        seen.is_over = index[id(block)] == len(blocks) - 1

    def is_used(module: nn.Module, args: Any, output: Any) -> None:
        seen.phases[id(module)].add(seen.phase)
        if isinstance(output, Tensor):
            seen.outputs[id(module)] = (tuple(output.shape), output.dtype)

    handles = [block.register_forward_pre_hook(begins, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(ends) for block in blocks]
    for side in sides:
        handles += [part.register_forward_hook(_told(side, is_used)) for part in side.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _told(side: nn.Module, is_used: Any) -> Any:
    """A hook of ``side``, or of a part of it: only its own output is that of the side."""

    def hook(part: nn.Module, args: Any, output: Any) -> None:
        is_used(side, args, output if part is side else None)

    return hook
