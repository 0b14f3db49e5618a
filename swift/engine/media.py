"""Prompts with images: how a chat template wants them, and what the model's processor makes of them."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from swift.data.template import ChatTemplate
from swift.engine.base import Media
from swift.errors import DataError

MARK = "marker-of-a-text"
TEXT_INPUTS = ("input_ids", "attention_mask")
# What image processors and templates raise for what they cannot read; none of them names a fault of the program alone.
FAULTS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, StopIteration, TypeError, ValueError)


class ImagePrompts:
    """Prompts of a model whose ``processor`` reads images.

    ``takes_texts``: the template reads a content that is a text; ``takes_images``: it reads one that is a list of parts, and
    writes ``token`` where an image is. Both are tried.
    """

    def __init__(self, processor: Any, template: ChatTemplate | None) -> None:
        self.processor = processor
        self.token: str | None = getattr(processor, "image_token", None)
        self.token_id = None if self.token is None else int(processor.tokenizer.convert_tokens_to_ids(self.token))
        self.takes_texts = template is not None and MARK in _tried(template, MARK)
        text = "" if template is None else _tried(template, [{"type": "image"}, {"type": "text", "text": MARK}])
        self.takes_images = self.token is not None and MARK in text and text.count(self.token) == 1

    def content(self, parts: str | Sequence[dict[str, str]]) -> Any:
        """A content as the template reads it: ``parts`` is a text, or parts with an image among them."""
        return [{"type": "text", "text": parts}] if isinstance(parts, str) and not self.takes_texts else parts

    def ready(self, text: str, images: Sequence[Any]) -> tuple[tuple[int, ...], Media]:
        """Token ids of a rendered ``text``, and the pictures of PIL that it holds. DataError if they do not fit each other."""
        assert self.token is not None
        if (count := text.count(self.token)) != len(images):
            raise DataError(f"the rendered messages hold {self.token} {count} times for {len(images)} images", hint="it is no text")
        begins = self.processor.tokenizer.bos_token
        options = {"add_special_tokens": False} if begins is not None and text.startswith(begins) else {}
        try:
            made = self.processor(text=[text], images=list(images), return_tensors="pt", **options)
            ids = tuple(made["input_ids"][0].tolist())
            inputs = {name: value.numpy() for name, value in made.items() if name not in TEXT_INPUTS}
        except FAULTS as problem:
            raise DataError(f"the model's processor does not take the images: {str(problem).strip() or type(problem).__name__}") from None
        places = tuple(place for place, token in enumerate(ids) if token == self.token_id)
        return ids, Media(inputs=inputs, places=places, digest=_digest(inputs, len(ids)))


def image_inputs(model: Any, media: Media | None) -> dict[str, Tensor]:
    """The arrays of ``media`` for a forward pass of ``model``: on its device, floating-point ones in its precision."""
    made = {}
    for name, value in ({} if media is None else media.inputs).items():
        tensor = torch.from_numpy(value).to(model.device)
        made[name] = tensor.to(model.dtype) if tensor.is_floating_point() else tensor
    return made


def _tried(template: ChatTemplate, content: Any) -> str:
    """What ``template`` makes of a message with this content; nothing if it cannot."""
    try:
        return template.text([{"role": "user", "content": content}], prompt=True)
    except (DataError, *FAULTS):
        return ""


def _digest(inputs: dict[str, Any], num_tokens: int) -> bytes:
    """Of all that is no number for each token of the text."""
    made = blake2b(digest_size=16)
    for name in sorted(inputs):
        value = inputs[name]
        if value.shape == (1, num_tokens):
            continue
        made.update(f"{name} {value.dtype} {value.shape}".encode())
        made.update(value.tobytes())
    return made.digest()
