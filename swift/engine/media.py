"""Prompts with images: how a chat template wants them, and what the model's processor makes of them."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy

from swift.data.records import Message
from swift.data.render import render_prompt
from swift.data.template import MARK, ChatTemplate
from swift.engine.base import Media
from swift.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from swift.engine.source import Source

TEXT_INPUTS = ("input_ids", "attention_mask")
# What processors and models raise for images that they cannot read; they have no error of their own for it.
FAULTS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, StopIteration, TypeError, ValueError)


class ImagePrompts:
    """Prompts of a model whose ``processor`` reads images.

    ``takes_images``: ``template`` renders a content that is a list of parts, with the processor's ``token`` where an image is,
    which is tried.
    """

    def __init__(self, processor: Any, template: ChatTemplate | None) -> None:
        self.processor = processor
        self.token: str | None = getattr(processor, "image_token", None)
        self.token_id = None if self.token is None else int(processor.tokenizer.convert_tokens_to_ids(self.token))
        parts = [{"type": "image"}, {"type": "text", "text": MARK}]
        self.takes_images = (
            template is not None and self.token is not None and all(template.shows(parts, text) for text in (self.token, MARK))
        )

    def to_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered ``text`` without images, as those of one with images would be."""
        return tuple(self.processor.tokenizer(text, **self._options(text)).input_ids)

    def _options(self, text: str) -> dict[str, bool]:
        """As a processor's apply_chat_template does it."""
        begin = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}

    def ready(self, text: str, images: Sequence[Any]) -> tuple[tuple[int, ...], Media]:
        """Token ids of a rendered ``text``, and the pictures of PIL that it holds. DataError if they do not fit each other."""
        assert self.token is not None
        if (count := text.count(self.token)) != len(images):
            raise DataError(f"the rendered messages hold {self.token} {count} times for {len(images)} images", hint="it is no text")
        try:
            made = self.processor(text=[text], images=list(images), return_tensors="pt", **self._options(text))
            ids = tuple(made["input_ids"][0].tolist())
            inputs = {name: value.numpy() for name, value in made.items() if name not in TEXT_INPUTS}
        except FAULTS as problem:
            raise DataError(f"the model's processor does not take the images: {str(problem).strip() or type(problem).__name__}") from None
        places = tuple(place for place, token in enumerate(ids) if token == self.token_id)
        return ids, Media(inputs=inputs, places=places, digest=_digest(inputs, len(ids)))


def text_prompt(source: "Source", messages: Sequence[Message], tools: Any = None, *, use_chat_template: bool) -> list[int]:
    """Token ids of ``messages`` without images; of a model that reads them, as a prompt with some would be."""
    thinking = source.config.enable_thinking
    if source.processor is None or not use_chat_template:
        return render_prompt(messages, source.tokenizer, tools, enable_thinking=thinking, use_chat_template=use_chat_template)
    template = ChatTemplate(source.tokenizer, enable_thinking=thinking)
    text = template.text([message.for_template() for message in messages], tools, prompt=True)
    return list(ImagePrompts(source.processor, None).to_ids(text))


def image_inputs(model: Any, media: Media | None) -> "dict[str, Tensor]":
    """The arrays of ``media`` for a forward pass of ``model``: on its device, floating-point ones in its precision."""
    import torch  # the server, which makes prompts, does without

    made = {}
    for name, value in ({} if media is None else media.inputs).items():
        tensor = torch.from_numpy(value).to(model.device)
        made[name] = tensor.to(model.dtype) if tensor.is_floating_point() else tensor
    return made


def _digest(inputs: dict[str, Any], num_tokens: int) -> bytes:
    """Of all that is no number for each token of the text."""
    made = blake2b(digest_size=16)
    for name in sorted(inputs):
        value = inputs[name]
        if value.shape == (1, num_tokens):
            continue
        made.update(f"{name} {value.dtype} {value.shape}".encode())
        made.update(numpy.ascontiguousarray(value).data)
    return made.digest()
