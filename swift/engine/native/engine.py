"""The native engine: requests in, deltas out, one forward pass a step."""

import secrets
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from swift import console
from swift.engine.base import Delta, Logprob, Request, Sampling, resolved
from swift.engine.growing import Growing, check_request, decoder, room_after
from swift.engine.native.blocks import ROOT, Blocks
from swift.engine.native.guide import Guides
from swift.engine.native.ngram import Guesser
from swift.engine.native.packed import Format
from swift.engine.native.pages import PagedCache
from swift.engine.native.runner import Runner, paging_fault
from swift.engine.native.sampler import Chooser, choose, logprobs
from swift.engine.native.scheduler import Part, Scheduler, Sequence
from swift.engine.native.score import TrieScorer
from swift.engine.native.vision import Vision, named, try_vision
from swift.engine.scoring import Score, Text, context_of
from swift.engine.writer import Writer
from swift.errors import DataError, ModelError
from swift.model.load import Loaded, end_tokens

LOGPROB_ROWS = 64  # of a prompt, whose logits are turned into log-probabilities at once


@dataclass(frozen=True, kw_only=True)
class NativeOptions:
    """``kv_cache_bytes`` is what keys and values may take; ``max_num_tokens`` what one forward pass computes at most.

    ``num_guessed``: tokens that are guessed from what was said before and computed along; 0 guesses none. ``weights``: the
    format that the engine keeps them in, for which it takes the model apart; None leaves the model as it is. ``packs_late``
    does so when the first request comes, and scores texts before it with the weights as they lie in their files, layer by layer.
    """

    kv_cache_bytes: int = 2**30
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_tokens: int = 512
    max_model_len: int | None = None
    shares_prefixes: bool = True
    num_guessed: int = 0
    weights: Format | Literal["auto"] | None = None
    packs_late: bool = False


@dataclass(eq=False)
class _Answer:
    """A request under way."""

    request: Request
    sampling: Sampling
    sequence: Sequence
    chooser: Chooser
    growing: Growing
    guesser: Guesser = field(default_factory=Guesser)
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)
    has_begun: bool = False


