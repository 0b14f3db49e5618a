"""How rows are put into forward passes: no way of doing it changes what is trained, and each can be resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from swift.errors import ConfigError
from tests.train.conftest import losses, metrics

SYSTEM = "You answer questions about snow in a few words, and you never say more than what you were asked to say."


@pytest.fixture
def tool_rows(tmp_path):
    """60 conversations under one of three long system messages."""
    path = tmp_path / "tools.jsonl"
    with path.open("w") as file:
        for number in range(60):
            system = f"{SYSTEM} Your tool is number {number % 3}: " + f"tool{number % 3} " * 20
            talk = [("system", system), ("user", f"question {number}"), ("assistant", "snow " * (1 + number % 5) + str(number))]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}) + "\n")
    return path


def adapter(result):
    return load_file(result.checkpoint / "adapter_model.safetensors")


def assert_same_adapter(one, other, tolerance=0.0):
    one, other = adapter(one), adapter(other)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        if tolerance == 0:
            assert torch.equal(weight, other[name]), name
        else:
            torch.testing.assert_close(weight, other[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("tuner", [{"lora_dropout": 0.0}, {"tuner_type": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize(
    "options",
    [{}, {"share_prefixes": False}, {"max_tokens_per_batch": 64}, {"max_tokens_per_batch": 4096}, {"dataloader_num_workers": 3}],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_every_way_of_batching_trains_what_padded_rows_train(run, tool_rows, tuner, options):
    common = {"dataset": str(tool_rows), "max_steps": 4, "learning_rate": 1e-3, **tuner}
    padded = run("padded", padding_free=False, **common)
    flat = run("flat", **common, **options)
    assert losses(flat) == pytest.approx(losses(padded), rel=1e-5)
    assert [line["grad_norm"] for line in metrics(flat)] == pytest.approx([line["grad_norm"] for line in metrics(padded)], rel=1e-3)


def test_shared_beginnings_are_counted_and_told(run, tool_rows):
    result = run("shared", dataset=str(tool_rows), lora_dropout=0.0, max_tokens_per_batch=4096)
    assert result.state.computed_tokens < 0.6 * result.state.tokens
    assert "beginnings that rows share are computed once" in (result.run / "report.md").read_text()


@pytest.mark.parametrize("options", [{}, {"packing_strategy": "sequential"}, {"share_prefixes": False}, {"packing_length": 700}])
def test_packs_train_every_row_once_an_epoch(run, tool_rows, options):
    once = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, "logging_first_step": False, "logging_steps": 1000}
    common = {"dataset": str(tool_rows), "lora_dropout": 0.0, "max_length": 512, **once}
    rows = run("rows", **common)
    packed = run("packed", packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=2, **common, **options)
    assert packed.state.tokens == rows.state.tokens
    assert packed.state.supervised_tokens == rows.state.supervised_tokens
    # Nothing is learned at rate 0, so the loss of the epoch, which is the one logged line, is the same however it is cut.
    assert losses(packed) == pytest.approx(losses(rows), rel=1e-5)


def test_rows_that_begin_alike_are_packed_together(run, tool_rows):
    common = {
        "dataset": str(tool_rows),
        "max_steps": -1,
        "num_train_epochs": 1,
        "packing": True,
        "packing_length": 400,
        "lora_dropout": 0.0,
    }
    sorted_packs = run("sorted", **common)
    in_order = run("in order", packing_strategy="sequential", **common)
    assert sorted_packs.state.computed_tokens < 0.75 * in_order.state.computed_tokens


MODES = {
    "rows": {},
    "packed": {"packing": True, "packing_length": 256, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "streamed": {"streaming": True, "shuffle_buffer_size": 13},
    "streamed and packed": {"streaming": True, "shuffle_buffer_size": 24, "packing": True, "packing_length": 256},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, tool_rows, mode):
    common = {"dataset": str(tool_rows), "max_steps": 9, "save_steps": 4, **MODES[mode]}
    straight = run("straight", **common)
    cut = without(run("cut", **common), "checkpoint-8", "checkpoint-9")
    resumed = run("cut", **common, resume_from_checkpoint=cut)
    assert_same_adapter(straight, resumed)
    assert metrics(straight) == metrics(resumed)


def without(result, *checkpoints):
    """The run directory as a kill after the first checkpoint would have left it."""
    for name in checkpoints:
        shutil.rmtree(result.run / name)
    return str(result.run)


def test_streaming_trains_what_it_reads_and_needs_the_number_of_steps(run, tool_rows):
    result = run("streamed", dataset=str(tool_rows), streaming=True, shuffle_buffer_size=16, max_steps=12)
    assert result.state.global_step == 12
    assert "passes over the data" in (result.run / "report.md").read_text()
    with pytest.raises(ConfigError, match="max_steps"):
        run("endless", dataset=str(tool_rows), streaming=True, max_steps=-1)


def test_a_stream_in_the_order_of_the_file_is_the_file(run, tool_rows):
    common = {"dataset": str(tool_rows), "dataset_shuffle": False, "train_dataloader_shuffle": False, "max_steps": 6}
    assert_same_adapter(run("whole", **common), run("streamed", streaming=True, shuffle_buffer_size=32, **common))


def test_rejected_rows_of_a_stream_are_kept_once_also_after_a_stop(run, tool_rows):
    lines = tool_rows.read_text().splitlines()
    for at in (3, 20, 40):
        lines.insert(at, '{"messages": []}')
    tool_rows.write_text("\n".join(lines) + "\n")
    common = {"dataset": str(tool_rows), "streaming": True, "shuffle_buffer_size": 16, "max_steps": 9, "save_steps": 3}
    straight = run("straight", **common)
    wanted = (straight.run / "rejected.jsonl").read_text()
    assert len(wanted.splitlines()) == 3
    cut = without(run("cut", **common), "checkpoint-6", "checkpoint-9")
    resumed = run("cut", **common, resume_from_checkpoint=cut)
    assert (resumed.run / "rejected.jsonl").read_text() == wanted


def test_interleaved_data_sets_are_trained_and_resumed_as_a_stream(run, rows, tool_rows):
    common = {
        "dataset": [str(rows), str(tool_rows)],
        "interleave_prob": [0.3, 0.7],
        "stopping_strategy": "all_exhausted",
        "streaming": True,
        "shuffle_buffer_size": 16,
        "max_steps": 8,
        "save_steps": 3,
    }
    straight = run("straight", **common)
    cut = without(run("cut", **common), "checkpoint-6", "checkpoint-8")
    assert_same_adapter(straight, run("cut", **common, resume_from_checkpoint=cut))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": True, "padding_free": False}, "--packing needs rows without padding"),
        ({"padding_free": False, "max_tokens_per_batch": 99}, "--max_tokens_per_batch has no effect"),
        ({"packing_length": 99}, "--packing_length has no effect without --packing true"),
        ({"packing": True, "group_by_length": True}, "--group_by_length has no effect with --packing"),
    ],
)
def test_options_that_contradict_each_other_are_refused(run, options, words):
    with pytest.raises(ConfigError, match=words):
        run(**options)


def test_a_model_that_mixes_documents_is_padded_unless_packing_is_asked_for(run, tmp_path, tiny_model, capsys):
    path = tmp_path / "conv"
    make_convolutional(path, tiny_model)
    result = run("padded", model=str(path), max_steps=2, target_modules=["q_proj"])
    assert result.state.computed_tokens > result.state.tokens
    assert "rows are padded" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--packing cannot be used with this model"):
        run("packed", model=str(path), packing=True, target_modules=["q_proj"])


def make_convolutional(path, tiny_model):
    from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Lfm2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
