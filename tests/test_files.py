import errno
import os
import tempfile
from pathlib import Path

import pytest

from swift.errors import MachineError
from swift.files import explain_os_errors, new_file, new_folder, visible_files


def test_a_file_appears_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "a.txt"
    with new_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), new_file(path) as temporary:
        temporary.write_text("new")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "checkpoint-1") as folder:
        (folder / "weights").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tmp_path):
    def fill():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MachineError, match="No space left on device"), new_file(tmp_path / "a"):
        fill()


def test_a_full_device_is_reported_by_the_real_system():
    full = Path("/dev/full")
    with pytest.raises(MachineError, match="No space left on device"), explain_os_errors(full):
        full.write_text("x")


def test_files_in_hidden_places_are_left_out(tmp_path):
    for name in ("b.txt", "a/c.txt", ".git/d.txt", "a/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in visible_files(tmp_path)] == ["a/c.txt", "b.txt"]


def test_a_folder_that_may_not_be_read_is_never_taken_for_an_empty_one():
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # not below tmp_path, which only its owner may enter
        root = Path(name)
        root.chmod(0o755)
        locked = root / "locked"
        locked.mkdir()
        (locked / "rows.jsonl").write_text("")
        locked.chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            with pytest.raises(MachineError, match="locked: Permission denied"):
                visible_files(root)
        finally:
            if is_root:
                os.seteuid(0)
            locked.chmod(0o755)
