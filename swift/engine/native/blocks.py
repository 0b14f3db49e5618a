"""Blocks of the KV cache: who holds which, what is in them, and which may be used again. Knows no tensors."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as List
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

ROOT = b""
MOST_TRIED = 64  # blocks that follow a popular beginning are looked through from the newest on, this many


def digest(before: bytes, tokens: List[int]) -> bytes:
    """What a block is known by: its tokens and all tokens before it. ``before`` is the digest of the block before."""
    return blake2b(array("q", tokens).tobytes(), key=before, digest_size=16).digest()


@dataclass(frozen=True)
class Found:
    """What is in the cache of a sequence's beginning.

    ``blocks`` are full and may be shared; of ``source`` the first ``num_copied`` tokens go on from there, to be copied
    since the sequence continues otherwise.
    """

    blocks: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()
    source: int | None = None
    num_copied: int = 0


class Blocks:
    """``num_blocks`` blocks of ``block_size`` tokens.

    A full block whose keys and values were computed is *sealed*: another sequence that begins with the same tokens finds
    it. A sealed block that nobody holds keeps its content until the space is needed, the least recently used one first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._empty = list(reversed(range(num_blocks)))
        self._unused: OrderedDict[int, None] = OrderedDict()  # sealed, held by nobody, the least recently used first
        self._by_digest: dict[bytes, int] = {}
        self._content: dict[int, tuple[bytes, bytes, tuple[int, ...]]] = {}  # block: digest, the one before, tokens
        self._after: dict[bytes, dict[int, tuple[int, ...]]] = {}  # digest: the sealed blocks that follow, with their tokens

    @property
    def num_free(self) -> int:
        """Blocks that ``take`` can give, sealed ones that nobody holds among them."""
        return len(self._empty) + len(self._unused)

    def find(self, tokens: List[int], salt: bytes = ROOT) -> Found:
        """The longest beginning of ``tokens`` that is cached, at most all but the last one, whose logits are wanted."""
        size, most = self.block_size, len(tokens) - 1
        blocks: list[int] = []
        digests: list[bytes] = []
        before = salt
        while (len(blocks) + 1) * size <= most:
            begin = len(blocks) * size
            name = digest(before, tokens[begin : begin + size])
            if name not in self._by_digest:
                break
            blocks.append(self._by_digest[name])
            digests.append(name)
            before = name
        begin = len(blocks) * size
        rest = tokens[begin : min(begin + size, most)]
        source, num_copied = None, 0
        for block, content in islice(reversed(self._after.get(before, {}).items()), MOST_TRIED):
            if (length := common(rest, content)) > num_copied:
                source, num_copied = block, length
        return Found(tuple(blocks), tuple(digests), source, num_copied)

    def hold(self, blocks: List[int]) -> None:
        """One more holder for each of ``blocks``."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._unused[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int] | None:
        """``count`` blocks that nobody else holds; None if there are not as many."""
        if count > self.num_free:
            return None
        taken = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._unused.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: List[int]) -> None:
        """One holder less for each of ``blocks``, which are in the order of their sequence: its end is forgotten first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, f"block {block} was released more often than held"
            if self._holders[block] == 0:
                if block in self._content:
                    self._unused[block] = None
                else:
                    self._empty.append(block)

    def seal(self, block: int, before: bytes, tokens: List[int]) -> tuple[bytes, int]:
        """(digest, block to use from now on) of a block that is full and computed.

        If another block holds the same, that one is held in its place and ``block`` is released.
        """
        assert len(tokens) == self.block_size
        name = digest(before, tokens)
        if (known := self._by_digest.get(name)) is not None:
            if known != block:
                self.hold([known])
                self.release([block])
            return name, known
        content = tuple(tokens)
        self._by_digest[name] = block
        self._content[block] = (name, before, content)
        self._after.setdefault(before, {})[block] = content
        return name, block

    def _forget(self, block: int) -> None:
        name, before, _ = self._content.pop(block)
        del self._by_digest[name]
        followers = self._after[before]
        del followers[block]
        if not followers:
            del self._after[before]


def common(one: List[int], other: List[int]) -> int:
    """How many tokens the two begin with in common."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
