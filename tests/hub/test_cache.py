import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swift.errors import HubError, MachineError
from swift.hub import cache
from tests.hub.loopback import Loopback
from tests.hub.test_remote import put

NAME = "Org/Name"


def fill(folder: Path) -> dict[str, Any]:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "a.txt").write_bytes(b"abc")
    return {"licence": "mit"}


@contextlib.contextmanager
def few_bytes() -> Iterator[None]:
    """Within, files can grow to 1000 bytes only: the system call fails as it does on a full disk.

    Not for a whole test, which ends with a line of pytest's in what may be a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_snapshot_is_found_by_revision_and_by_branch_in_any_case():
    made = cache.add("model", "hf", NAME, "abc", fill, refs=("main",))
    assert made.files == {"config.json": 2, "sub/a.txt": 3}
    # sha256 of "abc": FIPS 180-2, appendix B.1
    assert made.sha256["sub/a.txt"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert made == cache.find("model", "hf", "org/NAME", "abc") == cache.find("model", "hf", NAME, "main")
    assert cache.find("model", "hf", NAME, "other") is None
    assert cache.find("model", "ms", NAME, "main") is None


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "file gone", "file cut"])
def test_a_damaged_folder_is_no_snapshot(damage: str):
    made = cache.add("model", "hf", NAME, "abc", fill)
    if damage == "no manifest":
        (made.path / cache.MANIFEST).unlink()
    elif damage == "half a manifest":
        (made.path / cache.MANIFEST).write_text('{"reference": "hf')
    elif damage == "file gone":
        (made.path / "sub" / "a.txt").unlink()
    else:
        (made.path / "sub" / "a.txt").write_bytes(b"ab")
    assert cache.find("model", "hf", NAME, "abc") is None
    assert cache.list_snapshots() == []
    assert cache.add("model", "hf", NAME, "abc", fill) == cache.find("model", "hf", NAME, "abc")


def test_verify_names_the_file_that_changed():
    made = cache.add("model", "hf", NAME, "abc", fill)
    cache.verify(made)
    (made.path / "sub" / "a.txt").write_bytes(b"abd")
    with pytest.raises(HubError, match=r"a\.txt has changed"):
        cache.verify(made)


def test_a_failed_write_is_an_error_of_the_machine_and_leaves_nothing(own_cache: Path):
    def too_much(folder: Path) -> dict[str, Any]:
        (folder / "config.json").write_bytes(b"{}")
        (folder / "model.safetensors").write_bytes(bytes(5000))
        return {}

    with few_bytes(), pytest.raises(MachineError):
        cache.add("model", "hf", NAME, "abc", too_much)
    assert list(own_cache.rglob("*")) == []


def test_a_full_disk_while_fetching_leaves_nothing_half_written(loopback: Loopback, own_cache: Path):
    from swift import hub

    put(loopback, "hf")
    with few_bytes(), pytest.raises(MachineError):
        hub.resolve("hf::Qwen/Qwen-7B")
    assert [path for path in own_cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_an_old_revision_stays_until_the_new_one_stands():
    cache.add("model", "ms", NAME, "master", fill)

    def breaks(folder: Path) -> dict[str, Any]:
        raise HubError("cut")

    with pytest.raises(HubError, match="cut"):
        cache.add("model", "ms", NAME, "master", breaks)
    assert cache.find("model", "ms", NAME, "master") is not None


def test_only_an_attempt_that_can_be_resumed_leaves_files(own_cache: Path):
    def breaks(folder: Path) -> dict[str, Any]:
        fill(folder)
        raise KeyboardInterrupt

    for can_resume, left in ((True, 2), (False, 0)):
        with pytest.raises(KeyboardInterrupt):
            cache.add("model", "ms", NAME, "master", breaks, can_resume=can_resume)
        assert len([path for path in own_cache.rglob("*") if path.is_file()]) == left
        assert cache.find("model", "ms", NAME, "master") is None


def test_removing_one_revision_keeps_the_other():
    cache.add("model", "hf", NAME, "one", fill, refs=("v1",))
    cache.add("model", "hf", NAME, "two", fill, refs=("main",))
    assert cache.remove("model", "hf", "org/name", "v1") > 5
    assert [snapshot.revision for snapshot in cache.list_snapshots()] == ["two"]
    assert cache.find("model", "hf", NAME, "v1") is None


def test_removing_all_leaves_no_folder(own_cache: Path):
    cache.add("model", "hf", NAME, "one", fill)
    cache.remove("model", "hf", NAME)
    assert not (own_cache / "models" / "hf").exists()
    with pytest.raises(HubError, match="not in the cache"):
        cache.remove("model", "hf", NAME)


def test_a_revision_with_a_slash_is_one_folder():
    made = cache.add("model", "hf", NAME, "refs/pr/1", fill)
    assert made.path.name == "refs--pr--1"
    assert cache.find("model", "hf", NAME, "refs/pr/1") == made


def test_two_processes_fetch_a_model_once(loopback: Loopback):
    put(loopback, "ms")
    command = [sys.executable, "-c", "from swift import hub; print(hub.resolve('ms::qwen/qwen-7b').path)"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].splitlines()[-1] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert len(loopback.downloads()) == 3
