"""Self-cognition data: the placeholders {{NAME}} and {{AUTHOR}} and what takes their place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from swift.data.records import Message
from swift.errors import ConfigError

_PLACEHOLDER = re.compile(r"\{\{\s*(NAME|AUTHOR|name|author)\s*\}\}")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Identity:
    """Name and author as (in Chinese text, in other text); None leaves the placeholder."""

    name: tuple[str, str] | None = None
    author: tuple[str, str] | None = None

    @staticmethod
    def of(name: str | Sequence[str] | None, author: str | Sequence[str] | None) -> "Identity":
        return Identity(_pair(name, "model_name"), _pair(author, "model_author"))

    @property
    def is_given(self) -> bool:
        return self.name is not None or self.author is not None

    def fill(self, messages: list[Message]) -> None:
        """Replace the placeholders in place; a conversation with a Chinese character gets the Chinese value."""
        if not has_placeholder(messages):
            return
        index = 0 if any(_CHINESE.search(message.text()) for message in messages) else 1

        def value(found: re.Match[str]) -> str:
            pair = self.name if found[1].lower() == "name" else self.author
            return found[0] if pair is None else pair[index]

        for message in messages:
            if isinstance(message.content, str):
                message.content = _PLACEHOLDER.sub(value, message.content)
            else:
                for part in message.content:
                    if part["type"] == "text":
                        part["text"] = _PLACEHOLDER.sub(value, part["text"])


def has_placeholder(messages: list[Message]) -> bool:
    return any(_PLACEHOLDER.search(message.text()) for message in messages)


def _pair(value: str | Sequence[str] | None, option: str) -> tuple[str, str] | None:
    if value is None or value == []:
        return None
    values = [value] if isinstance(value, str) else list(value)
    if len(values) not in (1, 2):
        raise ConfigError(f"{option} has {len(values)} values", hint="give one, or the Chinese and the English one")
    return values[0], values[-1]
