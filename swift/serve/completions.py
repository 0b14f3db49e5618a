"""POST /v1/completions: raw prompts, as they are."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swift.engine.base import Delta, Logprob, Request
from swift.engine.logprobs import Spell, finite
from swift.serve.chat import Usage, requests_of
from swift.serve.protocol import CompletionRequest, prompts_of


@dataclass(frozen=True)
class Completions:
    """A request made ready: ``num_each`` requests for each prompt, of whose answers the ``num_given`` likeliest are given."""

    id: str
    model: str
    requests: tuple[Request, ...]
    prompts: tuple[tuple[int, ...], ...]
    num_each: int
    num_given: int
    echo: bool
    wants_logprobs: bool
    max_tokens: int


def ready(
    request: CompletionRequest, to_ids: Callable[[str | Sequence[int], bool], tuple[int, ...]], *, adapter: str | None
) -> Completions:
    """``to_ids``: token ids of a prompt, with special tokens or not. Raises ApiError for what cannot be honoured."""
    id = f"cmpl-{uuid.uuid4().hex}"
    prompts = tuple(to_ids(prompt, request.add_special_tokens is not False) for prompt in prompts_of(request.prompt))
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    sampling = request.sampling(
        max_new_tokens=max(max_tokens, 1),
        logprobs=0 if request.logprobs is None and request.num_drawn > (request.n or 1) else request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        grammar=request.structured_outputs.as_grammar() if request.structured_outputs is not None else None,
    )
    count = request.num_drawn
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        for made in requests_of(f"{id}:{number}", prompt, sampling, count, adapter):
            requests.append(made)
    echo = bool(request.echo)
    return Completions(id, request.model, tuple(requests), prompts, count, request.n or 1, echo, request.logprobs is not None, max_tokens)


async def whole(made: Completions, deltas: AsyncIterator[Delta], tokenizer: Any, spell: Spell) -> dict[str, Any]:
    """The response of a request that does not stream."""
    place = {request.id: index for index, request in enumerate(made.requests)}
    texts = [""] * len(place)
    values: list[list[Logprob]] = [[] for _ in place]
    of_prompt: list[tuple[Logprob | None, ...]] = [() for _ in place]
    reasons = [""] * len(place)
    usages = [Usage(len(prompt)) for prompt in made.prompts]
    async for delta in deltas:
        index = place[delta.id]
        usages[index // made.num_each].add(delta)
        texts[index] += delta.text
        values[index] += delta.logprobs
        of_prompt[index] = delta.prompt_logprobs or of_prompt[index]
        reasons[index] = delta.finish_reason or reasons[index]
    choices: list[dict[str, Any]] = []
    for index in _best(values, made):
        prompt = made.prompts[index // made.num_each]
        if made.max_tokens == 0:
            texts[index], values[index], reasons[index] = "", [], "length"
        listed: list[tuple[int, Logprob | None]] = [(value.token_id, value) for value in values[index]]
        text = texts[index]
        if made.echo:
            text = tokenizer.decode(prompt, skip_special_tokens=True) + text
            listed = [*zip(prompt, of_prompt[index], strict=False), *listed]
        logprobs = logprobs_of(listed, spell) if made.wants_logprobs else None
        choices.append({"index": len(choices), "text": text, "logprobs": logprobs, "finish_reason": reasons[index]})
    return {
        "id": made.id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": made.model,
        "choices": choices,
        "usage": _total(usages, made),
    }


def _best(values: Sequence[Sequence[Logprob]], made: Completions) -> list[int]:
    """Which answers are given: of each prompt's the ones whose tokens are likeliest on the mean, or all."""
    indices: list[int] = []
    for begin in range(0, len(values), made.num_each):
        own = range(begin, begin + made.num_each)
        if made.num_given == made.num_each:
            indices += own
        else:
            means = {index: sum(value.logprob for value in values[index]) / max(len(values[index]), 1) for index in own}
            indices += sorted(own, key=lambda index: -means[index])[: made.num_given]
    return indices


async def chunks(made: Completions, deltas: AsyncIterator[Delta], spell: Spell, *, includes_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream."""
    place = {request.id: index for index, request in enumerate(made.requests)}
    usages = [Usage(len(prompt)) for prompt in made.prompts]
    offsets = [0] * len(place)
    head = {"id": made.id, "object": "text_completion", "created": int(time.time()), "model": made.model}
    async for delta in deltas:
        index = place[delta.id]
        usages[index // made.num_each].add(delta)
        logprobs = None
        if made.wants_logprobs and delta.logprobs:
            logprobs = logprobs_of([(value.token_id, value) for value in delta.logprobs], spell, offsets[index])
        offsets[index] += len(delta.text)
        if delta.text or delta.finish_reason is not None or logprobs is not None:
            choice = {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
            chunk = {**head, "choices": [choice]}
            yield {**chunk, "usage": None} if includes_usage else chunk
    if includes_usage:
        yield {**head, "choices": [], "usage": _total(usages, made)}


def logprobs_of(listed: Sequence[tuple[int, Logprob | None]], spell: Spell, offset: int = 0) -> dict[str, Any]:
    """OpenAI's older form: parallel lists, one entry for each token."""
    tokens = [spell(token)[0] for token, _ in listed]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None if value is None else finite(value.logprob) for _, value in listed],
        "top_logprobs": [
            None if value is None else {spell(token)[0]: finite(logprob) for token, logprob in value.top} for _, value in listed
        ],
        "text_offset": offsets,
    }


def _total(usages: Sequence[Usage], made: Completions) -> dict[str, Any]:
    total = Usage(sum(usage.num_prompt for usage in usages))
    total.num_completion = 0 if made.max_tokens == 0 else sum(usage.num_completion for usage in usages)
    total.num_cached = sum(usage.num_cached for usage in usages)
    return total.body()
