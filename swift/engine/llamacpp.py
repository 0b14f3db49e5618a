"""The engine over llama.cpp: many answers in one batch of its low-level interface, chosen by the native engine's sampler."""

import ctypes
import secrets
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift import deps
from swift.engine.base import Delta, Request
from swift.engine.native.guide import Guides
from swift.engine.native.sampler import Chooser, choose, logprobs
from swift.engine.outside import Answer, Taker
from swift.engine.source import Source
from swift.errors import ConfigError, MachineError, ModelError

KNOWN = frozenset(
    "min_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed grammar"
    " logprobs".split()
)
BATCH = 512  # tokens of a pass
CONTEXT = 8192  # tokens of all answers under way together, unless more or less is asked for


@dataclass(eq=False)
class _Sequence:
    answer: Answer
    chooser: Chooser
    slot: int
    tokens: list[int]  # prompt and answer, of which the first ``num_computed`` have keys and values
    num_computed: int = 0

    @property
    def reserved(self) -> int:
        """Tokens that it may come to have."""
        return len(self.answer.request.prompt) + self.answer.room


class LlamaCppEngine:
    """Sequences are begun in the order of arrival, as soon as their prompts and longest answers fit into the context together."""

    def __init__(self, source: Source, file: Path, *, num_slots: int, num_context: int, num_threads: int) -> None:
        llama: Any = deps.require("llama_cpp", extra="llamacpp")
        self._llama = llama
        self._silence = llama.llama_log_callback(lambda level, text, data: None)  # kept: llama.cpp holds no reference
        llama.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        if not self._model:
            raise ModelError(f"llama.cpp cannot read {file}", hint="a newer llama-cpp-python may know its architecture")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = num_context, BATCH, BATCH, num_slots
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = True  # one pool for all sequences
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise MachineError(f"llama.cpp has no room for {num_context} tokens", hint="--llamacpp_n_ctx takes fewer")
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self._vocabulary = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        if self._vocabulary < len(source.tokenizer):
            raise ModelError(f"{file} has {self._vocabulary} tokens, its tokenizer {len(source.tokenizer)}")
        self._num_context = num_context
        self.max_model_len = min(source.max_model_len, num_context)
        self._guides = Guides(source.tokenizer, self._vocabulary, source.ends)
        self._taker = Taker("llamacpp", source, KNOWN)
        self._free = list(range(num_slots))
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []

    def add(self, request: Request) -> None:
        """See Engine."""
        under_way = [sequence.answer.request.id for sequence in (*self._waiting, *self._running)]
        answer = self._taker.answer(request, under_way, self.max_model_len)
        settled = answer.settled
        chooser = Chooser(
            settled,
            seed=secrets.randbits(63) if settled.seed is None else settled.seed,
            prompt=frozenset(request.prompt),
            ends=tuple(sorted(answer.ends)),
            guide=None if settled.grammar is None else self._guides.make(settled.grammar),
        )
        self._waiting.append(_Sequence(answer, chooser, -1, list(request.prompt)))

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return not (self._waiting or self._running)

    def step(self) -> list[Delta]:
        """See Engine. One pass: the last token of all that are answering, then as much of prompts as there is room for."""
        self._admit()
        parts: list[tuple[_Sequence, int]] = []
        room = BATCH
        for sequence in sorted(self._running, key=lambda sequence: len(sequence.tokens) - sequence.num_computed > 1):
            count = min(len(sequence.tokens) - sequence.num_computed, room)
            if count:
                parts.append((sequence, count))
                room -= count
        if not parts:
            return []
        logits = self._compute(parts)
        asked = [sequence for sequence, _ in parts if sequence.num_computed == len(sequence.tokens)]
        return self._choose(asked, logits) if asked else []

    def abort(self, id: str) -> None:
        """See Engine."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.answer.request.id != id)
        for sequence in [sequence for sequence in self._running if sequence.answer.request.id == id]:
            self._running.remove(sequence)
            self._llama.llama_memory_seq_rm(self._llama.llama_get_memory(self._context), sequence.slot, -1, -1)
            self._free.append(sequence.slot)

    def close(self) -> None:
        """See Engine."""
        self._waiting, self._running = deque(), []
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
            self._llama.llama_model_free(self._model)
            self._context = None

    def _admit(self) -> None:
        reserved = sum(sequence.reserved for sequence in self._running)
        while self._waiting and self._free and reserved + self._waiting[0].reserved <= self._num_context:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            reserved += sequence.reserved
            self._running.append(sequence)

    def _compute(self, parts: list[tuple[_Sequence, int]]) -> Tensor:
        """(N, V) logits of the last token of each part that is a sequence's last."""
        batch, at, wanted = self._batch, 0, []
        for sequence, count in parts:
            for _ in range(count):
                place = sequence.num_computed
                is_last = place == len(sequence.tokens) - 1
                batch.token[at], batch.pos[at] = sequence.tokens[place], place
                batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, sequence.slot, is_last
                wanted += [at] if is_last else []
                sequence.num_computed += 1
                at += 1
        batch.n_tokens = at
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise MachineError(f"llama.cpp could not compute a pass of {at} tokens (status {status})")
        rows = torch.empty(len(wanted), self._vocabulary)
        for row, place in enumerate(wanted):
            pointer = self._llama.llama_get_logits_ith(self._context, place)
            ctypes.memmove(rows[row].data_ptr(), pointer, 4 * self._vocabulary)
        return rows

    def _choose(self, sequences: list[_Sequence], logits: Tensor) -> list[Delta]:
        choosers = [sequence.chooser for sequence in sequences]
        counts = [chooser.sampling.logprobs for chooser in choosers]
        kept = logits.clone() if any(count is not None for count in counts) else logits
        tokens = choose(logits, choosers, [chooser.num_tokens for chooser in choosers])
        values = logprobs(kept, tokens, [count or 0 for count in counts]) if kept is not logits else []
        deltas = []
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence.tokens.append(token)
            delta = sequence.answer.add([token], (values[row],) if counts[row] is not None else (), follow=sequence.chooser.accept)
            assert delta is not None
            deltas.append(delta)
            if delta.finish_reason is not None:
                self.abort(delta.id)
        return deltas


def gguf_file(model: str | None) -> Path:
    """The GGUF file that --model names, itself or as the only one of a folder. ConfigError if it is something else."""
    path = Path(model or "").expanduser()
    found = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf")) if model and path.is_dir() else []
    if len(found) != 1:
        raise ConfigError("--infer_backend llamacpp reads GGUF files, which --model does not name", hint="say --model FILE.gguf")
    return found[0]


def make(source: Source) -> LlamaCppEngine:
    """As the options say."""
    config = source.config
    source.refuse_adapter("llamacpp")
    file = gguf_file(config.model)
    num_context = config.llamacpp_n_ctx or max(min(source.max_model_len, CONTEXT), min(config.max_model_len or 0, source.max_model_len))
    return LlamaCppEngine(source, file, num_slots=config.max_batch_size or 16, num_context=num_context, num_threads=torch.get_num_threads())
