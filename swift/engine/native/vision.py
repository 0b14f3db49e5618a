"""Images in prompts of the native engine: the model's own parts see them, once, and what they make of them is paged like text.

A model that reads images puts features of them where the prompt has tokens that stand for them, and hands embeddings to its
decoder. It is run up to there and no further; the decoder's part is done here, over the paged cache.
"""

import secrets
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swift.engine.base import Media
from swift.engine.media import FAULTS, ImagePrompts, image_inputs
from swift.engine.native.pages import PagedCache, Pages, Piece
from swift.engine.native.runner import Runner
from swift.engine.native.scheduler import Part, Sequence
from swift.errors import DataError, ModelError, first_line
from swift.model.attention import PREFIX
from swift.model.policy import evaluating, is_close

# T tokens of a prompt or of the row, D model width, A axes of a position

TRIED = 3  # tokens at the end of the trial's prompt that are computed as those of an answer are


@dataclass
class Merged:
    """A prompt as the decoder gets it: embeddings (T, D), positions (A, T) if it has others than 0 to T - 1.

    ``shift`` is added to the places of what follows. The embeddings are let go once they are in the cache. ``fault``: why the
    model does not take the images; the embeddings are then those of the tokens alone.
    """

    embeds_TD: Tensor | None
    positions_AT: Tensor | None
    shift: int
    fault: str | None = None


class _Reached(Exception):
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__("the decoder was reached")
        self.given = given


