"""The steps of a tape as instructions of kernels/program.cpp, for the number of rows that it was noted with.

An instruction is WORDS whole numbers: what to do, the number of a linear layer, and what it takes, as the kernel reads it. An
operand is a base and an offset in bytes; sizes and strides are in elements.
"""

import ctypes
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swift.engine.native.tape import Step, Tape, Untraceable, View, views_in

WORDS = 32
OPS = (
    "copy neg silu gelu gelu_tanh relu tanh sigmoid pow rsqrt cos sin add sub mul div muls adds gate "
    "from_int add_int mean layer_norm gather linear rms_norm attend"
).split()
CODES = {name: code for code, name in enumerate(OPS)}
CONSTANT, WORKSPACE, FIRST_INPUT = 0, 1, 2  # bases
NUM_INPUTS = 2  # token ids and positions
ALIGNMENT = 64
MOST_DIMS = 4
Words = list[int]


class Slots:
    """Where in the workspace each storage lies while it is in use. Sizes are ``a`` + T ``b`` bytes at T rows."""

    def __init__(self, steps: Sequence[Step], sizes: Sequence[tuple[int, int]], inside: Sequence[bool], output: View) -> None:
        self._sizes: list[tuple[int, int]] = []
        self._slots: dict[int, int] = {}
        ends: dict[int, int] = {output.storage: len(steps)}
        for index, step in enumerate(steps):
            for view in _all(step):
                ends[view.storage] = max(ends.get(view.storage, 0), index)
        free: dict[tuple[int, int], list[int]] = {}
        for index, step in enumerate(steps):
            for storage in {view.storage for view in step.outputs}:
                if storage in self._slots or not inside[storage]:
                    continue
                size = sizes[storage]
                if not free.get(size):
                    free.setdefault(size, []).append(len(self._sizes))
                    self._sizes.append((_aligned(size[0]), _aligned(size[1])))
                self._slots[storage] = free[size].pop()
            for storage in {view.storage for view in _all(step)}:
                if ends[storage] == index and storage in self._slots:
                    free[sizes[storage]].append(self._slots[storage])

    def offset(self, storage: int, num_rows: int) -> int:
        """In bytes. Untraceable for a storage that nothing was written to."""
        if storage not in self._slots:
            raise Untraceable("it reads memory that nothing was written to")
        return sum(a + num_rows * b for a, b in self._sizes[: self._slots[storage]])

    def size(self, num_rows: int) -> int:
        """Of the workspace, in bytes."""
        return sum(a + num_rows * b for a, b in self._sizes)


