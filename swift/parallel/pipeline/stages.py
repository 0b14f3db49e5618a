"""A model cut into stages: each process keeps its own, and runs them by the model's own forward pass.

That forward pass computes masks, positions and rotary embeddings as it always does, in every process. Where blocks are
missing it passes gaps: the one before a stage's first block puts in what the stage before has sent, the one after its
last block holds what the next stage is to get. A trial against the whole model decides whether that is what it computes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ConfigError
from swift.model.policy import evaluating
from swift.parallel.pipeline.structure import HINT, Gap, Structure, agrees, probe

Swap = tuple[nn.Module, str, nn.Module]


class Cut:
    """A model of which a run of blocks can be run alone."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.gaps = [structure.gap(block) for block in structure.blocks]
        self.stand_ins = [side.stand_in() for side in structure.sides]

    def swaps(self, run: range, *, is_first: bool, is_last: bool) -> list[Swap]:
        """What stands in for what, when ``run`` alone is run; ``is_first`` with the embedding, ``is_last`` with norm and head."""
        blocks = self.structure.blocks
        swaps: list[Swap] = [(blocks, str(at), gap) for at, gap in enumerate(self.gaps) if at not in run]
        for side, stand_in in zip(self.structure.sides, self.stand_ins, strict=True):
            if not (is_first if side.is_before else is_last):
                swaps.append((side.parent, side.name, stand_in))
        return swaps

    @contextlib.contextmanager
    def running(self, run: range, swaps: Sequence[Swap], received: Tensor | None) -> Iterator[Gap | None]:
        """Within, the model computes ``run`` of ``received``, or from the embedding on if that is None. Yields the gap after it."""
        undo = [(parent, name, parent._modules[name]) for parent, name, _ in swaps]
        for parent, name, module in swaps:
            parent._modules[name] = module
        entry = self.gaps[run.start - 1] if run.start else None
        if entry is not None:
            entry.give(received)
        try:
            yield self.gaps[run.stop] if run.stop < len(self.gaps) else None
        finally:
            for parent, name, missing in undo:
                parent._modules[name] = missing
            for gap in self.gaps:
                gap.give(None)
                gap.seen = None


@torch.no_grad()
def check(structure: Structure, runs: Sequence[range]) -> None:
    """ConfigError unless the stages one after the other compute what the whole model does.

    Each stage computes something else in between, as if the next one were in another process: what it has left behind in
    this one, besides the hidden states, is of no use to the next.
    """
    cut, inner, last = Cut(structure), structure.inner, len(runs) - 1
    inputs = probe(inner)
    others = {**inputs, "input_ids": inputs["input_ids"].roll(1, dims=1)}

    def compute(stage: int, inputs: dict[str, Tensor], hidden: Tensor | None) -> Tensor:
        run = runs[stage]
        with cut.running(run, cut.swaps(run, is_first=stage == 0, is_last=stage == last), hidden) as after:
            output = inner(**inputs, use_cache=False)
            computed: Tensor = output.logits if after is None else after.take()
        return computed

    with evaluating(inner):
        wanted = inner(**inputs, use_cache=False).logits
        hidden: Tensor | None = None
        other: Tensor | None = None
        try:
            for stage in range(len(runs)):
                hidden, other = compute(stage, inputs, hidden), compute(stage, others, other)
            assert hidden is not None
            is_same = agrees(hidden, wanted)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError):
            is_same = False
    if not is_same:
        raise ConfigError(f"a pipeline cannot be made of {type(inner).__name__}: its stages do not compute what it does", hint=HINT)


@dataclass(frozen=True)
class Shared:
    """A trained parameter that another process has too: the gradients of both are added up."""

    name: str  # in this process
    peer: int  # the other one's rank in the pipeline
    is_counted: bool  # whether its norm counts here, else there


