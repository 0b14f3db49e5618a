"""A model's decoder as a list of instructions that the compiled kernels run in one call, without Python in between.

Where the list comes from: the decoder runs three times with different numbers of rows, and all that happens is noted
(tape.py). Every number in the list (sizes, strides, places in memory) must then be a linear function of the rows; a pass of
any size is that function at its rows. No model is known by name: what the list cannot say (experts that are chosen by
value, scalings that depend on values) is left to the model's own forward, and so is a list that does not give its results.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.engine.native.adapters import Updates
from swift.engine.native.compiled import kernels
from swift.engine.native.instructions import NUM_INPUTS, WORDS, Encoder, Slots, constants_of, gated
from swift.engine.native.packed import CompiledNorm, PackedLinear
from swift.engine.native.pages import Attention, PagedCache, Pages, Piece
from swift.engine.native.tape import Step, Tape, Untraceable, View, needed
from swift.errors import first_line
from swift.model.attention import NO_MASK_SHAPE
from swift.model.policy import Policy, is_close, probe_ids

ROWS = (3, 5, 9)  # of the passes that are noted
FAULTS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

# T rows, D width of the hidden states


@dataclass(frozen=True)
class _Line:
    """Whole numbers that are ``base`` + T ``slope``."""

    base: np.ndarray
    slope: np.ndarray

    @staticmethod
    def through(found: Sequence[Sequence[int]]) -> "_Line":
        """Of the numbers at ROWS. Raises Untraceable if they lie on no line."""
        if len({len(numbers) for numbers in found}) != 1:
            raise Untraceable("it does other things for other numbers of rows")
        first, second, third = (np.array(numbers, dtype=np.int64) for numbers in found)
        slope = (second - first) // (ROWS[1] - ROWS[0])
        line = _Line(first - ROWS[0] * slope, slope)
        if not (np.array_equal(line.at(ROWS[1]), second) and np.array_equal(line.at(ROWS[2]), third)):
            raise Untraceable("its sizes are no linear function of the rows")
        return line

    def at(self, num_rows: int) -> np.ndarray:
        numbers: np.ndarray = self.base + num_rows * self.slope
        return numbers


@dataclass(frozen=True)
class _Layer:
    """What an attention function asks of a module."""

    layer_idx: int


@dataclass(frozen=True)
class _Attend:
    """An attention in the list: the number of its instruction, its layer, what it is told, and a row's key and value (G, d).

    ``views``: offset, sizes and strides of query, key, value and result, for torch to find them.
    """

    index: int
    layer: _Layer
    options: dict[str, Any]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    views: tuple[_Line, ...]


class Program:
    """The decoder of a model, for rows of tokens of many sequences."""

    def __init__(self, policy: Policy) -> None:
        """Raises Untraceable if there is no list for the model."""
        passes = [_noted(policy, num_rows) for num_rows in ROWS]
        tapes = [tape for tape, _ in passes]
        self._constants = constants_of(tapes)  # held, since instructions point to them
        lists = [gated(needed(tape.steps, output)) for tape, output in passes]
        if len({tuple(step.name for step in steps) for steps in lists}) != 1:
            raise Untraceable("it does other things for other numbers of rows")
        sizes = _Line.through([tape.sizes for tape in tapes])
        inside = [number >= NUM_INPUTS and number not in self._constants for number in range(len(tapes[0].sizes))]
        self._slots = Slots(lists[0], list(zip(sizes.base.tolist(), sizes.slope.tolist(), strict=True)), inside, passes[0][1])
        encoders = [Encoder(self._slots, self._constants, num_rows) for num_rows in ROWS]
        made = [[encoder.of(step) for step in steps] for encoder, steps in zip(encoders, lists, strict=True)]
        self._words = _Line.through([_flat(instructions) for instructions in made])
        self._output = _Line.through([encoder.described(output) for encoder, (_, output) in zip(encoders, passes, strict=True)])
        self._windows = encoders[0].windows
        self.linears = encoders[0].linears  # the packed layers that it computes
        self._attends = []
        index = 0
        for number, instructions in enumerate(made[0]):
            if lists[0][number].name == "attend":
                self._attends.append(_attend(index, encoders, [steps[number] for steps in lists], self._constants))
            index += len(instructions)
        self.num_instructions = index
        self._run = kernels().run_program
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._bound: tuple[int, np.ndarray] = (0, self._words.base)

    def run(self, ids_T: Tensor, positions_T: Tensor, pages: Attention, updates: Updates | None = None) -> Tensor:
        """(T, D), with what adapters add to the rows; the next call writes over it."""
        num_rows = len(ids_T)
        program = self._at(num_rows)
        layers = [pages.cache.float32(attend.layer.layer_idx, *attend.shapes) for attend in self._attends]
        caches = _pointers([part for pair in layers for part in pair])
        given = [0, self._workspace.data_ptr(), ids_T.data_ptr(), positions_T.data_ptr(), pages.written.data_ptr()]
        table = pages.whole_table
        if table is None:
            given += [0] * 6
        else:
            firsts = [table.first(window) for window in self._windows]
            windows = _pointers(firsts)
            given += [table.blocks.data_ptr(), table.blocks.shape[1], table.context.data_ptr(), pages.cache.block_size]
            given += [ctypes.addressof(caches), ctypes.addressof(windows)]
        given += [0, 0] if updates is None else [len(updates.parts), updates.parts.ctypes.data]
        words = (ctypes.c_int64 * len(given))(*given)
        begin = 0
        if table is None:  # many queries of one sequence: torch's kernels are the better ones
            for attend in self._attends:
                self._run(program.ctypes.data, begin, attend.index, words)
                query, key, value, out = (self._tensor(view) for view in attend.views)
                out.copy_(pages(attend.layer, query, key, value, **attend.options))
                begin = attend.index + 1
        self._run(program.ctypes.data, begin, self.num_instructions, words)
        return self._tensor(self._output)[0]

    def workspace_bytes(self, num_rows: int) -> int:
        """Memory for all that is computed in a pass of so many rows."""
        return self._slots.size(num_rows)

    def _at(self, num_rows: int) -> np.ndarray:
        if self._bound[0] != num_rows:
            self._bound = num_rows, self._words.at(num_rows)
            if (size := self.workspace_bytes(num_rows)) > len(self._workspace):
                self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._bound[1]

    def _tensor(self, view: _Line) -> Tensor:
        offset, *rest = view.at(self._bound[0]).tolist()
        half = len(rest) // 2
        return self._workspace.view(torch.float32).as_strided(rest[:half], rest[half:], offset // 4)


def program_of(policy: Policy) -> tuple[Program | None, str]:
    """The program of a model whose layers are packed; or None, and why there is none. It is compared with the model's own forward."""
    try:
        if not policy.has_own_head:
            raise Untraceable("its head cannot be told from its decoder")
        program = Program(policy)
        if not _agrees(program, policy):
            raise Untraceable("its results are not those of the model")
    except Untraceable as problem:
        return None, str(problem)
    except FAULTS as problem:  # of models that nobody has seen: the list is a matter of speed, not worth an engine
        return None, f"it cannot be watched: {first_line(problem)}"
    return program, ""


