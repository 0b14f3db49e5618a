"""The engine that generates with transformers' own ``generate``: batches, and one answer token by token."""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from swift.config.generate import GenerateConfig
from swift.engine.answers import Gathered
from swift.engine.base import Completion, Delta, Media, Request, Sampling
from swift.engine.forward import ForwardScorer
from swift.engine.growing import Growing, check_request, decoder, refuse_unknown, room_after
from swift.engine.media import image_inputs
from swift.engine.scoring import Score, Text
from swift.engine.writer import Writer
from swift.errors import DataError
from swift.model.load import Loaded, end_tokens
from swift.model.tokenizer import pad_token_id

# What ``generate`` can be told for each request.
KNOWN = frozenset(
    "max_new_tokens min_new_tokens temperature top_k top_p min_p repetition_penalty num_beams stop_words seed max_model_len".split()
)


class TransformersEngine:
    """The reference: batches of equal settings through ``generate``; a single request without beams piece by piece.

    ``is_live``: the model goes on being trained. Nothing is computed in inference mode, whose tensors, once a model has kept
    them, take no gradients and no updates.
    """

    def __init__(self, loaded: Loaded, *, max_batch_size: int = 1, is_live: bool = False) -> None:
        self.loaded = loaded
        self.max_batch_size = max_batch_size
        self.is_live = is_live
        self._waiting: list[Request] = []
        self._under_way: set[str] = set()
        self._deltas: Generator[Delta] = self._of_batch([])

    def add(self, request: Request) -> None:
        """See Engine."""
        check_request(request, {*self._under_way, *(waiting.id for waiting in self._waiting)})
        refuse_unknown(request.sampling, KNOWN, "transformers")
        if request.media is not None and self.loaded.processor is None:
            raise DataError("the model reads text only: there is an image in the prompt")
        _settings(self.loaded.model, self.loaded.tokenizer, len(request.prompt), request.sampling)
        self._waiting.append(request)

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return not (self._waiting or self._under_way)

    def step(self) -> list[Delta]:
        """See Engine."""
        while True:
            for delta in self._deltas:
                if delta.id in self._under_way:
                    if delta.finish_reason is not None:
                        self._under_way.remove(delta.id)
                    return [delta]
            self._under_way.clear()
            if not self._waiting:
                return []
            first = self._kind(self._waiting[0])
            batch = [request for request in self._waiting if self._kind(request) == first and request.media is None]
            batch = batch[: self.max_batch_size] if self._waiting[0].media is None else self._waiting[:1]
            self._waiting = [request for request in self._waiting if request not in batch]
            self._under_way = {request.id for request in batch}
            self._deltas = self._of_batch(batch)

    def abort(self, id: str) -> None:
        """See Engine."""
        self._waiting = [request for request in self._waiting if request.id != id]
        self._under_way.discard(id)
        if not self._under_way:
            self._deltas.close()

    def scores(self, texts: Sequence[Text]) -> Iterator[tuple[int, Score]]:
        """See Scorer."""
        return ForwardScorer(self.loaded.model).scores(texts)

    def close(self) -> None:
        """See Engine."""
        self._waiting, self._under_way = [], set()
        self._deltas.close()

    def _kind(self, request: Request) -> tuple[Sampling, int]:
        """What requests of a batch share: their settings, and the room for an answer, which `generate` takes for all of them."""
        return replace(request.sampling, seed=None), _room(self.loaded.model, len(request.prompt), request.sampling)

    def _of_batch(self, batch: list[Request]) -> Generator[Delta]:
        if not batch:
            return
        model, tokenizer, sampling = self.loaded.model, self.loaded.tokenizer, batch[0].sampling
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        if len(batch) == 1 and sampling.num_beams == 1 and not self.is_live:
            yield from _streamed(model, tokenizer, batch[0])
            return
        prompts = [list(request.prompt) for request in batch]
        rows = _generated(model, tokenizer, prompts, sampling, batch[0].media, is_live=self.is_live)
        for request, row in zip(batch, rows, strict=True):
            yield _growing(model, tokenizer, len(request.prompt), sampling, id=request.id).add(row, ended="length")


def make(loaded: Loaded, config: GenerateConfig) -> TransformersEngine:
    """As the options say."""
    return TransformersEngine(loaded, max_batch_size=config.max_batch_size or 1)


def complete(model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling, media: Media | None = None) -> list[Completion]:
    """One answer for each prompt (token ids), generated together; prompts are padded on the left. ``media`` are of a single one.

    Raises DataError for a prompt that leaves no room for an answer.
    """
    found = []
    for number, (prompt, row) in enumerate(zip(prompts, _generated(model, tokenizer, prompts, sampling, media), strict=True)):
        gathered = Gathered()
        gathered.add(_growing(model, tokenizer, len(prompt), sampling, id=str(number)).add(row, ended="length"))
        assert gathered.completion is not None
        found.append(gathered.completion)
    return found


