import datetime
import decimal
import random

import numpy as np
import pytest

from swift.data import spool
from swift.data.records import Message, Record, Rejected
from swift.data.spool import Blobs, Joined, Records, RejectedRows, Spill, pack, rejected_line, unpack

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, True]}}}


def record(number=0, **values):
    return Record([Message("user", f"q{number}"), Message("assistant", "a", loss_scale=0.5)], source=f"f:{number}", **values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"extra": {"id": 7, "nested": {"a": [1, 2.5, None, True, "\u96ea"]}}},
        {"extra": {"big": 10**100, "small": -(2**63) - 1}},
        {"extra": {"half": "\ud83d"}},
        {"extra": {"when": datetime.datetime(2026, 1, 2), "price": decimal.Decimal("1.10"), 5: ("a", {"b"})}},
        {"images": [{"bytes": b"\x00\xff", "path": None}], "label": [1, 0], "margin": 0.5, "channel": "c"},
        {"rejected": [Message("user", "q"), Message("assistant", "b", loss=False)]},
        {"tools": [{"type": "function"}], "positives": [[Message("tool", "r", tool_call_id="1", name="n")]]},
    ],
)
def test_a_record_comes_back_as_it_was(values):
    one = record(**values)
    one.messages.append(Message("assistant", [{"type": "image"}, {"type": "text", "text": "x"}], tool_calls=[CALL]))
    assert unpack(pack(one)) == one
    assert unpack(pack(Record([Message("tool", "r", name=5)]))) == Record([Message("tool", "r", name=5)])


@pytest.fixture(params=["memory", "file"])
def place(request, monkeypatch):
    """Spilling at once, or never."""
    if request.param == "file":
        monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 10)
        monkeypatch.setattr(spool, "_BUFFER_BYTES", 7)
    return request.param


def test_bytes_are_read_back_from_memory_and_from_a_file(place, cache):
    spill, expected = Spill(), b""
    for size in range(1, 40):
        spill.append(bytes([size]) * size)
        expected += bytes([size]) * size
        assert spill.read(0, spill.size) == expected
        assert spill.read(3, spill.size - 1) == expected[3:-1]
    assert spill.array(np.uint8).tobytes() == expected
    assert (spill._file is not None) == (place == "file")
    assert not (cache / "spool").exists() or not list((cache / "spool").iterdir())


def test_a_view_is_read_in_any_order(place):
    blobs = Blobs()
    for number in range(30):
        blobs.append(pack(record(number)))
    order = list(range(30))
    random.Random(0).shuffle(order)
    view = Records(blobs).take(np.array(order))
    assert [one.source for one in view] == [f"f:{number}" for number in order]
    assert (view[4], view[-1], view[2:4]) == (record(order[4]), record(order[-1]), [record(order[2]), record(order[3])])
    assert view == [record(number) for number in order] and view != [record(0)]
    assert [unpack(blob) for blob in view.packed(25, 99)] == view[25:]
    with pytest.raises(IndexError):
        view[30]


def test_blobs_can_be_added_together(place):
    blobs = Blobs()
    blobs.extend(b"abcde", [2, 0, 3])
    blobs.append(b"f")
    assert list(blobs) == [b"ab", b"", b"cde", b"f"]


def test_rejected_rows_and_sequences_one_after_the_other(place):
    blobs = Blobs()
    for number in range(5):
        blobs.append(rejected_line(Rejected(f"f:{number}", {"text": "half \ud83d", "n": 10**50}, "bad")))
    rows = RejectedRows(blobs)
    joined = Joined(rows, [], rows[:1])
    assert (len(joined), joined[5], joined[-2]) == (6, rows[0], rows[4])
    assert [item.source for item in joined] == ["f:0", "f:1", "f:2", "f:3", "f:4", "f:0"]
    assert joined[1:3] == rows[1:3]
    assert rows[0].row == {"text": "half \ud83d", "n": 10**50}
    with pytest.raises(IndexError):
        joined[6]
