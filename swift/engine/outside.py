"""What engines of other packages share: an answer whose tokens they compute, and the refusal of what they do not know."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from swift.engine.base import Delta, FinishReason, Logprob, Request, Sampling, resolved
from swift.engine.source import Source
from swift.engine.writer import Writer
from swift.errors import DataError

# What every engine must be able to be told.
ALWAYS = frozenset("max_new_tokens stop_words stop_token_ids ignore_eos skip_special_tokens max_model_len".split())


def reason_of(said: str | None) -> FinishReason | None:
    """A finish reason as an engine calls it: what is neither a stop nor a length, such as an error, is an abort."""
    return "stop" if said == "stop" else "length" if said == "length" else None if said is None else "abort"


class Answer:
    """A request under way. ``settled`` are its settings, with the model's own where it has none; ``room`` the tokens it may have."""

    def __init__(self, request: Request, settled: Sampling, source: Source, room: int) -> None:
        self.request, self.settled, self.room = request, settled, room
        tokenizer: Any = source.tokenizer
        skip = settled.skip_special_tokens
        self.writer = Writer(lambda ids: tokenizer.decode(ids, skip_special_tokens=skip) if ids else "", settled.stop_words)
        self.own_ends = source.ends  # that the model has, whether they count here or not
        self.ends = frozenset({*(() if settled.ignore_eos else self.own_ends), *settled.stop_token_ids})
        self.num_tokens = 0

    def add(self, token_ids: Iterable[int], logprobs: Sequence[Logprob] = (), *, ended: FinishReason | None = None) -> Delta | None:
        """What these tokens add to the answer, with a finish reason if they end it; None if they add nothing.

        ``ended``: why the engine gives no more. It may have left out the token that ended the answer.
        """
        kept: list[int] = []
        text = ""
        reason: FinishReason | None = None
        stopped_by: int | str | None = None
        for token in token_ids:
            kept.append(token)
            self.num_tokens += 1
            if token in self.ends:
                reason, stopped_by = "stop", token
                break
            text += self.writer.add([token])
            if self.writer.stopped_by is not None:
                reason, stopped_by = "stop", self.writer.stopped_by
            elif self.num_tokens >= self.room:
                reason = "length"
            if reason is not None:
                break
        reason = ended if reason is None else reason
        if reason is not None:
            text += self.writer.end()
            if self.writer.stopped_by is not None and stopped_by is None:
                reason, stopped_by = "stop", self.writer.stopped_by
        elif not kept:
            return None
        return Delta(
            id=self.request.id,
            text=text,
            token_ids=tuple(kept),
            logprobs=tuple(logprobs[: len(kept)]),
            finish_reason=reason,
            stopped_by=stopped_by,
        )


@dataclass(frozen=True)
class Taker:
    """Takes requests for ``backend``, which knows the settings ``known`` besides those that all must know."""

    backend: str
    source: Source
    known: frozenset[str]
    adapters: tuple[str, ...] = ()

    def answer(self, request: Request, under_way: Iterable[str], max_model_len: int) -> Answer:
        """The answer to ``request``, still empty. Raises DataError for what the engine cannot compute."""
        sampling = request.sampling
        if request.id in under_way:
            raise DataError(f"the request {request.id} is under way")
        if request.adapter is not None and request.adapter not in self.adapters:
            raise DataError(f"no adapter {request.adapter!r} is loaded")
        if request.media is not None:
            raise DataError(f"images: not with --infer_backend {self.backend}", hint="--infer_backend native or transformers reads them")
        fresh = Sampling()
        unknown = [
            field.name
            for field in fields(Sampling)
            if field.name not in self.known | ALWAYS and getattr(sampling, field.name) != getattr(fresh, field.name)
        ]
        if unknown:
            raise DataError(f"{', '.join(unknown)}: not with --infer_backend {self.backend}", hint="--infer_backend native knows it")
        settled = resolved(sampling, self.source.generation_config)
        if "repetition_penalty" not in self.known and settled.repetition_penalty != 1.0:
            raise DataError(
                f"repetition_penalty {settled.repetition_penalty}, which the model's generation_config asks for: "
                f"not with --infer_backend {self.backend}",
                hint="--repetition_penalty 1 does without it",
            )
        if not request.prompt:
            raise DataError("the prompt has no tokens")
        limit = min(max_model_len, sampling.max_model_len or max_model_len)
        room = min(sampling.max_new_tokens, limit - len(request.prompt))
        if room < 1:
            raise DataError(f"the prompt has {len(request.prompt)} tokens, the model's context {limit}", hint="shorten it")
        return Answer(request, settled, self.source, room)