def _generated(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling, media: Media | None, *, is_live: bool = False
) -> list[list[int]]:
    """The tokens that follow each prompt; behind an answer that ended earlier than others there is padding."""
    width = max(map(len, prompts))
    pad = pad_token_id(tokenizer)
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = _settings(model, tokenizer, width, sampling)
    stops = _stops_at(tokenizer, width, sampling.stop_words) if sampling.stop_words else None
    with torch.no_grad() if is_live else torch.inference_mode():
        output = model.generate(input_ids=input_ids, attention_mask=mask, stopping_criteria=stops, **settings, **image_inputs(model, media))
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _growing(model: Any, tokenizer: Any, num_prompt: int, sampling: Sampling, *, id: str) -> Growing:
    return Growing(id, Writer(decoder(tokenizer), sampling.stop_words), end_tokens(model, tokenizer), _room(model, num_prompt, sampling))


def _stops_at(tokenizer: Any, width: int, words: Sequence[str]) -> Any:
    """Ends a row whose answer, which begins at ``width``, holds one of ``words``.

    transformers' own stop_strings finds a word that begins in the prompt, too.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class HoldsWord(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            texts = [tokenizer.decode(row[width:], skip_special_tokens=True) for row in input_ids]
            return torch.tensor([any(word in text for word in words) for text in texts], device=input_ids.device)

    return StoppingCriteriaList([HoldsWord()])


def stream(model: Any, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, media: Media | None = None) -> Generator[int]:
    """The tokens that follow ``prompt``, one by one, an end token among them. Closing the iterator stops the generation."""
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    closed = threading.Event()
    failure: list[BaseException] = []
    tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    class Closed(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), closed.is_set(), device=input_ids.device)

    class Streamer(BaseStreamer):
        has_prompt = False

        def put(self, value: Any) -> None:
            if self.has_prompt:  # the first tokens that ``generate`` gives are the prompt's
                for token in value.flatten().tolist():
                    tokens.put(token)
            self.has_prompt = True

        def end(self) -> None:
            tokens.put(None)

    input_ids = torch.tensor([list(prompt)], device=model.device)
    settings = _settings(model, tokenizer, len(prompt), sampling)

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    streamer=Streamer(),
                    stopping_criteria=StoppingCriteriaList([Closed()]),
                    **settings,
                    **image_inputs(model, media),
                )
        except BaseException as problem:  # raised again by the reader
            failure.append(problem)
            tokens.put(None)

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while (token := tokens.get()) is not None:
            yield token
    finally:
        closed.set()
        if threading.current_thread() is not thread:  # where the collector may find an answer that was let go
            thread.join()
    if failure:
        raise failure[0]


def _streamed(model: Any, tokenizer: Any, request: Request) -> Generator[Delta]:
    growing = _growing(model, tokenizer, len(request.prompt), request.sampling, id=request.id)
    tokens = stream(model, tokenizer, request.prompt, request.sampling, request.media)
    try:
        for token in tokens:
            delta = growing.add([token])
            yield delta
            if delta.finish_reason is not None:
                return
    finally:
        tokens.close()
    yield growing.add((), ended="length")


def _room(model: Any, num_prompt: int, sampling: Sampling) -> int:
    return room_after(num_prompt, sampling, getattr(model.config.get_text_config(), "max_position_embeddings", None))


def _settings(model: Any, tokenizer: Any, prompt_length: int, sampling: Sampling) -> dict[str, Any]:
    room = _room(model, prompt_length, sampling)
    settings: dict[str, Any] = {
        "max_new_tokens": room,
        "pad_token_id": pad_token_id(tokenizer),
        "eos_token_id": end_tokens(model, tokenizer),
        "num_beams": sampling.num_beams,
    }
    if sampling.min_new_tokens:
        settings["min_new_tokens"] = min(sampling.min_new_tokens, room)
    if sampling.temperature == 0:
        return settings | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **_penalty(sampling)}
    if sampling.temperature is not None or sampling.top_p is not None or sampling.top_k is not None:
        settings["do_sample"] = True
    for name in ("temperature", "top_k", "top_p"):
        if (value := getattr(sampling, name)) is not None:
            settings[name] = value
    if sampling.min_p:
        settings["min_p"] = sampling.min_p
    return settings | _penalty(sampling)


def _penalty(sampling: Sampling) -> dict[str, Any]:
    return {} if sampling.repetition_penalty is None else {"repetition_penalty": sampling.repetition_penalty}