class Vision:
    """What a pass of ``model`` needs for prompts with images."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embedding = model.get_input_embeddings()
        self.has_shifts = True  # until a trial has shown that places are positions
        self._merged: WeakKeyDictionary[Sequence, Merged] = WeakKeyDictionary()

    def takes(self, layers: Iterable[str]) -> bool:
        """Whether an adapter that changes ``layers`` leaves alone what comes before the decoder, which sees no rows of a pass."""
        decoder = self.model.get_decoder()
        own = next(name for name, module in self.model.named_modules() if module is decoder) + "."
        return all(layer.startswith(own) for layer in layers)

    def shift(self, part: Part) -> int:
        """What is added to the places of ``part`` to make positions; the model sees the images if the part needs them."""
        sequence: Sequence = part.sequence
        if sequence.media is None:
            return 0
        known = self._merged.get(sequence)
        needs_embeds = part.begin < _end(sequence.media)
        if (known is None and self.has_shifts) or (needs_embeds and (known is None or known.embeds_TD is None)):
            known = self._merged[sequence] = self._seen(sequence)
        return 0 if known is None or needs_embeds else known.shift

    def fault(self, sequence: Sequence) -> str | None:
        """Why nothing that was computed of ``sequence`` counts; None if it does."""
        known = self._merged.get(sequence)
        return None if known is None else known.fault

    def _seen(self, sequence: Sequence) -> Merged:
        try:
            return self.merge(sequence.tokens[: sequence.num_prompt], sequence.media)
        except DataError as problem:  # others are in the pass, which goes on
            prompt, media = sequence.tokens[: sequence.num_prompt], sequence.media
            sequence.named = named(prompt, replace(media, digest=secrets.token_bytes(16)))  # nobody finds what is computed of it
            ids = torch.tensor(prompt, device=self.embedding.weight.device)
            return Merged(self.embedding(ids), None, 0, str(problem))

    def inputs(self, parts: List[Part], ids: Tensor, positions: Tensor) -> dict[str, Tensor] | None:
        """What the decoder gets in place of ``ids`` and ``positions`` (1, T); None if no part of the pass has an image."""
        embeds_TD: Tensor | None = None
        begin = 0
        for part in parts:
            sequence, end = part.sequence, begin + part.num_tokens
            if sequence.media is not None and part.begin < _end(sequence.media):
                merged = self._merged[sequence]
                assert merged.embeds_TD is not None
                if embeds_TD is None:
                    embeds_TD = self.embedding(ids.to(merged.embeds_TD.device))[0]
                count = min(part.end, len(merged.embeds_TD)) - part.begin  # an answer that was put back is text again
                embeds_TD[begin : begin + count] = merged.embeds_TD[part.begin : part.begin + count]
                if merged.positions_AT is not None:
                    if positions.dim() == 2:
                        positions = positions.expand(len(merged.positions_AT), 1, -1).clone()
                    positions[:, 0, begin : begin + count] = merged.positions_AT[:, part.begin : part.begin + count]
                    positions[:, 0, begin + count : end] += merged.shift
                if part.end >= _end(sequence.media):
                    merged.embeds_TD = None
            begin = end
        return None if embeds_TD is None else {"inputs_embeds": embeds_TD[None], "position_ids": positions}

    def merge(self, tokens: List[int], media: Media) -> Merged:
        """Run the model on a prompt up to its decoder. DataError if the images are not those that the tokens stand for."""
        device = self.embedding.weight.device
        decoder = self.model.get_decoder()

        def reached(*_: Any, **given: Any) -> Any:
            raise _Reached(given)

        decoder.forward = reached
        try:
            ids = torch.tensor([list(tokens)], device=device)
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **image_inputs(self.model, media))
        except _Reached as there:
            given = there.given
        except FAULTS as problem:
            raise DataError(f"the model does not take the images: {first_line(problem)}") from None
        finally:
            del decoder.forward  # the class's own is seen again
        embeds_TD = given["inputs_embeds"][0]
        positions = given.get("position_ids")
        if positions is None:
            return Merged(embeds_TD, None, 0)
        positions_AT = positions.reshape(-1, len(embeds_TD))
        return Merged(embeds_TD, positions_AT.cpu(), int(positions_AT.max()) + 1 - len(embeds_TD))


def named(prompt: List[int], media: Media) -> tuple[int, ...]:
    """``prompt`` with a number in place of each token of an image, the same for equal images alone."""
    halves = media.digest[:8], media.digest[8:16]
    numbers = [int.from_bytes(half, "little", signed=True) | -(2**62) for half in halves]  # below zero, where no token is
    made = list(prompt)
    for index, place in enumerate(media.places):
        made[place] = numbers[index % 2]
    return tuple(made)


def try_vision(model: Any, processor: Any) -> tuple[Vision, str | None]:
    """(how ``model`` sees images, why its prompts with images cannot be computed over a paged cache or None if they can).

    It is tried: a prompt with an image, in two parts beside a text and with its end computed as an answer is, must give the
    logits that the model gives alone.
    """
    vision, runner = Vision(model), Runner(model, PagedCache(0, 2))
    fault: str | None = None
    try:
        prompt, media = _probe(processor)
        ids = torch.tensor([prompt], device=runner.device)
        with evaluating(model), torch.inference_mode():
            inputs = image_inputs(model, media)
            wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits[0]
            found, merged = _in_parts(runner, vision, prompt, media)
        vision.has_shifts = merged.positions_AT is not None
        if not is_close(found, wanted):
            fault = "an image does more to its decoder than to take the place of tokens"
    except (DataError, ModelError, *FAULTS) as problem:
        fault = f"its forward pass does not take images apart: {first_line(problem)}"
    if fault is not None:
        model.set_attn_implementation(model.config._attn_implementation.removeprefix(PREFIX))
    return vision, fault


def _probe(processor: Any) -> tuple[tuple[int, ...], Media]:
    """A short prompt with a small image of noise."""
    from PIL import Image

    noise = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = ImagePrompts(processor, None)
    if prompts.token is None:
        raise ModelError("its processor has no image_token")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    try:
        text = str(processor.apply_chat_template([message], add_generation_prompt=True))
    except FAULTS:
        text = f"{prompts.token} What is it?"
    return prompts.ready(text, [Image.fromarray(noise.numpy())])


def _in_parts(runner: Any, vision: Vision, prompt: List[int], media: Media) -> tuple[Tensor, Merged]:
    """Logits of all tokens of ``prompt``, in blocks of 2 that follow no order."""
    sequence = Sequence("trial", list(prompt), media=media)
    merged = vision.merge(prompt, media)
    cut = (media.places[0] + media.places[-1]) // 2 + 1
    last = max(len(prompt) - TRIED, _end(media))
    if last == len(prompt):
        raise ModelError("no text follows the image")
    num_blocks = -(-len(prompt) // 2)
    cache = PagedCache(num_blocks + 2, 2)
    blocks = tuple(reversed(range(2, num_blocks + 2)))
    logits = []
    vision._merged[sequence] = Merged(merged.embeds_TD, merged.positions_AT, merged.shift)
    for begin, end in ((0, cut), (cut, last), (last, len(prompt))):
        parts = [Part(Sequence("beside", [5, 6, 7]), 0, 3, False), Part(sequence, begin, end, False)]
        shift = vision.shift(parts[1])
        ids = torch.tensor([[5, 6, 7, *prompt[begin:end]]])
        positions = torch.tensor([[0, 1, 2, *range(begin + shift, end + shift)]])
        pages = Pages(cache, [Piece(0, 3, 3, (0, 1)), Piece(3, end - begin, end, blocks)], runner.device)
        rows = torch.arange(3, ids.shape[1], device=runner.device)
        logits.append(runner._logits(ids, positions, pages, rows, vision.inputs(parts, ids, positions)))
    return torch.cat(logits), merged


def _end(media: Media) -> int:
    """The place after the last one of an image."""
    return media.places[-1] + 1
