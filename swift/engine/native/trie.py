"""Texts as a trie of tokens, depth first: which tokens are computed, each once, and what is read from their logits.

Sorted, each text begins with as much of the one before it as with any other before that, so what it adds to the trie
follows from its neighbour alone. The last token of a text is only read, never computed, unless another text goes on after it.
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swift.engine.scoring import Text

# N tokens of the trie that are computed, M scored tokens of all texts

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Trie:
    """``ids`` (N,) and their ``positions`` (N,), a token behind the one that it follows; a token's parent is the last one
    before it whose position is less by one.

    Scored token m is ``tokens[m]``, after the token ``rows[m]``; those of text i are numbers ``begins[i]`` to ``begins[i + 1]``.
    """

    ids: Ints
    positions: Ints
    rows: Ints
    tokens: Ints
    begins: Ints

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def trie_of(texts: Sequence[Text]) -> Trie:
    """The trie of at least one text."""
    keys = [_key(text.tokens) for text in texts]
    begins = np.cumsum([0, *(len(text.tokens) - text.start for text in texts)])
    rows, tokens = np.empty(begins[-1], np.int64), np.empty(begins[-1], np.int64)
    path = np.empty(max(len(text.tokens) for text in texts), np.int64)  # the row at each position of the text at hand
    ids: list[Ints] = []
    positions: list[Ints] = []
    before: Ints = np.empty(0, np.int64)
    count = 0
    for index in sorted(range(len(texts)), key=keys.__getitem__):
        own = np.frombuffer(keys[index], ">u4").astype(np.int64)
        last = len(own) - 1
        shared = min(common(before, own), max(len(before) - 1, 0))
        path[shared:last] = np.arange(count, count + last - shared)
        ids.append(own[shared:last])
        positions.append(np.arange(shared, last))
        count += last - shared
        mine = slice(begins[index], begins[index + 1])
        rows[mine] = path[texts[index].start - 1 : last]
        tokens[mine] = own[texts[index].start :]
        before = own
    return Trie(np.concatenate(ids), np.concatenate(positions), rows, tokens, begins)


def common(one: Ints, other: Ints) -> int:
    """How many tokens the two begin with in common."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _key(tokens: Sequence[int]) -> bytes:
    """Bytes that sort as the tokens do, and faster."""
    numbers = array("I", tokens)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()
