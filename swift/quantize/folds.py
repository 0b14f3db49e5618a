"""Where the inputs of linear layers can be scaled: operations before them that take the inverse, found by trial.

No architecture is known. The channels of a norm, or the rows of a linear layer, are doubled, half of them at a time; if the
inputs of a group of layers double in some channels and stay in others, bit by bit of the channel's number, it is known which
channel scales which input. Attention makes a detour: the rows of queries and keys act on everything. So the search looks at
tokens that are alone in their sequence, where attention has no choice, and what it finds is tried on whole sequences: there the
block's output has to stay as it was when the producer is divided and its consumers are multiplied.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swift.model.quantized.base import GroupedWeight, ScaledWeight, Weight
from swift.quantize.grid import LARGEST, SMALLEST

# K inputs of a group, P channels of a producer, T tokens

Run = Callable[[], Tensor]
Known = dict[tuple[str, ...], "Fold | None"]
"""Folds by the layers of their groups; None of those that have none. What no token reached is not there."""
TOLERANCE = 1e-4  # norms that scale by 1 + weight round; all others double exactly


@dataclass(frozen=True, eq=False)
class Fold:
    """The ``producer`` of a group's inputs, a module of the block: its channel ``share`` (K,) scales each of them.

    ``offset`` is what a norm adds to its weight. ``further`` are parameters (.., K) of the block that read the same inputs and
    belong to no group: routers of experts.
    """

    producer: str
    share: Tensor
    offset: float = 0.0
    further: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"producer": self.producer, "share": self.share.tolist(), "offset": self.offset, "further": list(self.further)}

    @classmethod
    def of(cls, values: dict[str, Any], device: torch.device) -> "Fold":
        """The inverse of ``as_dict``."""
        return cls(values["producer"], torch.tensor(values["share"], device=device), values["offset"], tuple(values["further"]))

    def pool(self, values: Tensor) -> Tensor:
        """(K,): the mean of ``values`` (K,) over the inputs that one channel scales."""
        size = int(self.share.max()) + 1
        sums = values.new_zeros(size).index_add_(0, self.share, values)
        return (sums / values.new_zeros(size).index_add_(0, self.share, torch.ones_like(values)))[self.share]

    @torch.no_grad()
    def divide(self, block: nn.Module, scale: Tensor, dtype: torch.dtype = torch.float32, made: dict[str, Weight] | None = None) -> Tensor:
        """Divide the inputs by ``scale`` (K,), equal where a channel is shared; multiply the weights of ``further`` consumers.

        The weight of a norm is rounded to ``dtype``, in which it will be stored; (K,) is the scale that came out of that.
        If the producer is quantized already, as ``made`` tells, so are its scales there, and its weight in the block is what
        they give. The weights of the group itself are left to the caller.
        """
        producer: Any = block.get_submodule(self.producer)
        divisor = torch.ones(producer.weight.shape[0], device=scale.device)
        divisor[self.share] = scale
        if producer.weight.dim() == 1:
            whole = producer.weight + self.offset
            stored = (whole / divisor - self.offset).to(dtype).float()
            rounded = stored + self.offset
            divisor = torch.where(rounded != 0, whole / rounded, divisor)
            producer.weight.copy_(stored)
            _multiply_bias(producer, 1 / divisor)
        else:
            _multiply(producer, self.offset, 1 / divisor)
        if made is not None and self.producer in made:
            made[self.producer] = divide_rows(made[self.producer], divisor)
            producer.weight.copy_(made[self.producer].dequantize())
        scale = divisor[self.share]
        for name in self.further:
            block.get_parameter(name).mul_(scale)
        return scale


def divide_rows(weight: Weight, divisor: Tensor) -> Weight:
    """``weight`` with its rows divided by ``divisor`` (N,): the codes stay. Scales of groups are rounded to values of float16."""
    if isinstance(weight, GroupedWeight):
        return replace(weight, scales=(weight.scales / divisor[:, None]).clamp(SMALLEST, LARGEST).half().float())
    assert isinstance(weight, ScaledWeight) and len(weight.scales) == len(divisor)
    return replace(weight, scales=weight.scales / divisor[:, None])


def find_folds(
    block: nn.Module, groups: Sequence[Sequence[str]], together: Run, alone: Run, known: Known | None = None
) -> list[Fold | None]:
    """A fold for each group of linear layers of ``block`` that share an input; None where there is none.

    ``together`` runs the block on a sequence of some tokens and gives its output; ``alone`` runs it on tokens each of which is
    a sequence of its own. Eight of each do, whose activations are those of real text. ``known`` is what other blocks showed, and
    gets what this one does: folds that hold here too are not searched again, nor are those that were searched in vain.
    The block is in float32 and is left as it was.
    """
    known = {} if known is None else known
    with torch.no_grad():
        trial = _Trial(block, groups, together, alone)
        found: list[Fold | None] = [None] * len(groups)
        for index, group in enumerate(trial.groups):
            fold = known.get(group)
            if fold is not None and trial.holds(fold, index):
                found[index] = fold
        wanted = {
            index
            for index, group in enumerate(trial.groups)
            if found[index] is None and trial.is_seen(index) and (group not in known or known[group] is not None)
        }
        searched = frozenset(wanted)
        for name, offset in _candidates(block):
            if not wanted:
                break
            for index, fold in trial.search(name, offset, wanted).items():
                if trial.holds(fold, index):
                    found[index] = known[trial.groups[index]] = fold
                    wanted.discard(index)
        for index in searched:
            known.setdefault(trial.groups[index], None)
    return found


def _candidates(block: nn.Module) -> Iterator[tuple[str, float]]:
    """Modules that may scale channels: with a weight of one dimension, as it is or added to 1, then linear layers."""
    named = [(name, module) for name, module in block.named_modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    norms = [name for name, module in named if _weight(module).dim() == 1 and len(_weight(module)) > 1]
    yield from ((name, offset) for name in norms for offset in (0.0, 1.0))
    yield from ((name, 0.0) for name, module in named if isinstance(module, nn.Linear) and module.out_features > 1)


class _Trial:
    """What the groups of a block, and readers that belong to none, see when channels of a producer are scaled."""

    def __init__(self, block: nn.Module, groups: Sequence[Sequence[str]], together: Run, alone: Run) -> None:
        self.block, self.together, self.alone = block, together, alone
        self.groups = [tuple(group) for group in groups]
        grouped = {f"{name}.weight" for group in groups for name in group}
        self.readers = [name for name, parameter in block.named_parameters() if parameter.dim() == 2 and name not in grouped]
        self.alone_before, _ = self._observe(alone)
        self.together_before, self.output_before = self._observe(together)

    def is_seen(self, index: int) -> bool:
        """Whether tokens reached a group: those that experts do not get show nothing."""
        return all(seen is not None and len(seen) > 0 for seen in (self.alone_before[index], self.together_before[index]))

    def search(self, name: str, offset: float, wanted: set[int]) -> dict[int, Fold]:
        """Folds, not yet tried on whole sequences, of the groups ``wanted``."""
        shares = self._decode(name, offset, {*wanted, *range(len(self.groups), len(self.groups) + len(self.readers))}, {})
        reading = {self.readers[at - len(self.groups)]: share for at, share in shares.items() if at >= len(self.groups)}
        if reading and (lost := wanted - shares.keys()):
            shares |= self._decode(name, offset, lost, reading)  # now routers choose as before
        folds = {}
        for index in wanted & shares.keys():
            further = tuple(reader for reader, share in reading.items() if torch.equal(share, shares[index]))
            folds[index] = Fold(name, shares[index], offset, further)
        return folds

    def holds(self, fold: Fold, index: int) -> bool:
        """Whether the inputs are divided and the output stays, on whole sequences, for a random scale of powers of two."""
        layers = [self.block.get_submodule(name) for name in self.groups[index]]
        before = self.together_before[index]
        own = dict(self.block.named_parameters(remove_duplicate=False))
        if before is None or any(_weight(layer).shape[-1] != len(fold.share) for layer in layers):
            return False
        if not {f"{fold.producer}.weight", *fold.further} <= own.keys():
            return False  # it is of a block of another kind
        channels = len(_weight(self.block.get_submodule(fold.producer)))
        exponents = torch.randint(-2, 3, (channels,), generator=torch.Generator().manual_seed(0))
        with self._restored(fold.producer, *fold.further, *(f"{name}.weight" for name in self.groups[index])):
            scale = fold.divide(self.block, torch.exp2(exponents.float()).to(before.device)[fold.share])
            for layer in layers:
                _weight(layer).mul_(scale)
            inputs, output = self._observe(self.together)
        seen = inputs[index]
        if seen is None or seen.shape != before.shape or not _near(seen * scale, before).all():
            return False
        return bool((output - self.output_before).abs().max() <= TOLERANCE * self.output_before.square().mean().sqrt())

    def _decode(self, name: str, offset: float, wanted: set[int], reading: dict[str, Tensor]) -> dict[int, Tensor]:
        """The channel (K,) of ``name`` that scales each input, by what sees it: groups, and behind them readers.

        ``reading`` are readers whose columns are divided at the same time.
        """
        channels = torch.arange(len(_weight(self.block.get_submodule(name))))
        changed = self._scaled(name, offset, torch.full((len(channels),), 2.0), reading)
        states = {at: _Digits(before) for at in wanted if (before := self.alone_before[at]) is not None}
        states = {at: state for at, state in states.items() if not state.is_same(changed[at])}
        for bit in range((len(channels) - 1).bit_length()):
            if not states:
                break
            is_one = (channels >> bit & 1).bool()
            ones = self._scaled(name, offset, torch.where(is_one, 2.0, 1.0), reading)
            zeros = self._scaled(name, offset, torch.where(is_one, 1.0, 2.0), reading)
            states = {at: state for at, state in states.items() if state.add(bit, ones[at], zeros[at])}
        shares = {at: state.share(len(channels)) for at, state in states.items()}
        return {at: share for at, share in shares.items() if share is not None}

    def _scaled(self, name: str, offset: float, factors: Tensor, reading: dict[str, Tensor]) -> list[Tensor | None]:
        with self._restored(name, *reading):
            factors = factors.to(_weight(self.block.get_submodule(name)).device)
            _multiply(self.block.get_submodule(name), offset, factors)
            for reader, share in reading.items():
                self.block.get_parameter(reader).div_(factors[share])
            return self._observe(self.alone)[0]

    def _observe(self, run: Run) -> tuple[list[Tensor | None], Tensor]:
        """Inputs (T, K) of the groups and of the readers, None for what did not run, and the output."""
        inputs: list[Tensor | None] = [None] * (len(self.groups) + len(self.readers))

        def keep(at: int) -> Callable[[nn.Module, Any], None]:
            def hook(_: nn.Module, args: Any) -> None:
                if inputs[at] is None and args and isinstance(args[0], Tensor):
                    inputs[at] = args[0].reshape(-1, args[0].shape[-1]).clone()

            return hook

        owners = [*self.groups, *((name.rpartition(".")[0],) for name in self.readers)]
        handles = [self.block.get_submodule(n).register_forward_pre_hook(keep(at)) for at, names in enumerate(owners) for n in names]
        try:
            output = run().clone()
        finally:
            for handle in handles:
                handle.remove()
        return inputs, output

    @contextlib.contextmanager
    def _restored(self, *names: str) -> Iterator[None]:
        """Put back the parameters ``names``, or all of modules of that name."""
        own = dict(self.block.named_parameters(remove_duplicate=False))
        chosen = [own[key] for key in own if key in names or key.rpartition(".")[0] in names]
        copies = [parameter.clone() for parameter in chosen]
        try:
            yield
        finally:
            for parameter, copy in zip(chosen, copies, strict=True):
                parameter.copy_(copy)


class _Digits:
    """The binary digits of the channel of each input, from what its values became when channels were doubled.

    One more channel may act on an input in another way, as a gate does: it shows nothing but that the value is neither kept nor
    doubled. The digit is told by the half of the channels without that one, or by the half that holds both.
    """

    def __init__(self, before: Tensor) -> None:
        self.before = before
        self.digits = torch.zeros(before.shape[-1], dtype=torch.int64, device=before.device)
        self.is_known = torch.ones(before.shape[-1], dtype=torch.bool, device=before.device) & (before != 0).any(0)

    def is_same(self, now: Tensor | None) -> bool:
        return now is not None and now.shape == self.before.shape and bool(_near(now, self.before).all())

    def add(self, bit: int, ones: Tensor | None, zeros: Tensor | None) -> bool:
        """Take the digit from inputs with the channels doubled where it is one, and where it is zero; False if some show none."""
        if ones is None or zeros is None or ones.shape != self.before.shape or zeros.shape != self.before.shape:
            return False
        is_one = _near(ones, 2 * self.before).all(0) | _near(zeros, self.before).all(0)
        is_zero = _near(zeros, 2 * self.before).all(0) | _near(ones, self.before).all(0)
        self.digits += is_one.long() << bit
        return bool((is_one != is_zero)[self.is_known].all())

    def share(self, channels: int) -> Tensor | None:
        """(K,), or None if it is not known. Inputs that were always 0 take their place in a row of channels."""
        if not self.is_known.any() or int(self.digits[self.is_known].max()) >= channels:
            return None
        if not self.is_known.all():
            place = torch.arange(len(self.digits), device=self.digits.device)
            start = (self.digits - place)[self.is_known]
            if (start != start[0]).any() or not 0 <= int(start[0]) <= channels - len(place):
                return None
            return place + start[0]
        return self.digits


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _multiply(module: nn.Module, offset: float, factors: Tensor) -> None:
    """Multiply the channels of a norm, or the rows of a linear layer, by ``factors`` (P,), bias included."""
    weight = _weight(module)
    if weight.dim() == 1:
        weight.copy_((weight + offset) * factors - offset)
    else:
        weight.mul_(factors[:, None])
    _multiply_bias(module, factors)


def _multiply_bias(module: nn.Module, factors: Tensor) -> None:
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.mul_(factors)


def _near(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).abs() <= TOLERANCE * wanted.abs()
