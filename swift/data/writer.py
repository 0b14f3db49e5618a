"""Writing an encoded data set chunk by chunk: the memory that it takes does not grow with the tokens."""

import dataclasses
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from swift.data.encoded import FILES, Encoded, lengths_of
from swift.data.records import Rejected
from swift.data.render import IGNORED, Rendered
from swift.data.spool import Blobs, RejectedRows, Spill, rejected_line
from swift.files import explain_os_errors


@dataclass(slots=True)
class Example:
    """One example: one sequence or a pair, the position of its record, and how many tokens were cut from it."""

    sequences: list[Rendered]
    record: int
    extras: dict[str, Any]
    num_cut: int = 0


@dataclass(slots=True)
class Counts:
    """What the rows lost; see ``Encoded.stats``."""

    rows: int = 0
    rejected: int = 0
    too_long: int = 0
    tokens_too_long: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    split: int = 0
    trained_tokens: int = 0

    def add(self, other: "Counts") -> None:
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COUNTS = tuple(one.name for one in dataclasses.fields(Counts))


@dataclass(slots=True)
class Chunk:
    """The examples of some records as flat arrays: small to send to another process, quick to write."""

    ids: bytearray = field(default_factory=bytearray)
    labels: bytearray = field(default_factory=bytearray)
    weights: list[Sequence[float] | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[bytes] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def add(self, examples: list[Example], *, is_split: bool) -> None:
        """Add the examples of one record."""
        self.counts.rows += 1
        self.counts.split += is_split
        num_cut = sum(example.num_cut for example in examples)
        self.counts.truncated += num_cut > 0
        self.counts.tokens_cut += num_cut
        for example in examples:
            self.records.append(example.record)
            self.extras.append(example.extras)
            for sequence in example.sequences:
                labels = np.array(sequence.labels, np.int32)
                self.ids += np.array(sequence.input_ids, np.int32).tobytes()
                self.labels += labels.tobytes()
                self.weights.append(sequence.weights)
                self.lengths.append(len(labels))
                self.counts.trained_tokens += int((labels[1:] != IGNORED).sum())

    def reject(self, item: Rejected, tokens_too_long: int | None) -> None:
        self.rejected.append(rejected_line(item))
        self.counts.rejected += 1
        if tokens_too_long is not None:
            self.counts.too_long += 1
            self.counts.tokens_too_long += tokens_too_long


class _File:
    """A file that is made with its first bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[bytes] | None = None

    def append(self, data: bytes | bytearray | memoryview) -> None:
        if not len(data):
            return
        with explain_os_errors(self.path):
            if self._stream is None:
                self._stream = self.path.open("wb")
            self._stream.write(data)

    def close(self) -> None:
        if self._stream is not None:
            with explain_os_errors(self.path):
                self._stream.close()
            self._stream = None


class Writer:
    """Collects chunks of examples; ``finish`` gives the Encoded, in ``place`` if given: complete or not at all.

    Without a place small data stays in memory and large data goes to files without a name.
    """

    def __init__(self, *, is_paired: bool, place: Path | None) -> None:
        self.is_paired, self.place = is_paired, place
        self.num_examples = 0
        self.counts = Counts()
        self._outputs: dict[str, Spill | _File] = {}
        self._offsets = array("q", [0])
        self._extras_ends = array("q", [0])
        self._has_weights = self._has_extras = False
        self._folder: Path | None = None
        self._rejected = Blobs()
        self.rejected = RejectedRows(self._rejected)

    def __enter__(self) -> "Writer":
        if self.place is not None:
            with explain_os_errors(self.place):
                self.place.parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(dir=self.place.parent, prefix=".unfinished-"))
        self._outputs = {name: Spill() if self._folder is None else _File(self._folder / f"{name}.bin") for name in FILES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._folder is not None:
            for output in self._outputs.values():
                if isinstance(output, _File) and output._stream is not None:
                    output._stream.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, chunk: Chunk) -> None:
        self.counts.add(chunk.counts)
        self.num_examples += len(chunk.records)
        self._outputs["input_ids"].append(chunk.ids)
        self._outputs["labels"].append(chunk.labels)
        self._put("records", chunk.records)
        self._add_weights(chunk)
        for length in chunk.lengths:
            self._offsets.append(self._offsets[-1] + length)
        self._add_extras(chunk)
        for line in chunk.rejected:
            self._rejected.append(line)

    def _put(self, name: str, values: Any) -> None:
        self._outputs[name].append(np.asarray(values, dtype=FILES[name]).tobytes())

    def _add_weights(self, chunk: Chunk) -> None:
        """Weights are kept from the first chunk that needs them on; those before it are all 1."""
        if not self._has_weights and any(weights is not None for weights in chunk.weights):
            self._has_weights = True
            for start in range(0, self._offsets[-1], 1 << 20):
                self._put("weights", np.ones(min(1 << 20, self._offsets[-1] - start)))
        if self._has_weights:
            for weights, length in zip(chunk.weights, chunk.lengths, strict=True):
                self._put("weights", np.ones(length) if weights is None else weights)

    def _add_extras(self, chunk: Chunk) -> None:
        """As with weights: from the first example that has labels and the like on."""
        if not self._has_extras and any(chunk.extras):
            self._has_extras = True
            for _ in range(self.num_examples - len(chunk.records)):
                self._add_extra(b"{}")
        if self._has_extras:
            for extras in chunk.extras:
                self._add_extra(json.dumps(extras, default=str).encode())

    def _add_extra(self, line: bytes) -> None:
        self._outputs["extras"].append(line)
        self._extras_ends.append(self._extras_ends[-1] + len(line))

    def finish(self) -> Encoded:
        self._put("offsets", self._offsets)
        if self._has_extras:
            self._put("extras_ends", self._extras_ends)
        if len(self._rejected):
            for line in self._rejected:
                self._outputs["rejected"].append(line)
            self._put("rejected_ends", self._rejected.ends)
        meta = {"is_paired": self.is_paired, "stats": self.stats()}
        if self.place is None or self._folder is None:
            spilled = {name: output for name, output in self._outputs.items() if isinstance(output, Spill) and output.size}
            return Encoded({name: output.array(FILES[name]) for name, output in spilled.items()}, meta)
        for output in self._outputs.values():
            if isinstance(output, _File):
                output.close()
        with explain_os_errors(self.place):
            (self._folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        try:
            os.rename(self._folder, self.place)
        except OSError:
            if not (self.place / "meta.json").is_file():  # not another process that was first with the same result
                raise
        return Encoded.open(self.place)

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def stats(self) -> dict[str, Any]:
        lengths: npt.NDArray[np.int64] = lengths_of(np.frombuffer(self._offsets, np.int64), self.is_paired)
        return {
            "examples": self.num_examples,
            **dataclasses.asdict(self.counts),
            "tokens": self._offsets[-1],
            "mean_length": round(float(lengths.mean()), 1),
            "max_length": int(lengths.max()),
        }
