"""Images in messages: data URLs to pictures. Nothing is fetched, and no file of this machine is read."""

from collections.abc import Sequence
from typing import Any

from swift.data.template import ChatTemplate
from swift.engine.base import Media, Request
from swift.engine.media import ImagePrompts
from swift.engine.pictures import of_url
from swift.errors import DataError
from swift.serve import limits
from swift.serve.errors import ApiError, of_runtime, unsupported
from swift.serve.protocol import ImagePart, ImageUrl, Message, UserMessage
from swift.serve.runtime import Overloaded

Listed = Sequence[tuple[str, ImageUrl]]


def images_of(messages: Sequence[Message]) -> list[tuple[str, ImageUrl]]:
    """(place in the request, image) of all images, in the order in which a template renders them."""
    return [
        (f"messages[{number}].content[{index}].image_url", part.image_url)
        for number, message in enumerate(messages)
        if isinstance(message, UserMessage) and not isinstance(message.content, str)
        for index, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def check_media(request: Request, *, held_bytes: int, max_model_len: int | None) -> None:
    """Before images are handed to the engine: whether there is memory for them beside ``held_bytes``, and any use. Raises ApiError."""
    if request.media is None:
        return
    size, length = request.media.size_bytes, len(request.prompt)
    if max_model_len is not None and length >= max_model_len:
        message = f"the prompt has {length} tokens, {len(request.media.places)} of them of images, the model's context {max_model_len}"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    if size > limits.MOST_MEDIA_BYTES:
        raise unsupported(f"the images take {size} bytes, {limits.MOST_MEDIA_BYTES} at most", param="messages")
    if held_bytes + size > limits.MOST_MEDIA_BYTES:
        raise of_runtime(Overloaded("images of other requests take the memory that there is for them", 1))


class Pictures:
    """Makes the images of requests ready for a model. ``most``: of a request; ``max_pixels``: larger ones are scaled down to it."""

    def __init__(self, processor: Any, template: ChatTemplate | None, *, most: int, max_pixels: int | None) -> None:
        self.prompts = ImagePrompts(processor, template)
        self.most = most
        self.max_pixels = max_pixels

    def check(self, listed: Listed) -> None:
        """Before anything is rendered. Raises ApiError."""
        place, _ = listed[min(self.most, len(listed) - 1)]
        if not self.prompts.takes_images:
            raise unsupported("the model's chat template takes no images", param=place)
        if len(listed) > self.most:
            raise unsupported(f"there are {len(listed)} images in the request, {self.most} at most", param=place)

    def ready(self, text: str, listed: Listed) -> tuple[tuple[int, ...], Media]:
        """Token ids of the rendered ``text``, and its images. Raises ApiError that names the image at fault."""
        images = [self._read(place, image) for place, image in listed]
        try:
            return self.prompts.ready(text, images)
        except DataError as problem:
            raise unsupported(str(problem), param="messages") from None

    def _read(self, place: str, given: ImageUrl) -> Any:
        """The picture (PIL, RGB), upright and no larger than it may be."""
        try:
            image = of_url(given.url)
        except ValueError as problem:
            raise ApiError(400, str(problem), param=place, code="invalid_image") from None
        if given.detail == "low":
            image.thumbnail((limits.LOW_DETAIL_PIXELS, limits.LOW_DETAIL_PIXELS))
        pixels = image.width * image.height
        if self.max_pixels is not None and pixels > self.max_pixels:
            scale = (self.max_pixels / pixels) ** 0.5
            image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        return image
