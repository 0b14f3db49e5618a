"""Beginnings that documents share: found, laid out once, and branched from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swift.model.layout import Layout

# Shorter beginnings cost more (another call of the attention kernel in each layer) than they save.
MIN_SHARED = 16

Ids = NDArray[np.int64]


@dataclass
class Flat:
    """Documents as one row of tokens."""

    layout: Layout
    input_ids: Ids  # (T,)
    places: list[Ids]  # for each document: where its tokens are in the row


def flatten(documents: Sequence[Ids], *, share: bool, root: int = 0) -> Flat:
    """``documents`` (none empty) as one row; equal beginnings of at least MIN_SHARED tokens stand there once, if ``share``.

    ``root`` tokens before each of them are computed elsewhere.
    """
    if not share or len(documents) < 2:
        layout = Layout.of_documents([len(ids) for ids in documents], root)
        places = [np.arange(start, start + length) for start, length in zip(layout.starts, layout.lengths, strict=True)]
        return Flat(layout, np.concatenate(documents), places)
    tree = _Tree(documents)
    tree.grow(0, len(documents), 0, -1)
    layout = Layout(tuple(len(part) for part in tree.parts), tuple(tree.parents), root)
    spans = [np.arange(start, start + length) for start, length in zip(layout.starts, layout.lengths, strict=True)]
    places = [np.concatenate([spans[part] for part in layout.chains[tree.ends[index]]]) for index in range(len(documents))]
    return Flat(layout, np.concatenate(tree.parts), places)


def common_root(documents: Sequence[Ids], labels: Sequence[Ids]) -> int:
    """Tokens that all ``documents`` begin with and that predict nothing which is trained; 0 if they are too few to matter."""
    root = min(len(documents[0]), *(common_prefix(documents[0], ids) for ids in documents[1:])) if len(documents) > 1 else 0
    for own in labels:
        trained = np.flatnonzero(own[1 : root + 1] != -100)
        if len(trained):
            root = int(trained[0])  # the token before the first trained one predicts it
    return root if root >= MIN_SHARED else 0


def common_prefix(a: Ids, b: Ids) -> int:
    """Number of tokens with which both begin."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


@dataclass
class _Tree:
    """Segments as they are found, depth first. Documents are sorted, so those with a common beginning are neighbours."""

    documents: Sequence[Ids]
    parts: list[Ids] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)  # document: its last segment

    def __post_init__(self) -> None:
        self.order = sorted(range(len(self.documents)), key=lambda index: self.documents[index].astype(">u4").tobytes())
        pairs = zip(self.order, self.order[1:], strict=False)
        self.shared = [common_prefix(self.documents[a], self.documents[b]) for a, b in pairs]

    def grow(self, first: int, last: int, depth: int, parent: int) -> None:
        """Lay out the documents ``first`` to ``last`` - 1 of the order, whose first ``depth`` tokens end in segment ``parent``."""
        if last - first == 1:
            index = self.order[first]
            rest = self.documents[index][depth:]
            self.ends[index] = self._add(rest, parent) if len(rest) else parent
            return
        shared = min(self.shared[first : last - 1])
        if shared - depth >= MIN_SHARED:
            parent = self._add(self.documents[self.order[first]][depth:shared], parent)
            depth = shared
        begin = first
        for at in range(first, last):
            if at == last - 1 or self.shared[at] - depth < MIN_SHARED:
                self.grow(begin, at + 1, depth, parent)
                begin = at + 1

    def _add(self, ids: Ids, parent: int) -> int:
        self.parts.append(ids)
        self.parents.append(parent)
        return len(self.parts) - 1
