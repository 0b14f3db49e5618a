"""Log-probabilities of an answer's tokens in OpenAI's form, for result files and for the server."""

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from swift.engine.base import Logprob
from swift.engine.writer import UNKNOWN

LEAST = -9999.0  # OpenAI's value for what JSON cannot say, minus infinity

Spell = Callable[[int], tuple[str, bytes]]
_NAMED_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def speller(tokenizer: Any) -> Spell:
    """What gives the text and the bytes of a token. The bytes of several tokens join to characters where their texts cannot."""

    @lru_cache(maxsize=2**16)
    def spell(token_id: int) -> tuple[str, bytes]:
        text = tokenizer.decode([token_id])
        return text, _bytes(tokenizer.convert_ids_to_tokens(token_id), text) if UNKNOWN in text else text.encode()

    return spell


def content_of(values: Sequence[Logprob], spell: Spell) -> list[dict[str, Any]]:
    """The member ``content`` of OpenAI's ``logprobs``: an entry for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, own = spell(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(own)}

    return [
        {**entry(value.token_id, value.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in value.top]}
        for value in values
    ]


def finite(logprob: float) -> float:
    """``logprob`` as JSON can write it."""
    return max(logprob, LEAST)


def _bytes(name: str | None, text: str) -> bytes:
    """Those of a token with half a character, from its ``name`` in the vocabulary: <0xAB>, or a letter of GPT-2's for each byte."""
    if (named := _NAMED_BYTE.fullmatch(name or "")) is not None:
        return bytes([int(named[1], 16)])
    letters = _letters()
    return bytes(letters[letter] for letter in name) if name and all(letter in letters for letter in name) else text.encode()


@cache
def _letters() -> dict[str, int]:
    """GPT-2's letter of each byte: those that can be printed are themselves, the others follow from U+0100 on in their order."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printed))
    return {chr(byte): byte for byte in printed} | {chr(0x100 + number): byte for number, byte in enumerate(others)}
