"""The calibration text through one block, part by part, so that each layer sees what its quantized predecessors give it.

Each product is computed once: a pass ends where the inputs of the layers at hand are known, and what a part of the block (attention,
MLP) gave is kept on disk for the passes that follow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift.model.experts import SeparateExperts
from swift.quantize.base import Inputs
from swift.quantize.skeleton import Call, Skeleton
from swift.quantize.store import Store
from swift.quantize.trial import Group, Level, find_levels

# B rows, T tokens, n tokens without padding, K inputs of a layer, D model width

HESSIAN_BYTES = 2**30  # of the Hessians that are gathered in one pass
PARTS = 4  # of the columns of a Hessian: what is below the diagonal is copied, not computed


@dataclass(frozen=True)
class Batch:
    """Documents side by side: ``ids`` (B, T), padded at the right, of which row b has ``lengths[b]`` tokens."""

    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def keep(self, states: Tensor) -> Tensor:
        """(n, K): ``states`` (B, T, K), or (B * T, K), without padding."""
        rows, length = self.shape
        if self.tokens == rows * length:
            return states.reshape(-1, states.shape[-1])
        return states.reshape(rows * length, -1)[self.valid().to(states.device)]

    def valid(self) -> Tensor:
        """(B * T,): what is no padding."""
        return (torch.arange(self.ids.shape[1])[None] < torch.tensor(self.lengths)[:, None]).flatten()


def batches_of(documents: list[list[int]], size: int | None) -> list[Batch]:
    """Documents, the longest first, ``size`` to a batch (None: as many as have some 1,024 tokens), of few different lengths."""
    ordered = sorted(documents, key=len, reverse=True)
    batches = []
    while ordered:
        length = -(-len(ordered[0]) // 32) * 32
        taken = ordered[: size or max(1, 1024 // length)]
        ordered = ordered[len(taken) :]
        length = length if any(len(row) != len(taken[0]) for row in taken) or len(taken[0]) % 32 else len(taken[0])
        ids = torch.tensor([row + [0] * (length - len(row)) for row in taken])
        batches.append(Batch(ids, tuple(map(len, taken))))
    return batches


class _Stop(Exception):
    pass


@dataclass(frozen=True)
class _Look:
    """What is done with the input of a group."""

    seen: dict[Group, Inputs]
    index: int
    batch: Batch
    needs: frozenset[str]
    spill: Store | None
    stops: bool

    def __call__(self, group: Group, x: Tensor) -> None:
        # What an expert gets has neither rows nor padding of its own.
        has_rows = x.numel() // x.shape[-1] == self.batch.ids.numel()
        gather(self.seen[group], self.batch.keep(x) if has_rows else x, self.needs)
        if self.spill is not None:
            self.spill.write(self.index, x)
        if self.stops:
            raise _Stop


class BlockPasses:
    """One block with the text ``batches`` whose hidden states are in ``hidden``. Files are made in ``folder``."""

    def __init__(
        self, skeleton: Skeleton, block: nn.Module, batches: list[Batch], hidden: Store, calls: dict[tuple[int, int], Call], folder: Path
    ) -> None:
        self.skeleton, self.block, self.batches, self.hidden, self.calls = skeleton, block, batches, hidden, calls
        self.folder = folder
        self.kept: dict[str, Store] = {}
        """What parts of the block gave, by their names."""
        self.lengths: dict[str, int] = {}
        """Lengths of the tuples that parts give, 0 for a tensor."""

    def levels(self, skips: Any) -> list[Level]:
        """What is quantized one after the other."""
        call = self.calls[self.batches[0].shape]
        levels, self.lengths = find_levels(self.block, lambda: self._run(self.hidden.read(0), call), skips)
        return levels

    def inputs(self, level: Level, needs: frozenset[str]) -> Iterator[tuple[Group, Inputs]]:
        """What is seen of the inputs of each group of ``level``. The next one is gathered when the last one's layers are done with."""
        for part in self._parts(level):
            seen = {group: Inputs() for group in part}
            spill = self._spill(part[0]) if len(level) == 1 and part[0].ends_child else None
            for index, batch in enumerate(self.batches):
                look = _Look(seen, index, batch, needs, spill, len(level) == 1)
                with self._looking(part, look):
                    self._try_run(index, batch)
            for group, inputs in seen.items():
                if inputs.hessian is not None:
                    inputs.hessian = mirror(inputs.hessian)
                yield group, inputs
                inputs.hessian = None

    def finish(self, group: Group, weight: Tensor) -> None:
        """The layers of ``group`` are quantized. If they end a part, keep what the part gives: x ``weight``' of its last layer."""
        if not group.ends_child:
            return
        layer: Any = self.block.get_submodule(group.layers[0])
        store = self.kept[group.child or ""]
        width = weight.shape[0]
        out = Store(self.folder / f"{group.child}.out", [batch.ids.numel() * width for batch in self.batches], torch.float32)
        for index in range(len(self.batches)):
            x = store.read(index).to(weight.device)
            out.write(index, nn.functional.linear(x, weight, layer.bias))
        store.close()
        self.kept[group.child or ""] = out

    def outputs(self, into: Store) -> None:
        """Run the block to its end and write what it gives."""
        for index, batch in enumerate(self.batches):
            with self._given(index):
                into.write(index, self._run(self.hidden.read(index), self.calls[batch.shape]))

    def close(self) -> None:
        """The files stay: the next block writes into the same places, which the system has at hand."""
        for store in self.kept.values():
            store.close()
        self.kept.clear()

    def _run(self, hidden: Tensor, call: Call) -> Tensor:
        return self.skeleton.run(self.block, hidden.to(self.skeleton.device), call)

    def _try_run(self, index: int, batch: Batch) -> None:
        try:
            with self._given(index):
                self._run(self.hidden.read(index), self.calls[batch.shape])
        except _Stop:
            pass

    def _parts(self, level: Level) -> Iterator[Level]:
        """Groups whose Hessians are in memory at the same time."""
        part: list[Group] = []
        used = 0
        for group in level:
            layer: Any = self.block.get_submodule(group.layers[0])
            size = 4 * layer.in_features**2
            if part and used + size > HESSIAN_BYTES:
                yield tuple(part)
                part, used = [], 0
            part.append(group)
            used += size
        yield tuple(part)

    def _spill(self, group: Group) -> Store:
        layer: Any = self.block.get_submodule(group.layers[0])
        sizes = [batch.ids.numel() * layer.in_features for batch in self.batches]
        store = Store(self.folder / f"{group.child}.in", sizes, torch.float16)
        self.kept[group.child or ""] = store
        return store

    @contextmanager
    def _looking(self, part: Level, look: Any) -> Iterator[None]:
        """``look`` is called with a group and its input when its first layer is."""
        handles = []
        for group in part:

            def hook(module: nn.Module, args: tuple[Any, ...], group: Group = group) -> None:
                look(group, args[0])

            handles.append(self.block.get_submodule(group.layers[0]).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _given(self, index: int) -> Iterator[None]:
        """Parts whose results are kept give these for batch ``index``."""
        experts = [module for module in self.block.modules() if isinstance(module, SeparateExperts)]
        for module in experts:
            module.valid = self.batches[index].valid().to(self.skeleton.device)
        replaced = []
        for name, store in self.kept.items():
            if index in store and store.path.suffix == ".out":
                child = getattr(self.block, name)
                replaced.append((name, child))
                setattr(self.block, name, _Given(store.read(index).to(self.skeleton.device), self.lengths[name]))
        try:
            yield
        finally:
            for name, child in replaced:
                setattr(self.block, name, child)
            for module in experts:
                module.valid = None


class _Given(nn.Module):
    """Gives what the part in whose place it is gave before; ``length`` is that of its tuple, 0 if it gives a tensor."""

    def __init__(self, output: Tensor, length: int) -> None:
        super().__init__()
        self.output = output
        self.length = length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.output, *[None] * (self.length - 1)) if self.length else self.output


