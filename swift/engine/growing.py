"""How an answer grows token by token, and what ends it; the same for all engines, whoever computes the tokens."""

from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import fields
from typing import Any

from swift.engine.base import Delta, FinishReason, Logprob, Request, Sampling
from swift.engine.writer import Writer
from swift.errors import DataError


def refuse_unknown(sampling: Sampling, known: Container[str], backend: str) -> None:
    """DataError if ``sampling`` sets something that is not in ``known``."""
    fresh = Sampling()
    unknown = [
        field.name for field in fields(Sampling) if field.name not in known and getattr(sampling, field.name) != getattr(fresh, field.name)
    ]
    if unknown:
        raise DataError(f"{', '.join(unknown)}: not with --infer_backend {backend}", hint="--infer_backend native knows it")


def check_request(request: Request, under_way: Container[str], adapters: Container[str] = ()) -> None:
    """DataError for a request that no engine can take, given the ids of those ``under_way`` and the names of ``adapters``."""
    if request.id in under_way:
        raise DataError(f"the request {request.id} is under way")
    if request.adapter is not None and request.adapter not in adapters:
        raise DataError(f"no adapter {request.adapter!r} is loaded")
    if not request.prompt:
        raise DataError("the prompt has no tokens")


def room_after(num_prompt: int, sampling: Sampling, max_model_len: int | None) -> int:
    """Tokens that an answer to ``num_prompt`` tokens may have. DataError if there is room for none."""
    limits = [limit for limit in (sampling.max_model_len, max_model_len) if limit is not None]
    room = min([sampling.max_new_tokens, *(limit - num_prompt for limit in limits)])
    if room < 1:
        raise DataError(f"the prompt has {num_prompt} tokens, the model's context {min(limits, default=0)}", hint="shorten it")
    return room


def decoder(tokenizer: Any, *, skip_special_tokens: bool = True) -> Callable[[list[int]], str]:
    """The text of token ids, as a Writer wants it."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) if ids else ""


class Growing:
    """An answer so far. ``ends`` are the tokens that end it, ``room`` how many tokens it may have."""

    def __init__(self, id: str, writer: Writer, ends: Collection[int], room: int) -> None:
        self.id, self.writer, self.ends, self.room = id, writer, frozenset(ends), room
        self.num_tokens = 0

    def add(
        self,
        token_ids: Iterable[int],
        logprobs: Sequence[Logprob] = (),
        *,
        ended: FinishReason | None = None,
        follow: Callable[[int], bool] = lambda token: False,
    ) -> Delta:
        """What these tokens add to the answer, as many as belong to it, with a finish reason if they end it.

        ``ended``: why the engine gives no more; it may have left out the token that ended the answer. ``follow`` is told each
        token, and says whether a grammar is complete with it; its DataError, for a grammar that is given up, aborts the answer.
        """
        kept: list[int] = []
        text = ""
        reason: FinishReason | None = None
        stopped_by: int | str | None = None
        for token in token_ids:
            kept.append(token)
            self.num_tokens += 1
            try:
                is_complete = follow(token)
            except DataError as problem:
                reason, stopped_by = "abort", str(problem)
                break
            if token in self.ends:
                reason, stopped_by = "stop", token
                break
            text += self.writer.add([token])
            if self.writer.stopped_by is not None:
                reason, stopped_by = "stop", self.writer.stopped_by
            elif is_complete:
                reason = "stop"
            elif self.num_tokens >= self.room:
                reason = "length"
            if reason is not None:
                break
        reason = ended if reason is None else reason
        if reason is not None:
            text += self.writer.end()
            if self.writer.stopped_by is not None and stopped_by is None:
                reason, stopped_by = "stop", self.writer.stopped_by
        return Delta(
            id=self.id,
            text=text,
            token_ids=tuple(kept),
            logprobs=tuple(logprobs[: len(kept)]),
            finish_reason=reason,
            stopped_by=stopped_by,
        )
