"""Guesses of what follows, from what was said before."""

from collections.abc import Sequence

SIZES = (4, 3, 2)  # tokens of the end that are looked for, the longest first


class Guesser:
    """Remembers where each few tokens of a sequence were followed by which.

    Source: prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # a few tokens: the place after the last time they were said
        self._num_seen = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to ``count`` tokens that followed the last time that the end of ``tokens`` was said; none if it never was.

        ``tokens`` begin with those of the call before.
        """
        for end in range(self._num_seen + 1, len(tokens)):  # what ends at the very end has nothing after it yet
            for size in SIZES:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._num_seen = max(self._num_seen, len(tokens) - 1)
        for size in SIZES:
            place = self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return list(tokens[place : place + count])
        return []