class Encoder:
    """Instructions for ``num_rows`` rows. Raises Untraceable for steps that there is no instruction for."""

    def __init__(self, slots: Slots, constants: dict[int, Tensor], num_rows: int) -> None:
        self.slots, self.constants, self.num_rows = slots, constants, num_rows
        self.layers: list[int] = []  # in the order of their attention
        self.windows: list[int | None] = []
        self.linears: list[Any] = []  # layers, which an instruction knows by their number here

    def of(self, step: Step) -> list[Words]:
        """The instructions of a step."""
        name = step.name
        if (make := getattr(self, f"_{name.strip('_')}", None)) is not None:
            made = make(step, *step.arguments, **step.options)
            return made if made and isinstance(made[0], list) else [made]
        if name in ("neg", "silu", "relu", "tanh", "sigmoid", "rsqrt", "cos", "sin"):
            return [self._each(name, step.outputs[0], step.arguments[0])]
        raise Untraceable(f"there is no instruction for {name}")

    def place(self, view: View) -> tuple[int, int]:
        """Base and offset."""
        if view.storage < NUM_INPUTS:
            return FIRST_INPUT + view.storage, view.offset
        if view.storage in self.constants:
            return CONSTANT, self.constants[view.storage].untyped_storage().data_ptr() + view.offset
        return WORKSPACE, self.slots.offset(view.storage, self.num_rows) + view.offset

    def described(self, view: View) -> Words:
        """For whoever reads it from the workspace: offset, sizes, strides."""
        base, offset = self.place(view)
        if base != WORKSPACE or view.dtype != torch.float32:
            raise Untraceable("a result is not among what was computed")
        return [offset, *view.size, *view.stride]

    def _each(self, name: str, out: View, a: View, b: View | None = None, number: int = 0) -> Words:
        """An operation on each element."""
        if others := {view.dtype for view in (out, a, b or a)} - {torch.float32}:
            raise Untraceable(f"{name} of {others.pop()}")
        strides = [_broadcast(view, out.size) for view in (out, a)]
        strides.append(_broadcast(b, out.size) if b is not None else (0,) * len(out.size))
        sizes, merged = _merged(out.size, strides)
        words = [CODES[name], 0, *sizes]
        for view, stride in zip((out, a, b or a), merged, strict=True):
            words += [*self.place(view), *stride]
        return [*words, number]

    def _two(self, name: str, step: Step, a: Any, b: Any, alpha: float = 1) -> Words:
        out = step.outputs[0]
        if not isinstance(a, View):
            a, b = b, a
        if isinstance(b, View):
            return self._each(name, out, a, b, _bits(alpha))
        if name == "add" and out.dtype == torch.int64 and isinstance(b, int):
            return [CODES["add_int"], 0, math.prod(out.size), *self._whole(out), *self._whole(a), b * int(alpha)]
        return self._each("muls" if name == "mul" else "adds", out, a, None, _bits(b if name == "mul" else b * alpha))

    def _add(self, step: Step, a: Any, b: Any, *, alpha: float = 1) -> Words:
        return self._two("add", step, a, b, alpha)

    def _mul(self, step: Step, a: Any, b: Any) -> Words:
        return self._two("mul", step, a, b)

    def _sub(self, step: Step, a: Any, b: Any) -> Words:
        return self._each("sub", step.outputs[0], a, b) if isinstance(b, View) else self._two("add", step, a, -b)

    def _div(self, step: Step, a: Any, b: Any) -> Words:
        return self._each("div", step.outputs[0], a, b) if isinstance(b, View) else self._two("mul", step, a, 1 / b)

    def _pow(self, step: Step, a: View, power: float) -> Words:
        return self._each("pow", step.outputs[0], a, None, _bits(power))

    def _gelu(self, step: Step, a: View, *, approximate: str = "none") -> Words:
        return self._each("gelu" if approximate == "none" else "gelu_tanh", step.outputs[0], a)

    def _gate(self, step: Step, a: View, b: View, kind: str) -> Words:
        return self._each("gate", step.outputs[0], a, b, CODES[kind])

    def _clone(self, step: Step, a: View, **_: Any) -> Words:
        return self._each("copy", step.outputs[0], a)

    def _copy(self, step: Step, out: View, a: View, *_: Any) -> Words:
        return self._each("copy", out, a)

    def _to_copy(self, step: Step, a: View, **_: Any) -> Words:
        out = step.outputs[0]
        if a.dtype == torch.int64 and out.dtype == torch.float32:
            return [CODES["from_int"], 0, math.prod(out.size), *self._whole(out), *self._whole(a)]
        return self._each("copy", out, a)

    def _cat(self, step: Step, parts: tuple[View, ...], dim: int = 0) -> list[Words]:
        made, begin = [], 0
        for part in parts:
            made.append(self._each("copy", _narrowed(step.outputs[0], dim, begin, part.size[dim]), part))
            begin += part.size[dim]
        return made

    def _stack(self, step: Step, parts: tuple[View, ...], dim: int = 0) -> list[Words]:
        out = step.outputs[0]
        dim %= len(out.size)
        targets = [_narrowed(out, dim, index, 1) for index in range(len(parts))]
        return [self._each("copy", _without(target, dim), part) for target, part in zip(targets, parts, strict=True)]

    def _mean(self, step: Step, a: View, dims: tuple[int, ...], keepdim: bool = False) -> Words:
        if [dim % len(a.size) for dim in dims] != [len(a.size) - 1] or not keepdim or len(a.size) > MOST_DIMS:
            raise Untraceable("a mean over other than the last dimension")
        fill = MOST_DIMS - len(a.size)
        out = step.outputs[0]
        words = [CODES["mean"], 0, *[1] * fill, *a.size]
        return [*words, *self.place(out), *[0] * fill, *out.stride, *self.place(a), *[0] * fill, *a.stride]

    def _native_layer_norm(
        self, step: Step, a: View, shape: tuple[int, ...], weight: View | None, bias: View | None, epsilon: float
    ) -> Words:
        if len(shape) != 1:
            raise Untraceable("a norm over several dimensions")
        out, width = step.outputs[0], shape[0]
        pointers = [0 if view is None else self._constant(view) for view in (weight, bias)]
        return [CODES["layer_norm"], 0, math.prod(a.size) // width, width, *self._whole(a), *self._whole(out), *pointers, _bits(epsilon)]

    def _embedding(self, step: Step, weight: View, ids: View, *_: Any) -> Words:
        width = weight.size[1] * 4
        return [CODES["gather"], 0, math.prod(ids.size), width, self._constant(weight), *self._whole(ids), *self._whole(step.outputs[0])]

    def _linear(self, step: Step, x: View, layer: Any) -> Words:
        function = ctypes.cast(layer.function, ctypes.c_void_p).value or 0
        rows, inputs, outputs = math.prod(x.size[:-1]), layer.in_features, layer.out_features
        pointers = [layer.packed.data_ptr(), 0 if layer.bias is None else layer.bias.data_ptr()]
        if layer not in self.linears:
            self.linears.append(layer)
        return [
            CODES["linear"],
            self.linears.index(layer),
            function,
            rows,
            inputs,
            outputs,
            *self._whole(x),
            *pointers,
            *self._whole(step.outputs[0]),
        ]

    def _rms_norm(self, step: Step, x: View, norm: Any) -> Words:
        width = x.size[-1]
        words = [CODES["rms_norm"], 0, math.prod(x.size[:-1]), width, *self._whole(x), *self._whole(step.outputs[0])]
        return [*words, norm.weight.data_ptr(), _bits(norm.epsilon)]

    def _attend(self, step: Step, query: View, key: View, value: View, sinks: View | None, *, layer: int, **options: Any) -> Words:
        heads, width = query.size[1], query.size[3]
        window = options.get("sliding_window")
        if window not in self.windows:
            self.windows.append(window)
        self.layers.append(layer)
        scaling = options.get("scaling")
        words = [
            CODES["attend"],
            0,
            query.size[2],
            heads,
            key.size[1],
            width,
            value.size[3],
            len(self.layers) - 1,
            self.windows.index(window),
        ]
        words += [_bits(width**-0.5 if scaling is None else scaling), _bits(options.get("softcap") or 0.0)]
        words.append(0 if sinks is None else self._constant(sinks))
        for view in (query, key, value):
            if view.stride[3] != 1 or view.dtype != torch.float32:
                raise Untraceable("heads that do not lie in one piece")
            words += [*self.place(view), view.stride[2], view.stride[1]]
        return [*words, *self._whole(step.outputs[0])]

    def _whole(self, view: View) -> tuple[int, int]:
        """The place of a tensor that lies in one piece."""
        expected = 1
        for size, stride in zip(reversed(view.size), reversed(view.stride), strict=True):
            if size != 1 and stride != expected:
                raise Untraceable("a tensor that does not lie in one piece")
            expected *= size
        return self.place(view)

    def _constant(self, view: View) -> int:
        """The address of a float32 tensor of the model's that lies in one piece."""
        base, address = self._whole(view)
        if base != CONSTANT or view.dtype != torch.float32:
            raise Untraceable("weights that are computed")
        return address


def gated(steps: Sequence[Step]) -> list[Step]:
    """An activation and the product that it alone goes into become one step."""
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for storage in {view.storage for view in _all(step)}:
            readers.setdefault(storage, []).append(index)
    made: list[Step | None] = list(steps)
    for index, step in enumerate(steps):
        if step.name not in ("silu", "gelu"):
            continue
        (result,) = step.outputs
        own = readers[result.storage]
        other = made[own[1]] if len(own) == 2 else None
        if other is None or other.name != "mul" or not all(isinstance(argument, View) for argument in other.arguments):
            continue
        factors = [argument for argument in other.arguments if argument.storage != result.storage]
        if len(factors) == 1 and result in other.arguments and result.size == other.outputs[0].size:
            kind = "silu" if step.name == "silu" else "gelu" if step.options.get("approximate", "none") == "none" else "gelu_tanh"
            made[index] = None
            made[own[1]] = Step("gate", (step.arguments[0], factors[0], kind), {}, other.outputs)
    return [step for step in made if step is not None]


def _all(step: Step) -> list[View]:
    return list(views_in((step.arguments, step.options, step.outputs)))


def constants_of(tapes: Sequence[Tape]) -> dict[int, Tensor]:
    """What all passes read and none wrote. Untraceable if it was not the same."""
    for other in tapes[1:]:
        if other.constants.keys() != tapes[0].constants.keys():
            raise Untraceable("it does other things for other numbers of rows")
        for number, tensor in tapes[0].constants.items():
            mine = other.constants[number]
            if mine.data_ptr() != tensor.data_ptr() and not (mine.shape == tensor.shape and torch.equal(mine, tensor)):
                raise Untraceable("it reads something that depends on the rows")
    return tapes[0].constants


def _bits(value: float) -> int:
    """A float in the low half of a word."""
    return int.from_bytes(struct.pack("<f", value), "little")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _broadcast(view: View, size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of ``view`` when it is read as of ``size``."""
    missing = len(size) - len(view.size)
    own = zip(view.size, view.stride, size[missing:], strict=True)
    return (0,) * missing + tuple(0 if mine == 1 and whole != 1 else stride for mine, stride, whole in own)


def _merged(size: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """The same elements in MOST_DIMS dimensions, the one that lies closest in the first tensor last."""
    dims = sorted((dim for dim in range(len(size)) if size[dim] != 1), key=lambda dim: -strides[0][dim])
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim in dims:
        if sizes and all(own[-1] == stride[dim] * size[dim] for own, stride in zip(merged, strides, strict=True)):
            sizes[-1] *= size[dim]
            for own, stride in zip(merged, strides, strict=True):
                own[-1] = stride[dim]
            continue
        sizes.append(size[dim])
        for own, stride in zip(merged, strides, strict=True):
            own.append(stride[dim])
    if len(sizes) > MOST_DIMS:
        raise Untraceable("more dimensions than an instruction has")
    fill = MOST_DIMS - len(sizes)
    return [1] * fill + sizes, [[0] * fill + own for own in merged]


def _narrowed(view: View, dim: int, begin: int, length: int) -> View:
    dim %= len(view.size)
    size = (*view.size[:dim], length, *view.size[dim + 1 :])
    return View(view.storage, view.offset + begin * view.stride[dim] * view.dtype.itemsize, size, view.stride, view.dtype)


def _without(view: View, dim: int) -> View:
    size, stride = ((*part[:dim], *part[dim + 1 :]) for part in (view.size, view.stride))
    return View(view.storage, view.offset, size, stride, view.dtype)