@torch.no_grad()
def _noted(policy: Policy, num_rows: int) -> tuple[Tape, View]:
    """What a pass over so many sequences of one token does, and where its hidden states are."""
    ids, positions = probe_ids(policy.inner, num_rows), torch.arange(num_rows)[None] % 2
    pages = _pages(PagedCache(num_rows, 2), num_rows)
    mask = torch.zeros(NO_MASK_SHAPE, dtype=torch.bool)
    tape = Tape(ids, positions)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        sinks = options.pop("s_aux", None)
        with tape.paused():
            out = pages(module, query, key, value, s_aux=sinks, **options)
        tape.note("attend", query, key, value, sinks, made=out, layer=module.layer_idx, **_plain(options))
        return out

    with _noting(policy.decoder, tape), tape:
        output = policy.decoder(input_ids=ids, position_ids=positions, attention_mask=mask, attend=attend, use_cache=False)
    return tape, tape.made(output.last_hidden_state)


@contextlib.contextmanager
def _noting(model: Any, tape: Tape) -> Iterator[None]:
    """Within, the compiled layers of ``model`` note what they do."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, PackedLinear | CompiledNorm)]

    def noted(module: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            x = x.contiguous()
            with tape.paused():
                out: Tensor = type(module).forward(module, x)
            tape.note("linear" if isinstance(module, PackedLinear) else "rms_norm", x, module, made=out)
            return out

        return forward

    for module in modules:
        module.forward = noted(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own is seen again


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """What an attention is told that changes what it computes."""
    return {name: options[name] for name in ("scaling", "sliding_window", "softcap") if options.get(name) is not None}


def _attend(index: int, encoders: Sequence[Encoder], steps: Sequence[Step], constants: dict[int, Tensor]) -> _Attend:
    options = dict(steps[0].options)
    layer = options.pop("layer")
    if any(step.options != steps[0].options for step in steps):
        raise Untraceable("it does other things for other numbers of rows")
    key, value, sinks = steps[0].arguments[1:]
    if sinks is not None:
        options["s_aux"] = constants[sinks.storage]
    found = [
        [encoder.described(view) for view in (*step.arguments[:3], *step.outputs)] for encoder, step in zip(encoders, steps, strict=True)
    ]
    views = tuple(_Line.through(each) for each in zip(*found, strict=True))
    shapes = (key.size[1], key.size[3]), (value.size[1], value.size[3])
    return _Attend(index, _Layer(layer), options, shapes, views)


@torch.no_grad()
def _agrees(program: Program, policy: Policy) -> bool:
    """Whether the program gives the decoder's hidden states: tokens of many sequences, one by one and in parts, and one alone."""
    caches = PagedCache(24, 4), PagedCache(24, 4)
    vocabulary = policy.inner.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    done = [0] * 8
    for lengths in ((1, 1, 1, 1, 1, 1, 1, 1), (1, 2, 0, 1, 3, 0, 0, 1), (0, 0, 1, 0, 0, 0, 0, 0), (1, 1, 9, 1, 1, 1, 1, 1), (1,) * 8):
        pieces: list[Piece] = []
        positions: list[int] = []
        for number, length in enumerate(lengths):
            if length:
                blocks = tuple(3 * number + turn for turn in (1, 2, 0))
                pieces.append(Piece(len(positions), length, done[number] + length, blocks))
                positions += range(done[number], done[number] + length)
            done[number] += length
        ids = torch.randint(1, vocabulary, (len(positions),), generator=draw)
        given = ids, torch.tensor(positions)
        kernel = kernels().paged_attention
        pages = [Pages(cache, pieces, ids.device, kernel) for cache in caches]
        mask = torch.zeros(NO_MASK_SHAPE, dtype=torch.bool)
        wanted = policy.decoder(
            input_ids=given[0][None], position_ids=given[1][None], attention_mask=mask, attend=pages[0], use_cache=False
        ).last_hidden_state[0]
        if not is_close(program.run(*given, pages[1]), wanted):
            return False
    return True


def _pages(cache: PagedCache, num_rows: int) -> Pages:
    return Pages(cache, [Piece(row, 1, 1 + row % 2, (row,)) for row in range(num_rows)], torch.device("cpu"), kernels().paged_attention)


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * max(len(tensors), 1))(*[tensor.data_ptr() for tensor in tensors])


def _flat(made: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """All words, one instruction behind the other."""
    return [word for instructions in made for words in instructions for word in (*words, *[0] * (WORDS - len(words)))]
