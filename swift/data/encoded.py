"""The encoded data set: flat arrays of ids, labels and weights, read from memory or from memory-mapped files."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swift.data.spool import ArrayBlobs, RejectedRows

FILES: dict[str, npt.DTypeLike] = {
    "input_ids": np.int32,
    "labels": np.int32,
    "weights": np.float32,
    "offsets": np.int64,
    "records": np.int64,
    "extras": np.uint8,
    "extras_ends": np.int64,
    "rejected": np.uint8,
    "rejected_ends": np.int64,
}


class Encoded:
    """Examples of token ids.

    ``encoded[i]`` is ``{"input_ids", "labels", "weights"}`` (numpy arrays; weights is None if all are 1), with
    ``label``, ``margin`` and ``channel`` if the row has them. Of a pair it is ``{"chosen", "rejected"}`` of those, with
    ``reference_logps`` (of both) once they are known.
    """

    reference_logps: npt.NDArray[np.float32] | None = None
    """(pairs, 2): log-probabilities of the chosen and of the rejected sequence, that another model gives them."""

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any], path: Path | None = None) -> None:
        self._ids, self._labels, self._weights = arrays["input_ids"], arrays["labels"], arrays.get("weights")
        self._offsets = arrays["offsets"]
        self._extras = _blobs(arrays, "extras") if "extras" in arrays else None
        self._stats: dict[str, Any] = meta["stats"]
        self.is_paired: bool = meta["is_paired"]
        self.record_indices = arrays["records"]
        """The position of each example's record in the records that were encoded."""
        self.rejected = RejectedRows(_blobs(arrays, "rejected"))
        self.path = path
        """Where the files are, or None if they have no name."""

    @staticmethod
    def open(path: str | Path) -> "Encoded":
        path = Path(path)
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        arrays: dict[str, npt.NDArray[Any]] = {
            name: np.memmap(path / f"{name}.bin", kind, "r") for name, kind in FILES.items() if (path / f"{name}.bin").exists()
        }
        return Encoded(arrays, meta, path)

    def __len__(self) -> int:
        return len(self.record_indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        example: dict[str, Any]
        if self.is_paired:
            example = {"chosen": self._sequence(2 * index), "rejected": self._sequence(2 * index + 1)}
            if self.reference_logps is not None:
                example["reference_logps"] = tuple(self.reference_logps[index].tolist())
        else:
            example = self._sequence(index)
        if self._extras is not None:
            example.update(json.loads(self._extras[index]))
        return example

    def _sequence(self, index: int) -> dict[str, Any]:
        part = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        weights = None if self._weights is None else self._weights[part]
        return {"input_ids": self._ids[part], "labels": self._labels[part], "weights": weights}

    def digest(self) -> str:
        """Of the tokens, the labels and their weights: equal for examples that a model cannot tell apart."""
        sha = hashlib.sha256()
        for array in (self._offsets, self._ids, self._labels, self._weights):
            sha.update(b"none" if array is None else np.ascontiguousarray(array).data)
        return sha.hexdigest()

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each example, of both sides of a pair together."""
        return lengths_of(self._offsets, self.is_paired)

    def stats(self) -> dict[str, Any]:
        """Counts of what was encoded and what was left out.

        ``examples``; ``rows`` they come from; ``rejected`` rows, of which ``too_long`` are longer than max_length (with
        ``tokens_too_long`` tokens); ``truncated`` rows that lost ``tokens_cut`` tokens; rows that were ``split`` in
        pieces; ``tokens``, ``trained_tokens``; ``mean_length`` and ``max_length`` of an example.
        """
        return dict(self._stats)


def lengths_of(offsets: npt.NDArray[np.int64], is_paired: bool) -> npt.NDArray[np.int64]:
    lengths: npt.NDArray[np.int64] = np.diff(offsets)
    return lengths.reshape(-1, 2).sum(axis=1) if is_paired else lengths


def _blobs(arrays: dict[str, npt.NDArray[Any]], name: str) -> ArrayBlobs:
    if name not in arrays:
        return ArrayBlobs(np.zeros(0, np.uint8), np.zeros(1, np.int64))
    return ArrayBlobs(arrays[name], arrays[f"{name}_ends"])