class Stages:
    """The stages of one process of a pipeline; it lets go of the parameters of the others."""

    def __init__(self, model: Any, structure: Structure, runs: Sequence[range], rank: int, processes: int) -> None:
        self.model, self.runs, self.structure = model, list(runs), structure
        self.cut = Cut(structure)
        self.mine = list(range(rank, self.count, processes))
        self.aliases = _aliases(model)
        lasting = [self._lasting(range(other, self.count, processes)) for other in range(processes)]
        self.shared = _shared([_kept(model, swaps) for swaps in lasting], rank)
        done = {(id(parent), name) for parent, name, _ in lasting[rank]}
        self._passing = {stage: [swap for swap in self._swaps(stage) if (id(swap[0]), swap[1]) not in done] for stage in self.mine}
        missing = [(parent, name, parent._modules[name]) for parent, name, _ in lasting[rank]]
        for parent, name, module in lasting[rank]:
            parent._modules[name] = module
        here = set(model.modules())
        for _, _, absent in missing:
            for part in set(absent.modules()) - here if absent is not None else ():
                _empty(part)
        self._missing = missing

    @property
    def count(self) -> int:
        """Stages of all processes."""
        return len(self.runs)

    @property
    def local_blocks(self) -> list[nn.Module]:
        """The blocks that this process has, in order."""
        return [block for block in self.structure.blocks if not isinstance(block, Gap)]

    @contextlib.contextmanager
    def running(self, stage: int, received: Tensor | None) -> Iterator[Gap | None]:
        """Within, the model computes ``stage`` of what the stage before has sent; yields the gap that holds what is to be sent."""
        with self.cut.running(self.runs[stage], self._passing[stage], received) as after:
            yield after

    @contextlib.contextmanager
    def seen_whole(self) -> Iterator[None]:
        """Within, ``model`` has all of its modules, those of other processes without numbers: for code that reads their names."""
        stands = [(parent, name, parent._modules[name]) for parent, name, _ in self._missing]
        for parent, name, module in self._missing:
            parent._modules[name] = module
        try:
            yield
        finally:
            for parent, name, module in stands:
                parent._modules[name] = module

    def received_dtype(self, stage: int) -> torch.dtype:
        """Of the hidden states that ``stage`` gets."""
        return self.structure.dtypes[self.runs[stage].start - 1]

    def _swaps(self, stage: int) -> list[Swap]:
        return self.cut.swaps(self.runs[stage], is_first=stage == 0, is_last=stage == self.count - 1)

    def _lasting(self, stages: Sequence[int]) -> list[Swap]:
        """What none of ``stages`` needs."""
        first, *others = [self._swaps(stage) for stage in stages]
        common = set.intersection(*({(id(parent), name) for parent, name, _ in swaps} for swaps in (first, *others)))
        return [swap for swap in first if (id(swap[0]), swap[1]) in common]


def _empty(module: nn.Module) -> None:
    """Leave shapes in place of the numbers of ``module`` itself."""
    for name, parameter in module.named_parameters(recurse=False):
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        module._parameters[name] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of ``model.state_dict()`` that stand for the same tensor as an earlier one, with that one's name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def _kept(model: nn.Module, swaps: Sequence[Swap]) -> dict[int, str]:
    """Trained parameters (by id) that remain after ``swaps``, each with its first name."""
    gone = {(id(parent), name) for parent, name, _ in swaps}
    found: dict[int, str] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                found.setdefault(id(parameter), prefix + name)
        for name, child in module.named_children():
            if (id(module), name) not in gone:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def _shared(kept: Sequence[dict[int, str]], rank: int) -> list[Shared]:
    """The trained parameters that process ``rank`` has in common with another, in the same order in both."""
    shared = []
    for parameter in dict.fromkeys(key for names in kept for key in names):
        owners = [other for other, names in enumerate(kept) if parameter in names]
        if len(owners) > 2:
            name = kept[owners[0]][parameter]
            raise ConfigError(f"a pipeline cannot be made: {name} is trained and used by {len(owners)} of its processes", hint=HINT)
        if len(owners) == 2 and rank in owners:
            peer = owners[1 - owners.index(rank)]
            shared.append(Shared(kept[rank][parameter], peer, is_counted=rank == owners[0]))
    return shared
