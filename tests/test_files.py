import errno
import os
from pathlib import Path

import pytest

from swift.errors import MachineError
from swift.files import explain_os_errors, new_file, new_folder


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
