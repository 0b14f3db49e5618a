import json
import random
import tracemalloc

import pytest

from swift.data import files, read, spool
from swift.data.formats import FORMATS
from swift.data.load import load_records
from swift.data.pool import in_order, workers
from swift.errors import DataError, MachineError
from tests.data.conftest import chat


def mixed_rows(count):
    """Rows of which every tenth is bad, some lines empty and some text not ASCII, with equal rows among them."""
    made = []
    for index in range(count):
        row = chat(f"q{index % 97} \u96ea" * (index % 5 + 1), "a") if index % 10 else chat("no answer")
        made.append(json.dumps(row, ensure_ascii=False) + "\n" * (1 + (index % 7 == 0)))
    return "".join(made)


@pytest.mark.parametrize("size", [1, 50, 333, 5000, 10**9])
def test_a_file_is_cut_at_lines_that_keep_their_numbers(write, size):
    from pathlib import Path

    path = Path(write("\ufeff" + mixed_rows(60) + '{"last": "no newline"}'))
    parts = [list(files.read_from(path, place, stop)) for place, stop in files.cut(path, size)]
    assert [row for part in parts for row in part] == list(files.read_from(path, files.START))
    assert (len(parts) == 1) == (size == 10**9)


def test_files_that_are_read_as_a_whole_are_not_cut(write):
    from pathlib import Path

    assert files.cut(Path(write([chat("q", "a")] * 50, "a.json")), 10) == [(files.START, None)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.csv"])
def test_reading_goes_on_after_any_row(write, name):
    from pathlib import Path

    text = mixed_rows(20) if name != "a.csv" else "a,b\n" + '"x\ny",2\n' * 20
    path = Path(write(f"[{','.join(filter(None, text.splitlines()))}]" if name == "a.json" else text, name))
    whole = list(files.read_from(path, files.START))
    assert len(whole) == 20
    for at, (place, _, _) in enumerate(whole, 1):
        assert list(files.read_from(path, place)) == whole[at:]


@pytest.fixture
def small_ranges(monkeypatch):
    monkeypatch.setattr(read, "_SMALL_BYTES", 0)
    monkeypatch.setattr(read, "_RANGE_BYTES", 2000)
    monkeypatch.setattr(read, "_BATCH_ROWS", 7)


@pytest.mark.multi
def test_any_number_of_processes_reads_the_same(write, small_ranges):
    paths = [
        write(mixed_rows(300), "a.jsonl"),
        write(json.dumps([chat(f"b{index}", "a") for index in range(5)]), "b.json"),
        write(mixed_rows(40), "c.jsonl"),
    ]
    options = dict(split_ratio=0.1, max_rejected=0.5)
    alone, shared = (load_records(paths, num_proc=num_proc, **options) for num_proc in (1, 4))
    assert list(alone.train.packed()) == list(shared.train.packed())
    assert alone.validation == shared.validation and len(shared.validation) > 10
    assert alone.rejected == shared.rejected and len(shared.rejected) == 34


@pytest.mark.multi
def test_an_error_in_a_process_is_that_of_the_file(write, small_ranges):
    path = write(mixed_rows(200) + "not json\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+: not JSON at column 1") as caught:
        load_records([path], num_proc=2, max_rejected=1.0)
    assert caught.value.hint == "a .jsonl file has one JSON object a line"


def test_a_layout_registered_here_is_not_sent_to_processes_that_do_not_know_it(write, monkeypatch):
    reader = read.Reader(read.Rules(), {}, 4)
    monkeypatch.setattr(read, "_SMALL_BYTES", 0)
    monkeypatch.setattr(read, "_RANGE_BYTES", 10)
    from pathlib import Path

    path = Path(write(mixed_rows(20)))
    assert reader._processes([path]) == 4
    monkeypatch.setitem(FORMATS._members, "mine", FORMATS.get("text"))
    assert reader._processes([path]) == 1


def test_small_files_are_read_by_one_process(write):
    from pathlib import Path

    assert read.Reader(read.Rules(), {}, 8)._processes([Path(write(mixed_rows(20)))]) == 1


def _die(*_):
    import os

    os._exit(1)


def _nothing(*_):
    return None


@pytest.mark.multi
def test_a_process_that_ends_is_one_clear_line():
    with pytest.raises(MachineError, match="has ended before its work") as caught, workers(1, _nothing, ("x" * 10**6,)) as pool:
        list(in_order(pool, 1, _die, [1]))
    assert "__main__" in caught.value.hint


def test_memory_does_not_grow_with_the_rows(write, monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 1 << 16)
    monkeypatch.setattr(spool, "_BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(read, "_BATCH_ROWS", 16)
    text = random.Random(0).randbytes(500).hex()
    peaks = []
    for count in (400, 1600):
        path = write("".join(json.dumps(chat(f"{index}{text}", "a")) + "\n" for index in range(count)), f"{count}.jsonl")
        tracemalloc.start()
        loaded = load_records([path])
        assert sum(len(row.messages) for row in loaded.train) == 2 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 1,200 rows of 1 kB more: 1.2 MB if they were kept. What stays is 16 bytes a row, and what doubles while it grows.
    assert peaks[1] - peaks[0] < 150_000
