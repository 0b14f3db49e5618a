"""OpenAI's form of log-probabilities, and what `swift infer` writes of them."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import swift
from swift import cli
from swift.config.commands import ChatConfig, DeployConfig, InferConfig
from swift.config.options import build as build_config
from swift.engine.base import Logprob
from swift.engine.logprobs import content_of, speller
from swift.errors import ConfigError
from tests.tiny import make_tokenizer


def test_each_token_has_its_text_its_bytes_and_the_likeliest_beside_it():
    tokenizer = make_tokenizer()
    a, b = tokenizer("ab", add_special_tokens=False).input_ids
    assert content_of([Logprob(a, -0.5, ((a, -0.5), (b, -float("inf"))))], speller(tokenizer)) == [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "b", "logprob": -9999.0, "bytes": [98]},
            ],
        }
    ]


def test_the_bytes_of_half_a_character_are_its_own():
    """OpenAI's reason for the field: the bytes of all tokens together are those of the text."""
    tokenizer = make_tokenizer()
    text = "雪 à la carte\n\x07"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    content = content_of([Logprob(token, -1.0) for token in ids], speller(tokenizer))
    assert bytes(byte for entry in content for byte in entry["bytes"]) == text.encode()
    assert [entry["bytes"] for entry in content[:3]] == [[0xE9], [0x9B], [0xAA]]


def test_bytes_that_a_vocabulary_names_are_read_off_their_names():
    core = Tokenizer(models.BPE({"<0xE9>": 0, "<0x9B>": 1, "a": 2}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    spell = speller(PreTrainedTokenizerFast(tokenizer_object=core))
    assert [spell(token)[1] for token in range(3)] == [b"\xe9", b"\x9b", b"a"]


def infer(folder, rows, place, *options):
    words = ["infer", "--model", str(folder), "--val_dataset", f"{rows}#3", "--result_path", str(place), "--temperature", "0"]
    cli.run([*words, "--max_new_tokens", "4", *options])
    return [json.loads(line) for line in place.read_text().splitlines()]


@pytest.mark.parametrize("streams", ["false", "true"])
def test_infer_writes_the_log_probabilities_of_the_model(tiny_model, rows, tmp_path, streams):
    lines = infer(tiny_model, rows, tmp_path / "a.jsonl", "--logprobs", "true", "--top_logprobs", "2", "--stream", streams)
    model, tokenizer = (kind.from_pretrained(tiny_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for line in lines:
        prompt = tokenizer.apply_chat_template(line["messages"][:-1], add_generation_prompt=True, return_dict=False)
        ids = list(prompt)
        for entry in line["logprobs"]["content"]:
            with torch.no_grad():
                wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            values, tokens = wanted.topk(2)
            assert entry["logprob"] == pytest.approx(float(values[0]), abs=1e-4)
            assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-4)
            assert [top["token"] for top in entry["top_logprobs"]] == [tokenizer.decode([token]) for token in tokens.tolist()]
            ids.append(int(tokens[0]))
        assert len(ids) > len(prompt)


def test_an_end_token_has_its_log_probability_too(tiny_model, rows, tmp_path):
    """The same places as at /v1/chat/completions: their sum is the log-probability of the whole answer, that it ends there included."""
    (whole, *_) = infer(tiny_model, rows, tmp_path / "whole.jsonl", "--logprobs", "true")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (end,) = make_tokenizer()(whole["logprobs"]["content"][0]["token"]).input_ids
    GenerationConfig(eos_token_id=end).save_pretrained(folder)
    (short, *_) = infer(folder, rows, tmp_path / "short.jsonl", "--logprobs", "true")
    assert (short["finish_reason"], short["response"]) == ("stop", "")
    assert short["logprobs"]["content"] == whole["logprobs"]["content"][:1]
    assert short["logprobs"]["content"][0]["top_logprobs"] == []


def test_without_the_option_a_line_has_none(tiny_model, rows, tmp_path):
    assert [line["logprobs"] for line in infer(tiny_model, rows, tmp_path / "a.jsonl")] == [None, None, None]


def test_a_stopped_infer_goes_on_with_log_probabilities(tiny_model, rows, tmp_path):
    place = tmp_path / "a.jsonl"
    options = ("--logprobs", "true", "--top_logprobs", "1")
    whole = infer(tiny_model, rows, place, *options)
    lines = place.read_text().splitlines(keepends=True)
    place.write_text(lines[0] + lines[1][:50])
    resumed = infer(tiny_model, rows, place, *options)
    assert resumed[0] == whole[0]
    for line, wanted in zip(resumed, whole, strict=True):
        assert line["response"] == wanted["response"]
        # float32: rows of another batch are added in another order
        values = [[entry["logprob"] for entry in each["logprobs"]["content"]] for each in (line, wanted)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.parametrize("begun", [(), ("--logprobs", "true")])
def test_a_file_is_not_gone_on_with_half_with_and_half_without_them(tiny_model, rows, tmp_path, begun):
    place = tmp_path / "a.jsonl"
    infer(tiny_model, rows, place, *begun)
    before = place.read_text()
    with pytest.raises(ConfigError, match=r"was begun with(out)? --logprobs"):
        infer(tiny_model, rows, place, *(() if begun else ("--logprobs", "true")))
    assert place.read_text() == before


def config(kind=InferConfig, **options):
    given = {"model": "m", **({"val_dataset": "v.jsonl"} if kind is InferConfig else {}), **options}
    return build_config(kind, ("argument", given))


def test_top_logprobs_needs_logprobs():
    with pytest.raises(ConfigError, match="--top_logprobs 2 needs --logprobs true"):
        config(top_logprobs=2)
    assert config(top_logprobs=2, logprobs=True).top_logprobs == 2


@pytest.mark.parametrize("backend", ["transformers", "openvino", "remote", "sglang", "lmdeploy"])
def test_an_engine_that_gives_none_is_named(backend):
    options = {"remote_url": "http://127.0.0.1:1/v1"} if backend == "remote" else {}
    with pytest.raises(ConfigError, match=f"--logprobs has no effect with --infer_backend {backend}"):
        config(logprobs=True, infer_backend=backend, **options)


@pytest.mark.parametrize("backend", ["native", "llamacpp", "vllm"])
def test_the_others_take_it(backend):
    assert config(logprobs=True, infer_backend=backend).logprobs


def test_beams_have_no_log_probabilities():
    with pytest.raises(ConfigError, match="--logprobs true needs --num_beams 1"):
        config(logprobs=True, num_beams=2)


@pytest.mark.parametrize("kind", [DeployConfig, ChatConfig])
def test_they_are_for_answers_to_a_data_set(kind):
    with pytest.raises(ConfigError, match="--logprobs has no effect"):
        config(kind, logprobs=True)
    with pytest.raises(ConfigError, match="--logprobs has no effect"):
        swift.infer("a question", model="m", logprobs=True)


def test_most_likeliest_tokens():
    with pytest.raises(ConfigError, match="top_logprobs"):
        config(logprobs=True, top_logprobs=21)
