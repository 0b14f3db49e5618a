"""The encoded data set: flat arrays of ids, labels and weights, read from memory or from memory-mapped files."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from swift.data.records import Rejected
from swift.data.render import Rendered
from swift.files import explain_os_errors

_FILES = {"input_ids": np.int32, "labels": np.int32, "weights": np.float32, "offsets": np.int64, "records": np.int64}


@dataclass(slots=True)
class Example:
    """One example: one sequence or a pair, the position of its record, and how many tokens were cut from it."""

    sequences: list[Rendered]
    record: int
    extras: dict[str, Any]
    num_cut: int = 0


Chunk = list[Example | Rejected]


class Encoded:
    """Examples of token ids.

    ``encoded[i]`` is ``{"input_ids", "labels", "weights"}`` (numpy arrays; weights is None if all are 1), with
    ``label``, ``margin`` and ``channel`` if the row has them. Of a pair it is ``{"chosen", "rejected"}`` of those.
    """

    def __init__(
        self,
        arrays: dict[str, npt.NDArray[Any]],
        meta: dict[str, Any],
        rejected: list[Rejected],
        path: Path | None = None,
    ) -> None:
        self._ids, self._labels, self._weights = arrays["input_ids"], arrays["labels"], arrays.get("weights")
        self._offsets = arrays["offsets"]
        self._extras: list[dict[str, Any]] | None = meta.get("extras")
        self._stats: dict[str, Any] = meta["stats"]
        self.is_paired: bool = meta["is_paired"]
        self.record_indices = arrays["records"]
        """The position of each example's record in the records that were encoded."""
        self.rejected = rejected
        self.path = path
        """Where the files are, or None if they are in memory."""

    @staticmethod
    def open(path: str | Path) -> "Encoded":
        path = Path(path)
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        arrays: dict[str, npt.NDArray[Any]] = {
            name: np.memmap(path / f"{name}.bin", kind, "r") for name, kind in _FILES.items() if (path / f"{name}.bin").exists()
        }
        rejected = [Rejected(**item) for item in meta["rejected"]]
        return Encoded(arrays, meta, rejected, path)

    def __len__(self) -> int:
        return len(self.record_indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        example: dict[str, Any]
        if self.is_paired:
            example = {"chosen": self._sequence(2 * index), "rejected": self._sequence(2 * index + 1)}
        else:
            example = self._sequence(index)
        if self._extras is not None:
            example.update(self._extras[index])
        return example

    def _sequence(self, index: int) -> dict[str, Any]:
        part = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        weights = None if self._weights is None else self._weights[part]
        return {"input_ids": self._ids[part], "labels": self._labels[part], "weights": weights}

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each example, of both sides of a pair together."""
        lengths = np.diff(self._offsets)
        return lengths.reshape(-1, 2).sum(axis=1) if self.is_paired else lengths

    def stats(self) -> dict[str, Any]:
        """Counts: examples, rows, rejected, truncated, cut tokens, tokens, trained tokens, mean and largest length."""
        return dict(self._stats)


class Writer:
    """Collects chunks of examples; ``finish`` gives the Encoded, in ``place`` if given: complete or not at all."""

    def __init__(self, *, is_paired: bool, place: Path | None) -> None:
        self.is_paired, self.place = is_paired, place
        self.num_examples = 0
        self._buffers: dict[str, bytearray] = {name: bytearray() for name in _FILES}
        self._offset = 0
        self._offsets = [0]
        self._has_weights = False
        self._extras: list[dict[str, Any]] = []
        self.rejected: list[Rejected] = []
        self._rows: set[int] = set()
        self._counts = {"truncated": 0, "tokens_cut": 0, "trained_tokens": 0}
        self._folder: Path | None = None

    def __enter__(self) -> "Writer":
        if self.place is not None:
            with explain_os_errors(self.place):
                self.place.parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(dir=self.place.parent, prefix=".unfinished-"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, chunk: Chunk) -> None:
        for item in chunk:
            if isinstance(item, Rejected):
                self.rejected.append(item)
                continue
            self.num_examples += 1
            self._rows.add(item.record)
            self._extras.append(item.extras)
            self._counts["truncated"] += item.num_cut > 0
            self._counts["tokens_cut"] += item.num_cut
            self._put("records", [item.record])
            for sequence in item.sequences:
                self._put("input_ids", sequence.input_ids)
                self._put("labels", sequence.labels)
                self._add_weights(sequence.weights, len(sequence.input_ids))
                self._counts["trained_tokens"] += sum(label >= 0 for label in sequence.labels[1:])
                self._offset += len(sequence.input_ids)
                self._offsets.append(self._offset)
        self._flush()

    def _add_weights(self, weights: Sequence[float] | None, length: int) -> None:
        """Weights are kept from the first sequence that needs them on; those before it are all 1."""
        if weights is not None and not self._has_weights:
            self._has_weights = True
            for start in range(0, self._offset, 1 << 20):
                self._put("weights", np.ones(min(1 << 20, self._offset - start)))
                self._flush()
        if self._has_weights:
            self._put("weights", np.ones(length) if weights is None else weights)

    def _put(self, name: str, values: Any) -> None:
        self._buffers[name] += np.asarray(values, dtype=_FILES[name]).tobytes()

    def _flush(self) -> None:
        if self._folder is None:
            return
        for name, buffer in self._buffers.items():
            if buffer:
                path = self._folder / f"{name}.bin"
                with explain_os_errors(path), path.open("ab") as stream:
                    stream.write(buffer)
                buffer.clear()

    def finish(self) -> Encoded:
        self._put("offsets", self._offsets)
        meta = {
            "is_paired": self.is_paired,
            "stats": self._stats(),
            "extras": self._extras if any(self._extras) else None,
        }
        if self.place is None or self._folder is None:
            kept = {name: np.frombuffer(bytes(buffer), _FILES[name]) for name, buffer in self._buffers.items() if buffer}
            return Encoded(kept, meta, self.rejected)
        self._flush()
        meta["rejected"] = [{"source": item.source, "row": item.row, "reason": item.reason} for item in self.rejected]
        text = json.dumps(meta, ensure_ascii=False, default=str)
        with explain_os_errors(self.place):
            (self._folder / "meta.json").write_text(text, encoding="utf-8", errors="backslashreplace")
        try:
            os.rename(self._folder, self.place)
        except OSError:
            if not (self.place / "meta.json").is_file():  # not another process that was first with the same result
                raise
        return Encoded.open(self.place)

    def _stats(self) -> dict[str, Any]:
        lengths = np.diff(self._offsets)
        if self.is_paired:
            lengths = lengths.reshape(-1, 2).sum(axis=1)
        return {
            "examples": self.num_examples,
            "rows": len(self._rows),
            "rejected": len(self.rejected),
            **self._counts,
            "tokens": self._offset,
            "mean_length": round(float(lengths.mean()), 1),
            "max_length": int(lengths.max()),
        }
