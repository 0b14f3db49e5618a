"""What a pass of a model does, noted operation by operation while it runs: the tensors that each reads and writes.

Views are no operations: a tensor is a storage with an offset, sizes and strides. What a storage holds before anything was
written to it is a constant of the model.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Untraceable(Exception):
    """The pass does something that no list of operations stands for. The message says what."""


@dataclass(frozen=True)
class View:
    """Where a tensor lies: the number of its storage, the offset in bytes, sizes and strides in elements."""

    storage: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """An operation by torch's name, or by that of a compiled one; ``arguments`` in its order, tensors as views."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: tuple[View, ...]


class Tape(TorchDispatchMode):
    """Notes what runs within. ``inputs`` get the first storage numbers, in their order; ``sizes`` are in bytes."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.sizes: list[int] = []
        self.constants: dict[int, Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no storage is used again
        self._is_paused = False
        for tensor in inputs:
            self._number(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        read = self._views(args), self._views(kwargs)  # before it runs: what it reads was there
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        if not all(isinstance(output, Tensor) for output in outputs):
            raise Untraceable(f"it reads values ({func})")
        name = func.overloadpacket.__name__
        if func._schema.is_mutable:
            self.steps.append(Step(name.removesuffix("_"), read[0], read[1], (self._view(args[0]),)))
        elif any(self._key(output) not in self._numbers for output in outputs):
            self.steps.append(Step(name, read[0], read[1], tuple(self.made(output) for output in outputs)))
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is noted."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def note(self, name: str, *arguments: Any, made: Tensor, **options: Any) -> None:
        """An operation that torch does not see."""
        read = self._views(arguments)
        self.steps.append(Step(name, read, options, (self.made(made),)))

    def made(self, tensor: Tensor) -> View:
        """The view of a tensor that an operation made."""
        self._number(tensor)
        return self._view(tensor)

    def _views(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if self._key(value) not in self._numbers:
                self.constants[self._number(value)] = value
            return self._view(value)
        if isinstance(value, tuple | list):
            return tuple(self._views(part) for part in value)
        return {name: self._views(part) for name, part in value.items()} if isinstance(value, dict) else value

    def _view(self, tensor: Tensor) -> View:
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return View(self._numbers[self._key(tensor)], offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def _number(self, tensor: Tensor) -> int:
        key = self._key(tensor)
        if key not in self._numbers:
            self._numbers[key] = len(self.sizes)
            self.sizes.append(tensor.untyped_storage().nbytes())
            self._kept.append(tensor)
        return self._numbers[key]

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)


def needed(steps: list[Step], output: View) -> list[Step]:
    """Those of ``steps`` that ``output`` depends on, and those that write keys and values."""
    wanted = {output.storage}
    kept = []
    for step in reversed(steps):
        if step.name == "attend" or any(view.storage in wanted for view in step.outputs):
            wanted |= {view.storage for view in views_in(step.arguments)} | {view.storage for view in views_in(step.options)}
            kept.append(step)
    return kept[::-1]


def views_in(value: Any) -> Iterator[View]:
    """All views in nested arguments."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from views_in(part)
    elif isinstance(value, dict):
        yield from views_in(tuple(value.values()))
