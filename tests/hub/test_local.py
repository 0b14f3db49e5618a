import json
import struct
from pathlib import Path

import pytest

from swift import hub
from swift.errors import HubError, MachineError, ModelError
from swift.hub.safetensors_header import num_bytes, read_header


def write_safetensors(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_header_gives_types_and_shapes(tmp_path: Path):
    header = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32), "__metadata__": {"format": "pt"}}
    path = write_safetensors(tmp_path / "w.safetensors", header, bytes(32))
    assert read_header(path) == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}


def test_the_header_equals_what_the_safetensors_library_reads(tiny_model: Path):
    from safetensors import safe_open

    path = tiny_model / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        expected = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    assert read_header(path) == expected


def test_bytes_of_a_tensor():
    assert [num_bytes("F32", (2, 3)), num_bytes("BF16", ()), num_bytes("F4", (4,)), num_bytes("U8", (0, 7))] == [24, 2, 2, 0]


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry("F32", [2], 0, 8)}, bytes(7), "truncated"),
        ({"a": entry("F32", [2], 0, 8)}, bytes(9), "longer"),
        ({"a": entry("F32", [3], 0, 8)}, bytes(8), "needs 12"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12), "begins at byte 8"),
        ({"a": entry("F99", [1], 0, 4)}, bytes(4), "no sense"),
        ({"a": entry("F32", [-1], 0, 4)}, bytes(4), "no sense"),
        ({"a": {"dtype": "F32"}}, b"", "no sense"),
        ([1], b"", "not a JSON object"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path: Path, header: object, data: bytes, reason: str):
    path = write_safetensors(tmp_path / "w.safetensors", header, data)
    with pytest.raises(ModelError, match=reason) as caught:
        read_header(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("data", [b"", b"abc", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{x"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_header(path)


def test_a_folder_is_used_where_it_lies(tiny_model: Path, own_cache: Path):
    snapshot = hub.resolve(str(tiny_model))
    assert (snapshot.path, snapshot.revision, snapshot.sha256) == (tiny_model.resolve(), "local", {})
    assert snapshot.files["config.json"] == (tiny_model / "config.json").stat().st_size
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "only safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .*safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "model.safetensors is not a whole"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "names model-2.safetensors, which is not there",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, tiny_model: Path, change, reason: str):
    import shutil

    folder = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    change(folder)
    with pytest.raises(ModelError, match=reason):
        hub.resolve(str(folder))


def test_a_misspelled_path_suggests_a_near_one(tmp_path: Path):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(HubError, match="does not exist") as caught:
        hub.resolve(str(tmp_path / "my-modle"))
    assert "my-model" in (caught.value.hint or "")


def test_a_path_below_a_file_is_an_error_with_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((HubError, MachineError)):
        hub.resolve(str(tmp_path / "file" / "below"))


def test_a_folder_that_cannot_be_listed_is_an_error_of_the_machine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Permissions do not bind root, so the system call itself is made to refuse."""

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(MachineError, match="Permission denied"):
        hub.resolve(str(tiny_model))
