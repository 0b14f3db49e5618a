"""infer, chat, merge-lora and the Python front end on a run of the tiny model."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import swift
from swift import cli
from swift.errors import CheckpointError, ConfigError, DependencyError
from tests.tiny import make_model


@pytest.fixture
def trained(run):
    return run("trained", max_steps=12, split_dataset_ratio=0.2, tuner_type="lora")


def test_infer_needs_nothing_but_the_run(trained, rows, tmp_path):
    place = tmp_path / "answers.jsonl"
    cli.run(
        [
            "infer",
            "--adapters",
            str(trained.run),
            "--val_dataset",
            f"{rows}#3",
            "--result_path",
            str(place),
            "--temperature",
            "0",
            "--max_new_tokens",
            "5",
            "--max_batch_size",
            "2",
        ]
    )
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    assert len(lines) == 3
    assert {"response", "labels", "logprobs", "messages"} <= lines[0].keys()
    assert lines[0]["labels"].startswith("snow")
    assert lines[0]["messages"][-1] == {"role": "assistant", "content": lines[0]["response"]}


def test_infer_answers_the_rows_that_the_run_held_out(trained, tmp_path):
    place = tmp_path / "answers.jsonl"
    cli.run(
        ["infer", "--adapters", str(trained.checkpoint), "--load_data_args", "true", "--result_path", str(place), "--max_new_tokens", "2"]
    )
    assert len(place.read_text().splitlines()) == 8  # a fifth of 40 rows


def test_an_answer_file_is_never_overwritten(trained, rows, tmp_path):
    place = tmp_path / "answers.jsonl"
    place.write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        cli.run(["infer", "--adapters", str(trained.run), "--val_dataset", str(rows), "--result_path", str(place)])
    assert place.read_text() == "mine"


def test_a_stopped_infer_goes_on_where_it_stopped(trained, rows, tmp_path):
    place = tmp_path / "answers.jsonl"
    words = ["infer", "--adapters", str(trained.run), "--val_dataset", f"{rows}#6", "--result_path", str(place)]
    words += ["--temperature", "1", "--max_new_tokens", "5"]
    cli.run(words)
    whole = place.read_text()
    lines = whole.splitlines(keepends=True)
    place.write_text("".join(lines[:2]) + lines[2][:20])  # a line that was being written
    cli.run(words)
    assert place.read_text() == whole
    cli.run(words)
    assert place.read_text() == whole


def test_both_engines_answer_alike(trained, rows, tmp_path):
    texts = []
    for engine in ("native", "transformers"):
        place = tmp_path / f"{engine}.jsonl"
        words = ["infer", "--adapters", str(trained.run), "--val_dataset", f"{rows}#6", "--result_path", str(place), "--temperature", "0"]
        cli.run([*words, "--max_new_tokens", "8", "--infer_backend", engine, "--max_batch_size", "4"])
        texts.append([json.loads(line)["response"] for line in place.read_text().splitlines()])
    assert texts[0] == texts[1]


def test_chat_answers_questions_and_obeys_commands(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\nquestion 1\n/clear\n/multi\na\nb\n.\n/nonsense\n/exit\n"))
    cli.run(["chat", "--adapters", str(trained.run), "--max_new_tokens", "4", "--temperature", "0"])
    printed = capsys.readouterr().out
    assert "/clear starts anew" in printed
    assert "a new conversation" in printed
    assert "unknown command /nonsense" in printed


def test_the_merged_model_is_the_adapter_in_plain_transformers(trained):
    from peft import PeftModel

    merged = swift.merge_lora(adapters=str(trained.run))
    assert merged.name == f"{trained.checkpoint.name}-merged"
    base = json.loads((trained.checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained.checkpoint).eval()
    ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        # float32: a merged weight rounds once where the adapter rounds in two products
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="exists"):
        swift.merge_lora(adapters=str(trained.run))


def test_a_damaged_adapter_is_not_merged(trained):
    file = trained.checkpoint / "adapter_model.safetensors"
    state = load_file(file)
    next(iter(state.values())).fill_(float("nan"))
    save_file(state, file)
    with pytest.raises(CheckpointError):
        swift.merge_lora(adapters=str(trained.checkpoint))
    assert not trained.checkpoint.with_name(f"{trained.checkpoint.name}-merged").exists()


def test_the_bound_on_the_difference_of_a_merge_is_enforced(trained):
    with pytest.raises(CheckpointError, match="differs from the adapter"):
        swift.merge_lora(adapters=str(trained.checkpoint), max_difference=0.0)
    assert not trained.checkpoint.with_name(f"{trained.checkpoint.name}-merged").exists()


def test_a_replaced_merge_is_kept_until_the_new_one_is_good(trained):
    merged = swift.merge_lora(adapters=str(trained.checkpoint))
    with pytest.raises(CheckpointError):
        swift.merge_lora(adapters=str(trained.checkpoint), exist_ok=True, max_difference=0.0)
    before = (merged / "model.safetensors").read_bytes()
    assert swift.merge_lora(adapters=str(trained.checkpoint), exist_ok=True) == merged
    assert (merged / "model.safetensors").read_bytes() == before
    assert not list(merged.parent.glob("*.unchecked"))


def test_infer_from_python_gives_a_text_for_a_text(trained):
    answer = swift.infer("question 3", adapters=str(trained.run), temperature=0, max_new_tokens=5)
    assert isinstance(answer, str)
    assert swift.infer(["question 3"], adapters=str(trained.run), temperature=0, max_new_tokens=5) == [answer]


def test_the_described_call_of_get_model_works(tmp_path):
    wide = make_model(tmp_path / "wide", hidden_size=64)  # bitsandbytes packs blocks of 64 weights
    model, tokenizer = swift.get_model(str(wide), quantization_method="bitsandbytes", quantization_bit=4, lora_rank=8)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 16)
    assert "Linear4bit" in type(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer).__name__
    ids = torch.tensor([tokenizer("snow on the roads").input_ids])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_without_bitsandbytes_the_error_says_what_to_install(tiny_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(DependencyError) as caught:
        swift.get_model(str(tiny_model), quantization_bit=4)
    assert caught.value.hint == "pip install 'swift-llm[bnb]'"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_trains_and_resumes_bit_for_bit(run, tmp_path, bits):
    wide = make_model(tmp_path / "wide", hidden_size=64)
    options = dict(model=str(wide), quant_bits=bits, max_steps=4, save_steps=2)
    whole, part = run("whole", **options), run("part", **options)
    (part.run / "checkpoint-4").rename(tmp_path / "lost")
    resumed = run("part", **options, resume_from_checkpoint=str(part.run))
    wanted, found = (load_file(result.checkpoint / "adapter_model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_load_dataset_gives_checked_records(rows):
    loaded = swift.load_dataset(str(rows), split_ratio=0.1)
    assert (len(loaded.train), len(loaded.validation), loaded.rejected) == (36, 4, [])


def test_runs_and_audit_speak_of_a_run(trained, capsys):
    cli.run(["runs", "list", str(trained.run.parent)])
    cli.run(["runs", "show", str(trained.run)])
    cli.run(["audit", str(trained.run)])
    assert "unbroken" in capsys.readouterr().out
    file = trained.checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is not the file that was recorded"):
        cli.run(["audit", str(trained.run)])


def test_data_inspect_marks_what_is_trained(tiny_model, rows, capsys):
    cli.run(["data", "inspect", "--model", str(tiny_model), "--dataset", str(rows), "--rows", "1"])
    assert "[[snow 0<|im_end|>]]" in capsys.readouterr().out
