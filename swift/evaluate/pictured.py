"""Rows with images: what they show, wherever a benchmark keeps it, as pictures and as parts of a message."""

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swift.engine.pictures import of_bytes, of_row, of_url
from swift.errors import DataError

MARK = "<image>"  # in a question: the place of an image
LONGEST_REFERENCE = 64  # characters: a shorter text in the place of an image names the row that has it, as VLMEvalKit writes it


class Pictures:
    """``rows`` by id, for images that refer to another row; ``column`` is where those are kept."""

    def __init__(self, rows: Mapping[str, Mapping[str, Any]], column: str = "image") -> None:
        self._rows, self._column = rows, column

    def picture(self, given: Any, where: str) -> Any:
        """The picture (PIL, RGB): a file beside that of the row, base64, a data URL, bytes, or the id of the row that has it.

        DataError names ``where``, the file and line of the row.
        """
        try:
            return self._read(given, _folder(where))
        except ValueError as problem:
            raise DataError(f"{where}: {problem}") from None

    def file(self, given: Any, where: str) -> Path | None:
        """The file that the picture lies in; None if the row holds it, or refers to another row."""
        is_text = isinstance(given, str) and not given.startswith("data:") and not self._is_of_another(given)
        return _file(given, _folder(where)) if is_text else None

    def _is_of_another(self, given: str) -> bool:
        return len(given) <= LONGEST_REFERENCE and given in self._rows and self._rows[given].get(self._column) != given

    def _read(self, given: Any, folder: Path) -> Any:
        if not isinstance(given, str):
            return of_row(given)
        if given.startswith("data:") or "://" in given[:10]:
            return of_url(given)
        if self._is_of_another(given):
            return self._read(self._rows[given][self._column], folder)
        place = _file(given, folder)
        return of_bytes(_decoded(given) if place is None else place.read_bytes())


def _folder(where: str) -> Path:
    """The folder of a row that is at ``where`` ("file:line", or "file[number]" where a file has no lines of rows)."""
    return Path(re.sub(r"(:\d+|\[\d+\])$", "", where)).parent


def _file(given: str, folder: Path) -> Path | None:
    places = (folder / given, Path(given)) if len(given) < 1024 else ()
    return next((place for place in places if place.is_file()), None)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise ValueError(f"the image {shown!r} is neither a file nor base64") from None


def parts_of(question: str, count: int) -> list[dict[str, Any]]:
    """A user's content: images where the question has their marks, or all of them before it."""
    texts = question.split(MARK)
    if len(texts) != count + 1:
        texts = [*([""] * count), question.replace(MARK, "")]
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] * (number > 0) + ([{"type": "text", "text": text}] if text.strip() else [])
    return parts


def messages_of(given: Any, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages and images of a row in OpenAI's form, without an answer at their end."""
    if not isinstance(given, list) or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in given):
        raise DataError(f"{where}: messages are a list of objects with role and content")
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    for one in given[:-1] if given and given[-1]["role"] == "assistant" else given:
        content = one.get("content")
        if isinstance(content, str):
            messages.append({"role": one["role"], "content": [{"type": "text", "text": content}]})
            continue
        if not isinstance(content, list):
            raise DataError(f"{where}: the content of a message is a text or a list of parts")
        messages.append({"role": one["role"], "content": [_part(part, images, where) for part in content]})
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: messages end with a question of the user")
    return messages, images


def _part(part: Any, images: list[Any], where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        image = part.get(kind)
        images.append(image.get("url") if isinstance(image, dict) and "url" in image else image)
        return {"type": "image"}
    raise DataError(f"{where}: a part of a message is a text, an image or an image_url, not {kind!r}")


def shown(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as one text for people."""
    lines = []
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", MARK) for part in content)
        lines.append(f"{message['role']}: {text}")
    return "\n".join(lines)


def data_url(picture: Any) -> str:
    """A picture of PIL as OpenAI's API takes it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
