"""Rows on disk: what has been read, in files without a name that vanish with the process, and views over it.

A view is an array of row numbers. To shuffle, to sample, to split and to repeat are operations on such arrays; a row
becomes an object when it is asked for. Small data never leaves the memory.
"""

import json
import mmap
import os
import pickle
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from swift.data.records import Message, Record, Rejected
from swift.files import explain_os_errors
from swift.hub.cache import cache_root

T = TypeVar("T")

IN_MEMORY_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20
# No msgpack value begins with this byte.
_PICKLED = b"\xc1"
_PLAIN = (str, int, float, bool, bytes, type(None))


class Spill:
    """Bytes that only grow: in memory up to IN_MEMORY_BYTES, then in a file of the cache that has no name."""

    def __init__(self) -> None:
        self.size = 0
        self._buffer = bytearray()
        self._file: int | None = None
        self._lock = threading.Lock()

    def append(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) > (IN_MEMORY_BYTES if self._file is None else _BUFFER_BYTES):
            self._flush()

    def _flush(self) -> int:
        """Write what is in memory; returns the file descriptor."""
        place = cache_root() / "spool"
        with self._lock, explain_os_errors(place):
            if self._file is None:
                place.mkdir(parents=True, exist_ok=True)
                self._file, name = tempfile.mkstemp(dir=place)
                os.unlink(name)
                weakref.finalize(self, os.close, self._file)
            view = memoryview(self._buffer)
            while view:
                view = view[os.write(self._file, view) :]
            self._buffer = bytearray()
            return self._file

    def read(self, start: int, stop: int) -> bytes:
        """By a read and not by a memory map, whose pages would count as memory of the process."""
        if self._file is None:
            return bytes(memoryview(self._buffer)[start:stop])
        if self._buffer:
            self._flush()
        with explain_os_errors(cache_root() / "spool"):
            return os.pread(self._file, stop - start, start)

    def array(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """All of it as one array: in memory, or memory-mapped."""
        if self._file is None:
            return np.frombuffer(bytes(self._buffer), dtype)
        return np.frombuffer(mmap.mmap(self._flush(), self.size, access=mmap.ACCESS_READ), dtype)


class Blobs:
    """A list of byte strings that only grows, in a Spill."""

    def __init__(self) -> None:
        self.data = Spill()
        self.ends = array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def append(self, blob: bytes) -> None:
        self.data.append(blob)
        self.ends.append(self.data.size)

    def extend(self, data: bytes | bytearray, lengths: Iterable[int]) -> None:
        """Add blobs that lie one after the other in ``data``."""
        end = self.ends[-1]
        for length in lengths:
            end += length
            self.ends.append(end)
        self.data.append(data)
        assert end == self.data.size

    def __getitem__(self, index: int) -> bytes:
        return self.data.read(self.ends[index], self.ends[index + 1])

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))


class Records(Sequence[Record]):
    """Records of ``blobs`` in the order of ``indices``; each is made anew when it is asked for."""

    def __init__(self, blobs: Blobs, indices: npt.NDArray[np.int64] | None = None) -> None:
        self.blobs = blobs
        self.indices = np.arange(len(blobs), dtype=np.int64) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [unpack(self.blobs[at]) for at in self.indices[index].tolist()]
        return unpack(self.blobs[int(self.indices[index])])

    def __iter__(self) -> Iterator[Record]:
        return (unpack(blob) for blob in self.packed())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: npt.NDArray[np.int64]) -> "Records":
        """The view of ``self[i]`` for each of ``indices``."""
        return Records(self.blobs, self.indices[indices])

    def packed(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The records as bytes that ``unpack`` reads."""
        stop = len(self) if stop is None else min(stop, len(self))
        for first in range(start, stop, 4096):
            for at in self.indices[first : min(first + 4096, stop)].tolist():
                yield self.blobs[at]


class ArrayBlobs:
    """Byte strings that lie one after the other in ``data``, each up to one of ``ends``; the first of these is 0."""

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.data, self.ends = data, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[int(self.ends[index]) : int(self.ends[index + 1])].tobytes()


class RejectedRows(Sequence[Rejected]):
    """Rejected rows, as many as there are, kept as JSON lines: what rejected.jsonl holds."""

    def __init__(self, blobs: Blobs | ArrayBlobs) -> None:
        self.blobs = blobs

    def __len__(self) -> int:
        return len(self.blobs)

    @overload
    def __getitem__(self, index: int) -> Rejected: ...

    @overload
    def __getitem__(self, index: slice) -> list[Rejected]: ...

    def __getitem__(self, index: int | slice) -> Rejected | list[Rejected]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return Rejected(**json.loads(self.blobs[range(len(self))[index]]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Joined(Sequence[T]):
    """Sequences one after the other, without a copy."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise AssertionError(index)

    def __iter__(self) -> Iterator[T]:
        for part in self.parts:
            yield from part


@cache
def _codec() -> tuple[Any, Any]:
    import msgspec

    return msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Record)


def pack(record: Record) -> bytes:
    """``record`` as bytes: msgpack, or for the few rows that msgpack would change (a date, a number of 100 digits) pickle.

    Nothing of this outlives the command, whose processes alone read it.
    """
    if _is_plain_record(record):
        try:
            return _codec()[0].encode(record)  # type: ignore[no-any-return]
        except (OverflowError, UnicodeEncodeError):
            pass
    return _PICKLED + pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(blob: bytes) -> Record:
    """The record that ``pack`` was given."""
    record: Record = pickle.loads(blob[1:]) if blob[:1] == _PICKLED else _codec()[1].decode(blob)
    return record


def _is_plain_record(record: Record) -> bool:
    if record.extra or record.has_media() or record.objects or record.chat_template_kwargs or record.tools:
        values = (record.extra, record.images, record.videos, record.audios, record.objects, record.chat_template_kwargs, record.tools)
        if not all(map(_is_plain, values)):
            return False
    if record.label is not None and not _is_plain(record.label):
        return False
    for conversation in (record.messages, record.rejected or (), *record.positives, *record.negatives):
        if not all(map(_is_plain_message, conversation)):
            return False
    return type(record) is Record


def _is_plain_message(message: Message) -> bool:
    if type(message.content) is not str and not (type(message.content) is list and _is_plain(message.content)):
        return False
    if message.tool_calls is not None and not _is_plain(message.tool_calls):
        return False
    return all(type(value) in (str, type(None)) for value in (message.tool_call_id, message.name))


def _is_plain(value: Any) -> bool:
    """Whether msgpack gives back exactly this value."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if kind is list:
        return all(map(_is_plain, value))
    return kind in _PLAIN


def rejected_line(item: Rejected) -> bytes:
    """One line of JSON in ASCII, which can hold any text, half a surrogate pair included."""
    value = {"source": item.source, "reason": item.reason, "row": item.row}
    return json.dumps(value, default=str).encode()
