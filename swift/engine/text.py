"""Text generation through transformers' ``generate``: batches, and one answer piece by piece."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swift.errors import DataError
from swift.model.load import pad_token_id


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. None leaves it to the model's generation_config; temperature 0 is greedy."""

    max_new_tokens: int = 2048
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    stop_words: list[str] = field(default_factory=list)
    max_model_len: int | None = None  # prompt and answer together, in tokens


@dataclass(frozen=True)
class Completion:
    """An answer: its text without special tokens, its tokens, and why it ended ("stop" or "length")."""

    text: str
    token_ids: list[int]
    finish_reason: str


def complete(model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
    """One answer for each prompt (token ids), generated together; prompts are padded on the left.

    Raises DataError for a prompt that leaves no room for an answer.
    """
    width = max(map(len, prompts))
    pad = pad_token_id(tokenizer)
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = _settings(model, tokenizer, width, sampling)
    stops = _stops_at(tokenizer, width, sampling.stop_words) if sampling.stop_words else None
    with torch.inference_mode():
        output = model.generate(input_ids=input_ids, attention_mask=mask, stopping_criteria=stops, **settings)
    return [_completion(tokenizer, row[width:].tolist(), settings, sampling) for row in output]


def stream(model: Any, tokenizer: Any, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """The answer to ``prompt`` in pieces of text. Closing the iterator stops the generation."""
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    closed = threading.Event()
    failure: list[BaseException] = []

    class Closed(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), closed.is_set(), device=input_ids.device)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    input_ids = torch.tensor([prompt], device=model.device)
    settings = _settings(model, tokenizer, len(prompt), sampling)

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Closed()]),
                    **settings,
                )
        except BaseException as problem:  # raised again by the reader
            failure.append(problem)
            streamer.end()

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        yield from _until_stop_word(streamer, sampling.stop_words)
    finally:
        closed.set()
        thread.join()
    if failure:
        raise failure[0]


def _stops_at(tokenizer: Any, width: int, words: Sequence[str]) -> Any:
    """Ends a row whose answer, which begins at ``width``, holds one of ``words``.

    transformers' own stop_strings also finds a word that begins in the prompt.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class HoldsWord(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            texts = [tokenizer.decode(row[width:], skip_special_tokens=True) for row in input_ids]
            return torch.tensor([any(word in text for word in words) for text in texts], device=input_ids.device)

    return StoppingCriteriaList([HoldsWord()])


def _until_stop_word(pieces: Any, stop_words: Sequence[str]) -> Iterator[str]:
    """``pieces`` up to the first stop word; text that may be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        for word in stop_words:
            if word in held:
                yield held[: held.index(word)]
                return
        keep = max((n for word in stop_words for n in range(1, len(word)) if held.endswith(word[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _settings(model: Any, tokenizer: Any, prompt_length: int, sampling: Sampling) -> dict[str, Any]:
    limit = sampling.max_model_len or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - prompt_length)
    if room < 1:
        raise DataError(f"the prompt has {prompt_length} tokens, the model's context {limit}", hint="shorten it")
    settings: dict[str, Any] = {
        "max_new_tokens": room,
        "pad_token_id": pad_token_id(tokenizer),
        "eos_token_id": end_tokens(model, tokenizer),
        "num_beams": sampling.num_beams,
    }
    if sampling.temperature == 0:
        return settings | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **_penalty(sampling)}
    if sampling.temperature is not None or sampling.top_p is not None or sampling.top_k is not None:
        settings["do_sample"] = True
    for name in ("temperature", "top_k", "top_p"):
        if (value := getattr(sampling, name)) is not None:
            settings[name] = value
    return settings | _penalty(sampling)


def _penalty(sampling: Sampling) -> dict[str, Any]:
    return {} if sampling.repetition_penalty is None else {"repetition_penalty": sampling.repetition_penalty}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's and those of the model's generation_config."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None})


def _completion(tokenizer: Any, ids: list[int], settings: dict[str, Any], sampling: Sampling) -> Completion:
    ends = set(settings["eos_token_id"])
    cut = next((at for at, token in enumerate(ids) if token in ends), None)
    reason = "stop" if cut is not None else "length"
    ids = ids if cut is None else ids[:cut]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for word in sampling.stop_words:
        if word in text:
            text, reason = text[: text.index(word)], "stop"
    return Completion(text, ids, reason)