def gather(inputs: Inputs, x: Tensor, needs: frozenset[str]) -> None:
    """Add the inputs ``x`` (n, K) to the means and maxima of ``inputs``."""
    if not len(x):
        return
    before, inputs.count = inputs.count, inputs.count + len(x)
    if "hessian" in needs:
        if inputs.hessian is None:
            inputs.hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        _add_products(inputs.hessian, x, before / inputs.count, 1 / inputs.count)
    if "mean_abs" in needs or "max_abs" in needs:
        size = x.abs()
        mean, high = size.mean(0), size.amax(0)
        share = before / inputs.count
        inputs.mean_abs = mean if inputs.mean_abs is None else inputs.mean_abs * share + mean * (1 - share)
        inputs.max_abs = high if inputs.max_abs is None else torch.maximum(inputs.max_abs, high)


def _add_products(hessian: Tensor, x: Tensor, keep: float, share: float) -> None:
    """hessian = keep * hessian + share * x' x, of which the lower part is left to ``mirror``."""
    width = len(hessian)
    step = -(-width // PARTS)
    for begin in range(0, width, step):
        rows = slice(begin, min(width, begin + step))
        hessian[rows, begin:].addmm_(x[:, rows].T, x[:, begin:], beta=keep, alpha=share)


def mirror(hessian: Tensor) -> Tensor:
    """The whole symmetric matrix, of whose lower part the blocks on the diagonal alone are known."""
    return hessian.triu() + hessian.triu(1).T
