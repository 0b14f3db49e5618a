"""Adapters that are served beside the model, come and go, and are there again after the engine was lost."""

import os
import signal

import pytest
import torch

from tests.serve.conftest import Server


def make_adapter(model, path, seed=1, scale=1.0):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shelf(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    for number, name in enumerate("abc"):
        make_adapter(tiny_model, root / name, seed=number)
    return root


@pytest.fixture(scope="module")
def server(tiny_model, shelf, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    server = Server(
        tiny_model, log, "--served_model_name", "tiny", "also", "--adapters", f"first={shelf / 'a'}", "--adapter_root", str(shelf)
    )
    server.wait()
    yield server
    server.end()


def say(server, model):
    status, body = server.post("/v1/completions", {"model": model, "prompt": "the snow", "max_tokens": 12, "temperature": 0})
    return body["choices"][0]["text"] if status == 200 else status


def names(server):
    return [model["id"] for model in server.get("/v1/models")[1]["data"]]


def test_a_name_of_the_model_is_the_model_and_an_adapter_is_not(server):
    assert say(server, "tiny") == say(server, "also") != say(server, "first")
    assert names(server) == ["tiny", "also", "first"]
    assert server.get("/v1/models/first")[1]["parent"] == "tiny"
    assert server.get("/v1/models/also")[1]["parent"] is None


def test_adapters_come_and_go(server):
    assert say(server, "second") == 404
    assert server.post("/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "b"})[0] == 200
    second = say(server, "second")
    assert len({second, say(server, "tiny"), say(server, "first")}) == 3
    assert names(server) == ["tiny", "also", "first", "second"]
    assert server.post("/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "c"})[0] == 400
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "second"})[1]["deleted"] is True
    assert say(server, "second") == 404
    assert server.post("/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "c"})[0] == 200
    assert say(server, "second") != second
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "second"})[0] == 200


@pytest.mark.parametrize("path", ["../shelf", "/etc", "nothing", ".", "a/../../x"])
def test_only_adapters_below_the_folder_are_loaded(server, path):
    status, body = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
    assert status == 400
    assert body["error"]["param"] == "lora_path"


@pytest.mark.parametrize("name", ["tiny", "first"])
def test_a_name_that_is_taken_is_refused(server, name):
    assert server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "b"})[1]["error"]["param"] == "lora_name"


def test_what_is_not_there_is_not_taken_away(server):
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "tiny"})[0] == 404
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "nobody"})[0] == 404


def test_an_engine_that_is_started_again_has_its_adapters(server):
    assert server.post("/v1/load_lora_adapter", {"lora_name": "third", "lora_path": "c"})[0] == 200
    before = [say(server, name) for name in ("first", "third", "tiny")]
    os.kill(server.engine, signal.SIGKILL)
    server.until(lambda: server.get("/health")[1]["restarts"] == 1)
    server.wait()
    assert [say(server, name) for name in ("first", "third", "tiny")] == before
    server.post("/v1/unload_lora_adapter", {"lora_name": "third"})


def test_without_the_option_nothing_is_loaded(tiny_model, shelf, tmp_path):
    server = Server(tiny_model, tmp_path / "log", "--served_model_name", "tiny", "--adapters", f"x={shelf / 'a'}")
    try:
        server.wait()
        assert server.post("/v1/load_lora_adapter", {"lora_name": "y", "lora_path": str(shelf / "b")})[0] == 403
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "x"})[0] == 403
        assert say(server, "x") != say(server, "tiny")
    finally:
        server.end()
