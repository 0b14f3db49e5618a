import json

import pytest

from swift import audit
from swift.errors import CheckpointError


def test_an_untouched_record_verifies(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit.append(path, "start", {"model": "a"})
    audit.append(path, "end", {"steps": 3})
    assert audit.verify(path) == 2


def test_the_first_line_starts_from_zeros_and_the_second_from_its_hash(tmp_path):
    path = tmp_path / "audit.jsonl"
    first = audit.append(path, "start", {})
    audit.append(path, "end", {})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["previous"] == "0" * 64
    assert lines[1]["previous"] == first


@pytest.mark.parametrize("damage", ["change", "drop", "swap"])
def test_a_changed_record_is_found(tmp_path, damage):
    path = tmp_path / "audit.jsonl"
    for step in range(3):
        audit.append(path, "step", {"step": step})
    lines = path.read_text().splitlines(keepends=True)
    lines = {
        "change": [lines[0], lines[1].replace('"step": 1', '"step": 7'), lines[2]],
        "drop": [lines[0], lines[2]],
        "swap": [lines[0], lines[2], lines[1]],
    }[damage]
    path.write_text("".join(lines))
    with pytest.raises(CheckpointError, match="jsonl:2"):
        audit.verify(path)


def test_a_torn_last_line_is_cut_before_the_next_event(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit.append(path, "start", {})
    with path.open("a") as file:
        file.write('{"event": "chec')
    audit.append(path, "resume", {})
    assert audit.verify(path) == 2


def test_the_digest_is_sha256_of_canonical_json():
    # printf '{"a":1,"b":"x"}' | sha256sum
    assert audit.digest({"b": "x", "a": 1, "hash": "ignored"}) == "ecf9e98ec0641e23113ff3ce8bdc78d0ddd249886517fd4a7f68cc83d4e65667"
