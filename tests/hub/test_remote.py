"""Downloads through the real clients from a hub on the loopback interface."""

import hashlib
import json
import socket
import struct
import time
from pathlib import Path

import pytest

from swift import hub
from swift.errors import HubError, MachineError
from swift.hub import cache
from tests.hub.conftest import point_at
from tests.hub.loopback import Loopback, commit_of


def safetensors(num_floats: int = 4) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [num_floats], "data_offsets": [0, 4 * num_floats]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * num_floats)


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(50_000),
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    ".gitattributes": b"",
}
BRANCH = {"hf": "main", "ms": "master"}
KINDS = pytest.mark.parametrize("kind", ["hf", "ms"])


def put(loopback: Loopback, kind: str, files: dict[str, bytes] = FILES, revision: str | None = None) -> None:
    loopback.add("Qwen/Qwen-7B", files, revision=revision or BRANCH[kind])


@KINDS
def test_a_model_is_fetched_without_pickles_and_without_code(loopback: Loopback, kind: str):
    put(loopback, kind)
    snapshot = hub.resolve(f"{kind}::Qwen/Qwen-7B")
    expected = {"config.json", "model.safetensors", "tokenizer.json"}
    assert set(snapshot.files) == expected
    assert {path.name for path in snapshot.path.iterdir()} == expected | {cache.MANIFEST}
    assert (snapshot.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert snapshot.sha256["model.safetensors"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert snapshot.reference == f"{kind}::Qwen/Qwen-7B"


@KINDS
def test_the_second_resolve_ignores_case_and_asks_nobody(loopback: Loopback, kind: str):
    put(loopback, kind)
    first = hub.resolve(f"{kind}::Qwen/Qwen-7B")
    loopback.requests.clear()
    assert hub.resolve(f"{kind}::qwen/qwen-7b") == first
    assert hub.resolve(f"{kind}::QWEN/qwen-7B", offline=True) == first
    assert loopback.requests == []


@KINDS
def test_a_model_that_does_not_exist_gives_one_line_and_a_hint(loopback: Loopback, kind: str):
    with pytest.raises(HubError, match="does not exist") as caught:
        hub.resolve(f"{kind}::nobody/nothing")
    assert "\n" not in caught.value.message
    assert "spelling" in (caught.value.hint or "")


@KINDS
def test_a_revision_that_does_not_exist_is_named(loopback: Loopback, kind: str):
    put(loopback, kind)
    with pytest.raises(HubError, match="v9"):
        hub.resolve(f"{kind}::Qwen/Qwen-7B@v9")


@KINDS
def test_a_revision_gives_its_own_files(loopback: Loopback, kind: str):
    put(loopback, kind)
    put(loopback, kind, {**FILES, "config.json": b'{"model_type": "qwen"}'}, revision="v2")
    main, tag = hub.resolve(f"{kind}::Qwen/Qwen-7B"), hub.resolve(f"{kind}::Qwen/Qwen-7B@v2")
    assert json.loads((main.path / "config.json").read_text())["model_type"] == "llama"
    assert json.loads((tag.path / "config.json").read_text())["model_type"] == "qwen"
    assert hub.resolve(f"{kind}::Qwen/Qwen-7B", "v2", offline=True) == tag


def test_a_branch_of_hugging_face_is_pinned_to_its_commit(loopback: Loopback):
    put(loopback, "hf")
    snapshot = hub.resolve("hf::Qwen/Qwen-7B")
    assert snapshot.revision == commit_of(FILES)
    assert hub.resolve(f"hf::Qwen/Qwen-7B@{snapshot.revision}", offline=True) == snapshot


@KINDS
def test_a_branch_that_moved_on_is_seen_only_by_refresh(loopback: Loopback, kind: str):
    put(loopback, kind)
    reference = f"{kind}::Qwen/Qwen-7B"
    hub.resolve(reference)
    put(loopback, kind, {**FILES, "config.json": b'{"model_type": "qwen"}'})
    assert "llama" in (hub.resolve(reference).path / "config.json").read_text()
    assert "qwen" in (hub.resolve(reference, refresh=True).path / "config.json").read_text()
    assert "qwen" in (hub.resolve(reference, offline=True).path / "config.json").read_text()


@KINDS
def test_refresh_of_an_unchanged_model_fetches_no_file(loopback: Loopback, kind: str):
    put(loopback, kind)
    first = hub.resolve(f"{kind}::Qwen/Qwen-7B")
    loopback.requests.clear()
    assert hub.resolve(f"{kind}::qwen/qwen-7b", refresh=True) == first
    assert loopback.downloads() == []


@KINDS
def test_offline_without_a_cache_says_how_to_fetch_it(loopback: Loopback, kind: str):
    with pytest.raises(HubError, match="not in the cache") as caught:
        hub.resolve(f"{kind}::Qwen/Qwen-7B", offline=True)
    assert f"swift models pull {kind}::Qwen/Qwen-7B" in (caught.value.hint or "")
    assert loopback.requests == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [("hf", "model.safetensors"), ("hf", "config.json"), pytest.param("ms", "model.safetensors", marks=pytest.mark.slow)],
)
def test_one_wrong_byte_is_detected_and_the_file_removed(loopback: Loopback, kind: str, path: str, own_cache: Path):
    put(loopback, kind)
    loopback.corrupt.add(path)
    with pytest.raises(HubError, match="damaged"):
        hub.resolve(f"{kind}::Qwen/Qwen-7B")
    assert list(own_cache.rglob(path)) == []
    assert cache.list_snapshots() == []
    loopback.corrupt.clear()
    assert path in hub.resolve(f"{kind}::Qwen/Qwen-7B").files


@KINDS
def test_a_cut_connection_is_resumed(loopback: Loopback, kind: str):
    put(loopback, kind)
    loopback.cut["model.safetensors"] = 70_000
    snapshot = hub.resolve(f"{kind}::Qwen/Qwen-7B")
    assert (snapshot.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert len([line for line in loopback.downloads() if "model.safetensors" in line]) >= 2


def test_an_attempt_that_was_killed_leaves_no_orphan_and_its_whole_files_are_not_fetched_again(loopback: Loopback, own_cache: Path):
    put(loopback, "hf")
    partial = own_cache / "models" / "hf" / "Qwen" / "Qwen-7B" / f".partial-{commit_of(FILES)}"
    (partial / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (partial / ".cache" / "huggingface" / "download" / "abc.incomplete").write_bytes(b"half")
    (partial / "model.safetensors").write_bytes(FILES["model.safetensors"])
    (partial / "of-another-commit.json").write_bytes(b"{}")
    snapshot = hub.resolve("hf::Qwen/Qwen-7B")
    assert [line for line in loopback.downloads() if "model.safetensors" in line] == []
    assert list(own_cache.rglob("*.incomplete")) == []
    assert set(snapshot.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert not any(path.name.startswith(".") for path in snapshot.path.parent.rglob("*"))


@KINDS
def test_an_endpoint_that_is_down_fails_within_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_at(f"http://127.0.0.1:{port}", monkeypatch, tmp_path)
    begin = time.monotonic()
    with pytest.raises(HubError, match="cannot reach") as caught:
        hub.resolve(f"{kind}::Qwen/Qwen-7B")
    assert time.monotonic() - begin < 5
    assert all(word in (caught.value.hint or "") for word in ("pkg::", "folder", "--offline"))


@KINDS
def test_weights_that_are_only_pickles_are_refused(loopback: Loopback, kind: str):
    put(loopback, kind, {name: data for name, data in FILES.items() if name != "model.safetensors"})
    with pytest.raises(HubError, match=r"pytorch_model\.bin"):
        hub.resolve(f"{kind}::Qwen/Qwen-7B")
    assert loopback.downloads() == []


@KINDS
def test_a_data_set_has_a_namespace_of_its_own(loopback: Loopback, kind: str):
    loopback.add("org/rows", {"data/train.jsonl": b'{"a": 1}\n', "rows.py": b""}, revision=BRANCH[kind], repo_type="dataset")
    snapshot = hub.resolve(f"{kind}::org/rows", repo_type="dataset")
    assert set(snapshot.files) == {"data/train.jsonl"}
    assert (snapshot.path / "data" / "train.jsonl").read_text() == '{"a": 1}\n'
    with pytest.raises(HubError, match="does not exist"):
        hub.resolve(f"{kind}::org/rows")


@KINDS
def test_a_bare_id_goes_where_use_hf_says(loopback: Loopback, kind: str):
    put(loopback, kind)
    assert hub.resolve("Qwen/Qwen-7B", use_hf=kind == "hf").reference == f"{kind}::Qwen/Qwen-7B"


@KINDS
def test_a_cache_that_cannot_be_written_is_an_error_of_the_machine(loopback: Loopback, kind: str, own_cache: Path):
    put(loopback, kind)
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(MachineError):
        hub.resolve(f"{kind}::Qwen/Qwen-7B")


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's own, huggingface_hub 2.4
def test_what_is_pushed_can_be_fetched_again(loopback: Loopback, tmp_path: Path):
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "config.json").write_bytes(FILES["config.json"])
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])
    address = hub.push(folder, "hf::me/tuned", token="hf_test", commit_message="First")
    assert address.startswith(f"{loopback.url}/me/tuned/commit/")
    snapshot = hub.resolve("hf::me/tuned")
    assert (snapshot.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