class NativeEngine:
    """Continuous batching over a paged cache. Raises ModelError for a model whose attention cannot be paged."""

    def __init__(self, loaded: Loaded, options: NativeOptions) -> None:
        model = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
        if (fault := paging_fault(model)) is not None:
            raise ModelError(f"the native engine cannot run this model: {fault}", hint="--infer_backend transformers")
        vision: Vision | None = None
        if loaded.processor is not None:
            vision, fault = try_vision(model, loaded.processor)
            if fault is not None:
                raise ModelError(f"the native engine cannot show images to this model: {fault}", hint="--infer_backend transformers")
        self.loaded = loaded
        self.options = options
        self.max_model_len = min(context_of(model), options.max_model_len or 2**62)
        self._generation_config = model.generation_config
        self._ends = tuple(end_tokens(model, loaded.tokenizer))
        runner = Runner(model, PagedCache(0, options.block_size))
        runner.vision = vision
        self.runner = runner
        if not options.packs_late:
            self._pack()
        bytes_per_token = runner.bytes_per_token()
        size = bytes_per_token * options.block_size
        most = -(-options.max_num_seqs * min(self.max_model_len, 2**31) // options.block_size)
        num_blocks = min(options.kv_cache_bytes // size, most)
        if num_blocks < 1:
            raise ModelError(f"{options.kv_cache_bytes} bytes hold no block of {options.block_size} tokens ({size} bytes)")
        runner.cache.num_blocks = num_blocks
        self.scheduler = Scheduler(
            Blocks(num_blocks, options.block_size),
            max_num_seqs=options.max_num_seqs,
            max_num_tokens=max(options.max_num_tokens, options.max_num_seqs),
            shares_prefixes=options.shares_prefixes,
        )
        self.scorer = TrieScorer(
            runner,
            context=self.max_model_len,
            bytes_per_token=bytes_per_token,
            kv_cache_bytes=options.kv_cache_bytes,
            max_num_tokens=options.max_num_tokens,
            is_layer_by_layer=options.packs_late,
        )
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._guides = Guides(loaded.tokenizer, self._vocabulary, self._ends)
        self._answers: dict[str, _Answer] = {}
        self.num_prompt_tokens = 0  # of requests that have begun to be answered
        self.num_cached_tokens = 0

    def add(self, request: Request) -> None:
        """See Engine."""
        check_request(request, self._answers, self.runner.adapters)
        self._pack()
        sampling = resolved(request.sampling, self._generation_config)
        cached = self.scheduler.blocks.num_blocks * self.options.block_size
        media = request.media
        if media is not None and self.runner.vision is None:
            raise DataError("the model reads text only: there is an image in the prompt")
        if media is not None and request.adapter is not None and not self.runner.vision.takes(self.runner.adapters.layers(request.adapter)):
            raise DataError(f"the adapter {request.adapter!r} changes how images are seen", hint="merge it: swift merge-lora")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._vocabulary:
            raise DataError(f"the prompt has tokens beyond the model's {self._vocabulary}")
        room = room_after(len(request.prompt), sampling, min(self.max_model_len, cached))
        salt = ROOT if request.adapter is None else self.runner.adapters.salt(request.adapter)
        sequence = Sequence(
            request.id,
            list(request.prompt),
            adapter=request.adapter,
            salt=salt,
            reads_cache=sampling.prompt_logprobs is None,
            media=media,
            named=() if media is None else named(request.prompt, media),
        )
        ends = () if sampling.ignore_eos else self._ends
        chooser = Chooser(
            sampling,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            prompt=frozenset(request.prompt),
            ends=tuple(sorted({*ends, *sampling.stop_token_ids})),
            guide=None if sampling.grammar is None else self._guides.make(sampling.grammar),
        )
        writer = Writer(decoder(self.loaded.tokenizer, skip_special_tokens=sampling.skip_special_tokens), sampling.stop_words)
        growing = Growing(request.id, writer, chooser.ends, room)
        self._answers[request.id] = _Answer(request, sampling, sequence, chooser, growing)
        self.scheduler.add(sequence)

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return self.scheduler.is_idle

    def facts(self) -> dict[str, float]:
        """How the engine stands, for metrics: counts since the start, and what is held now."""
        blocks = self.scheduler.blocks
        return {
            "num_requests_running": len(self.scheduler.running),
            "num_requests_waiting": len(self.scheduler.waiting),
            "num_preemptions_total": self.scheduler.num_preemptions,
            "kv_cache_usage_perc": 1 - blocks.num_free / blocks.num_blocks,
            "prefix_cache_queries_total": self.num_prompt_tokens,
            "prefix_cache_hits_total": self.num_cached_tokens,
        }

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """See Engine."""
        step = self.scheduler.plan()
        if not step.parts:
            return []
        logits = self.runner.run(step)
        prompts = [self._of_prompt(part, rows) for part, rows in zip(step.parts, logits, strict=True)]
        chosen = self._choose(step.parts, [rows for rows, _ in prompts])
        self.scheduler.computed(step, [tokens for tokens, _ in chosen])
        deltas = []
        for part, (tokens, values) in zip(step.parts, chosen, strict=True):
            if part.sequence.media is not None and (fault := self.runner.vision.fault(part.sequence)) is not None:
                deltas.append(Delta(id=part.sequence.id, finish_reason="abort", stopped_by=fault))
                self.abort(part.sequence.id)
            elif tokens:
                deltas.append(self._progress(self._answers[part.sequence.id], tokens, values))
        return deltas

    def embed(self, prompts: List[List[int]]) -> list[list[float]]:
        """A vector of length 1 for each prompt: the last hidden state of its last token. DataError for one that is too long."""
        for prompt in prompts:
            if not 0 < len(prompt) <= self.max_model_len:
                raise DataError(f"the prompt has {len(prompt)} tokens, the model's context {self.max_model_len}", hint="shorten it")
        vectors: list[list[float]] = []
        begin = 0
        while begin < len(prompts):
            end = begin + 1
            while end < len(prompts) and sum(map(len, prompts[begin : end + 1])) <= self.options.max_num_tokens:
                end += 1
            vectors += self.runner.embed(prompts[begin:end]).tolist()
            begin = end
        return vectors

    def scores(self, texts: List[Text], *, adapter: str | None = None) -> Iterator[tuple[int, Score]]:
        """See Scorer. ``adapter`` names one that is loaded. Keys and values take ``kv_cache_bytes`` at most, beside those of requests."""
        return self.scorer.scores(texts, adapter=adapter)

    def load_adapter(self, name: str, path: Path) -> None:
        """The LoRA adapter in ``path``, for requests that name it. CheckpointError if it does not fit."""
        self.runner.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """DataError if it is not loaded, or requests under way use it."""
        count = sum(answer.request.adapter == name for answer in self._answers.values())
        if count:
            raise DataError(f"{count} requests under way use the adapter {name!r}", hint="wait for them")
        self.runner.adapters.unload(name)

    def abort(self, id: str) -> None:
        """See Engine."""
        if (answer := self._answers.pop(id, None)) is not None:
            self.scheduler.remove(answer.sequence)

    def close(self) -> None:
        """See Engine."""
        for id in list(self._answers):
            self.abort(id)
        self.runner.cache.layers.clear()

    def _pack(self) -> None:
        """Weights get the format of the options, if they have not: prompts and answers are computed much faster by it."""
        if self.options.weights is None or self.runner.packed is not None:
            return
        self.runner.pack(self.options.weights)
        if self.runner.program is None:
            console.say(f"the model's own forward runs between the kernels, which is slower: {self.runner.why_no_program}")

    def _of_prompt(self, part: Part, rows: Tensor | None) -> tuple[Tensor | None, None]:
        """The rows of ``part`` that new tokens come from; those of a prompt are noted, if wanted, and taken away."""
        sequence = part.sequence
        if rows is None or sequence.reads_cache or part.begin >= sequence.num_prompt:
            return rows, None
        answer = self._answers[sequence.id]
        last = rows[part.end - part.begin - 1 :] if part.is_last else None
        noted = answer.prompt_logprobs
        if not noted:
            noted.append(None)  # nothing comes before the first token
        begin = len(noted)
        end = min(part.end + 1, sequence.num_prompt)
        for at in range(begin, end, LOGPROB_ROWS):
            tokens = sequence.tokens[at : min(at + LOGPROB_ROWS, end)]
            some = rows[at - 1 - part.begin : at - 1 - part.begin + len(tokens)]
            noted += logprobs(some, tokens, [answer.sampling.prompt_logprobs or 0] * len(tokens))
        return last, None

    def _choose(self, parts: List[Part], logits: List[Tensor | None]) -> list[tuple[list[int], list[Logprob]]]:
        """For each part the tokens that follow it, and their log-probabilities if these are wanted."""
        choosers: list[Chooser] = []
        places: list[int] = []
        rows: list[Tensor] = []
        for part, own in zip(parts, logits, strict=True):
            if own is None:
                continue
            answer = self._answers[part.sequence.id]
            rows.append(own)
            choosers += [answer.chooser] * len(own)
            places += range(answer.chooser.num_tokens, answer.chooser.num_tokens + len(own))
        if not rows:
            return [([], []) for _ in parts]
        together = torch.cat(rows) if len(rows) > 1 else rows[0]
        wanted = [chooser.sampling.logprobs for chooser in choosers]
        kept = together.clone() if any(count is not None for count in wanted) else together
        tokens = choose(together, choosers, places)
        values: dict[int, Logprob] = {}
        if kept is not together:
            asked = [row for row, count in enumerate(wanted) if count is not None]
            found = logprobs(kept[asked], [tokens[row] for row in asked], [wanted[row] or 0 for row in asked])
            values = dict(zip(asked, found, strict=True))
        result: list[tuple[list[int], list[Logprob]]] = []
        at = 0
        for part, own in zip(parts, logits, strict=True):
            if own is None:
                result.append(([], []))
                continue
            count = _accepted(tokens[at : at + len(own)], part.sequence.draft[: part.num_draft])
            result.append((tokens[at : at + count], [values[row] for row in range(at, at + count) if row in values]))
            at += len(own)
        return result

    def _progress(self, answer: _Answer, tokens: list[int], values: list[Logprob]) -> Delta:
        """Tokens are added to an answer, as many as belong to it; it is taken away if they end it."""
        chooser = answer.chooser
        delta = answer.growing.add(tokens, values, follow=chooser.accept)
        if delta.finish_reason is not None:
            self.abort(answer.request.id)
        elif self.options.num_guessed and chooser.is_plain:
            most = min(self.options.num_guessed, answer.growing.room - chooser.num_tokens - 1)
            answer.sequence.draft = answer.guesser.guess(answer.sequence.tokens, most) if most > 0 else []
        begins, answer.has_begun = not answer.has_begun, True
        if begins:
            self.num_prompt_tokens += answer.sequence.num_prompt
            self.num_cached_tokens += answer.sequence.num_cached
        noted = tuple(answer.prompt_logprobs) if begins and answer.sampling.prompt_logprobs is not None else None
        return replace(delta, prompt_logprobs=noted, num_cached=answer.sequence.num_cached)


def _accepted(tokens: List[int], draft: List[int]) -> int:
    """How many of the chosen tokens stand: one after each right guess, and the first."""
    count = 1
    for chosen, guessed in zip(tokens, draft, strict=False):
        if chosen != guessed:
            break
        count += 1
    return count
