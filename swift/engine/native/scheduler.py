"""Which tokens of which sequences the next forward pass computes. Knows no tensors.

Each sequence has tokens, of which the first ``num_computed`` have their keys and values in the cache. A pass computes some
more of them: the last one of a sequence that is answering, a part of a long prompt, the rest of a short one; all in one
row. There are no phases.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from swift.engine.native.blocks import ROOT, Blocks, Found, common


@dataclass(eq=False)
class Sequence:
    """A prompt and what was answered so far."""

    id: str
    tokens: list[int]
    adapter: str | None = None
    salt: bytes = ROOT  # keys and values of other adapters are others
    reads_cache: bool = True  # false where the logits of the whole prompt are wanted
    num_prompt: int = 0
    num_computed: int = 0
    num_cached: int = 0  # tokens of the prompt that were found in the cache when it was first begun
    draft: list[int] = field(default_factory=list)  # guessed tokens that follow, computed along with the last one
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the sealed ones among ``blocks``, which come first
    num_preempted: int = 0
    media: Any = None  # images of the prompt
    named: tuple[int, ...] = ()  # the prompt with numbers that stand for its images, by which blocks are known

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.tokens)

    @property
    def names(self) -> list[int]:
        """What tokens are known by in the cache: an image's are known by the image."""
        return [*self.named, *self.tokens[len(self.named) :]] if self.named else self.tokens

    @property
    def num_missing(self) -> int:
        """Tokens that are not computed; at least one, since the last one's logits are always wanted."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True)
class Part:
    """Tokens ``begin`` to ``end`` of a sequence, computed in one pass; ``num_draft`` guessed ones follow them.

    ``is_last``: no token is missing after it, so that a new one follows from it.
    """

    sequence: Sequence
    begin: int
    end: int
    is_last: bool
    num_draft: int = 0

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin + self.num_draft


@dataclass(frozen=True)
class Copy:
    """The first ``num_tokens`` of block ``source`` are needed in ``target`` before the pass."""

    source: int
    target: int
    num_tokens: int


@dataclass
class Pass:
    """What one forward pass computes."""

    parts: list[Part] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


class Scheduler:
    """First come, first served; answers before prompts, so that a long prompt does not hold up those who are answering.

    ``max_num_seqs``: most sequences in a pass; ``max_num_tokens``: most tokens, at least as many. Where blocks run out,
    the sequence that came last gives up its own and is computed again later.
    """

    def __init__(self, blocks: Blocks, *, max_num_seqs: int, max_num_tokens: int, shares_prefixes: bool = True) -> None:
        assert max_num_tokens >= max_num_seqs
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        self.shares_prefixes = shares_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of arrival
        self.num_preemptions = 0
        self._copied: list[int] = []  # sources of the pass under way

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens can be computed when it is alone."""
        return -(-num_tokens // self.blocks.block_size) <= self.blocks.num_blocks

    def add(self, sequence: Sequence) -> None:
        """The caller has seen that it ``fits`` with its whole answer."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is finished or given up. Not between ``plan`` and ``computed``."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks = []

    def plan(self) -> Pass:
        """What to compute next; has no parts if nothing is to be done."""
        step = Pass()
        room, preempted = self.max_num_tokens, self.num_preemptions
        answering = [sequence for sequence in self.running if sequence.num_missing == 1]
        others = [sequence for sequence in self.running if sequence.num_missing > 1]
        for sequence in [*answering, *others]:
            if sequence not in self.running:
                continue  # preempted meanwhile
            room -= self._plan_running(sequence, step, room)
        if self.num_preemptions > preempted:
            return step  # who just gave up blocks does not take them back at once
        for sequence in list(self.waiting):
            if len(self.running) == self.max_num_seqs or room == 0:
                break
            found = self._find(sequence)
            if self._is_being_computed(sequence, found):
                continue
            count = self._admit(sequence, found, step, room)
            if count == 0:
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            room -= count
        return step

    def computed(self, step: Pass, accepted: Iterable[list[int]]) -> None:
        """The pass is done: ``accepted`` are, for each part, the tokens that follow (none before the last part)."""
        self.blocks.release(self._copied)
        self._copied = []
        for part, tokens in zip(step.parts, accepted, strict=True):
            sequence = part.sequence
            sequence.num_computed = part.end + max(len(tokens) - 1, 0)  # guessed tokens that proved right are computed
            sequence.tokens.extend(tokens)
            sequence.draft = []
            self._seal(sequence)

    def _plan_running(self, sequence: Sequence, step: Pass, room: int) -> int:
        """Tokens of ``room`` that the next part of ``sequence`` takes."""
        count = min(sequence.num_missing, room)
        num_draft = min(len(sequence.draft), room - count) if count == sequence.num_missing else 0
        if count <= 0:
            return 0
        freed = 0
        while not self._grow(sequence, sequence.num_computed + count + num_draft):
            if num_draft:
                num_draft = 0  # no one gives way to a guess
                continue
            victim = self.running[-1]
            freed += self._preempt(victim, step)
            if victim is sequence:
                return -freed
        step.parts.append(_part(sequence, sequence.num_computed, count, num_draft))
        return count + num_draft - freed

    def _find(self, sequence: Sequence) -> Found:
        return self.blocks.find(sequence.names, sequence.salt) if sequence.reads_cache and self.shares_prefixes else Found()

    def _is_being_computed(self, sequence: Sequence, found: Found) -> bool:
        """Whether a running sequence is about to compute more of this one's beginning than was found: then waiting is less work."""
        if not (sequence.reads_cache and self.shares_prefixes):
            return False
        known = len(found.blocks) * self.blocks.block_size
        most = len(sequence.tokens) - 1
        names = sequence.names[:most]
        return any(
            other.salt == sequence.salt
            and other.num_computed < other.num_prompt
            and common(names, other.names) - known >= self.blocks.block_size
            for other in self.running
        )

    def _admit(self, sequence: Sequence, found: Found, step: Pass, room: int) -> int:
        """Tokens of ``room`` that the first part of ``sequence`` takes; 0 if there are not enough blocks."""
        assert not sequence.blocks and sequence.num_computed == 0
        self.blocks.hold(found.blocks)
        taken = self._take_after(found, found.num_copied, len(sequence.tokens), room)
        num_known = len(found.blocks) * self.blocks.block_size
        if taken is not None and found.source is not None:
            step.copies.append(Copy(found.source, taken[0], found.num_copied))
            num_known += found.num_copied
        elif taken is None:
            taken = self._take_after(found, 0, len(sequence.tokens), room)
        if taken is None:
            self.blocks.release(found.blocks)
            return 0
        count = min(len(sequence.tokens) - num_known, room)
        sequence.blocks, sequence.digests, sequence.num_computed = [*found.blocks, *taken], [*found.digests], num_known
        if sequence.num_preempted == 0:
            sequence.num_cached = num_known
        step.parts.append(_part(sequence, num_known, count))
        return count

    def _take_after(self, found: Found, num_copied: int, num_tokens: int, room: int) -> list[int] | None:
        """Blocks for the first part after what was found; the block to copy from is held until the pass is done."""
        num_shared = len(found.blocks)
        num_known = num_shared * self.blocks.block_size + num_copied
        source = [found.source] if num_copied and found.source is not None else []
        self.blocks.hold(source)
        end = num_known + min(num_tokens - num_known, room)
        taken = self.blocks.take(-(-end // self.blocks.block_size) - num_shared)
        if taken is None:
            self.blocks.release(source)
        else:
            self._copied += source
        return taken

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first ``num_tokens``; whether there were enough."""
        missing = -(-num_tokens // self.blocks.block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        taken = self.blocks.take(missing)
        if taken is None:
            return False
        sequence.blocks += taken
        return True

    def _preempt(self, sequence: Sequence, step: Pass) -> int:
        """Take its blocks from ``sequence``, which waits before all others; the tokens that its part of the pass would have taken."""
        planned = [part for part in step.parts if part.sequence is sequence]
        step.parts = [part for part in step.parts if part.sequence is not sequence]
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.digests, sequence.num_computed = [], [], 0
        sequence.num_preempted += 1
        self.num_preemptions += 1
        return sum(part.num_tokens for part in planned)

    def _seal(self, sequence: Sequence) -> None:
        if not self.shares_prefixes:
            return
        size = self.blocks.block_size
        while (len(sequence.digests) + 1) * size <= sequence.num_computed:
            index = len(sequence.digests)
            before = sequence.digests[-1] if sequence.digests else sequence.salt
            name, block = self.blocks.seal(sequence.blocks[index], before, sequence.names[index * size : (index + 1) * size])
            sequence.digests.append(name)
            sequence.blocks[index] = block


def _part(sequence: Sequence, begin: int, count: int, num_draft: int = 0) -> Part:
    return Part(sequence, begin, begin + count, begin + count == len(sequence.tokens), num_draft)
