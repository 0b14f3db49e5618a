"""Training in several processes is training in one: the same loss, gradients and weights, of parts that are really parts."""

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from swift.config.commands import SftConfig
from swift.config.options import build
from swift.errors import ConfigError
from swift.parallel.choose import Arrangement, arrange
from swift.parallel.mesh import Sizes
from swift.parallel.world import World, device_of
from tests.ranks import run_ranks
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.multi
# The loss of step 2 is that of what step 1 has made of the weights, and the weights after it come from both moments of Adam.
OPTIONS = {
    "add_version": False,
    "report_to": "none",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_samples": 0,
    "save_steps": 2,
    "split_dataset_ratio": 0.2,
}


def train(model, rows, out, **options):
    """One run in this process, one of several or alone: what it holds of weights and optimizer, logs, and says that it trains."""
    from swift.api import sft
    from swift.train.run import Session

    seen = {}
    ends = Session.run_to_end

    def watched(session):
        result = ends(session)
        bytes_held = getattr(session.strategy, "local_bytes", dict)()
        seen.update(bytes_held)
        return result

    Session.run_to_end = watched
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            result = sft(model=str(model), dataset=str(rows), output_dir=str(out), **(OPTIONS | options))
    finally:
        Session.run_to_end = ends
    lines = [line for line in result.state.log_history if "loss" in line or "eval_loss" in line]
    return {"held": seen, "lines": lines, "counts": re.findall(r"training [\d,]+ of [\d,]+ parameters", told.getvalue())}


def weights(run: Path, step: int):
    file = next((run / f"checkpoint-{step}").glob("*.safetensors"))
    return load_file(file)


def differs(found, wanted) -> float:
    return max(
        float((found[name].double() - wanted[name].double()).norm() / wanted[name].double().norm().clamp_min(1e-12)) for name in wanted
    )


# name: (processes, options, share of all weights that a process holds, share of the optimizer's state, of the whole)
FULL = {
    "ddp": (2, {"padding_free": False}, 1, 1),
    "fsdp2": (2, {"fsdp": "full_shard auto_wrap"}, 1 / 2, 1 / 2),
    "offload": (
        2,
        {"fsdp": "fsdp2", "fsdp_cpu_offload": True, "fsdp_reshard_after_forward": False, "gradient_checkpointing": True},
        1 / 2,
        1 / 2,
    ),
    "tp x dp": (4, {"tensor_model_parallel_size": 2, "padding_free": False}, 1 / 2, 1 / 2),
    "tp x fsdp2": (4, {"tensor_model_parallel_size": 2, "fsdp": "fsdp2"}, 1 / 4, 1 / 4),
    "tp x cp": (4, {"tensor_model_parallel_size": 2, "sequence_parallel_size": 2}, 1 / 2, 1 / 2),
    "ring x fsdp2": (4, {"sequence_parallel_size": 2, "sequence_parallel_kind": "ring", "fsdp": "fsdp2"}, 1 / 4, 1 / 4),
    "pp x dp": (4, {"pipeline_model_parallel_size": 2}, None, None),
}
FULL["tp x pp"] = (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, None, None)
# Of two blocks and an embedding that is the head each stage has a block and the embedding: two thirds of the numbers.
STAGES = {"pipeline_model_parallel_size": 2, "sequence_parallel_size": 2}
FULL["pp x ring"] = (4, {**STAGES, "sequence_parallel_kind": "ring"}, 2 / 3, 2 / 3)
FULL["pp x ulysses x fsdp2"] = (4, {**STAGES, "fsdp": "fsdp2"}, 1 / 3, 1 / 3)
LORA = ("ddp", "offload", "tp x fsdp2", "ring x fsdp2", "pp x dp")


def readers(size, options):
    shared = options.get("tensor_model_parallel_size", 1) * options.get("sequence_parallel_size", 1)
    return size // shared // options.get("pipeline_model_parallel_size", 1)


ONE = {}  # what one process logs and ends with, by tuner; the rows of all tests here are the same


def check(model, rows, tmp_path, name, **options):
    """The strategy ``name`` logs what one process logs, ends with its weights, and holds no more than its share."""
    tuner = options.get("tuner_type", "lora")
    if tuner not in ONE:
        ONE[tuner] = train(model, rows, tmp_path / "one", gradient_accumulation_steps=4, **options), weights(tmp_path / "one", 2)
    one, last = ONE[tuner]
    size, more, weights_held, state_held = FULL[name]
    several = {**options, **more, "gradient_accumulation_steps": 4 // readers(size, more)}
    results = run_ranks(size, _train, (model, rows, tmp_path / name, several))
    for result in results:
        for found, wanted in zip(result["lines"], one["lines"], strict=True):
            for key in {"loss", "grad_norm", "eval_loss", "token_acc"} & wanted.keys():
                assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6), key
    assert [result["counts"] for result in results] == [one["counts"], *[[]] * (size - 1)] != [[]] * size  # of the whole model
    assert differs(weights(tmp_path / name, 2), last) < 5e-4
    if tuner == "full" and weights_held is not None:
        held = [result["held"] for result in results]
        # norms are in every process of a tensor-parallel group
        assert max(each["weights"] for each in held) < 1.1 * weights_held * _bytes(model)
        assert max(each["optimizer"] for each in held) < 1.1 * 2 * state_held * _bytes(model)


@pytest.mark.parametrize("name", FULL)
def test_all_weights_trained_by_several_processes_are_those_of_one(tiny_model, rows, tmp_path, name):
    check(tiny_model, rows, tmp_path, name, tuner_type="full")


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_trained_by_several_processes_is_that_of_one(tiny_model, rows, tmp_path, name):
    check(tiny_model, rows, tmp_path, name, lora_dropout=0.0)


def test_experts_in_several_processes_are_those_of_one(rows, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer, fields = make_tokenizer(tmp_path / "model"), {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 24}
    fields |= {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **fields))
    model.to(torch.float32).save_pretrained(tmp_path / "model")
    experts = sum(4 * parameter.numel() for name, parameter in model.named_parameters() if "experts" in name)
    options = {"tuner_type": "full", "save_steps": 1}
    one = train(tmp_path / "model", rows, tmp_path / "one", gradient_accumulation_steps=4, **options)
    several = {**options, "expert_model_parallel_size": 2, "gradient_accumulation_steps": 1}
    whole = _bytes(tmp_path / "model")
    # As copies each process has half of the experts, and the rest; in parts a quarter of all.
    for name, more, held in (("copies", {}, whole - experts / 2), ("parts", {"fsdp": "fsdp2"}, whole / 4)):
        if name == "copies":  # they go on with what one process has begun
            shutil.copytree(tmp_path / "one", tmp_path / name)
            shutil.rmtree(tmp_path / name / "checkpoint-2")
            more = {"resume_from_checkpoint": str(tmp_path / name)}
        results = run_ranks(4, _train, (tmp_path / "model", rows, tmp_path / name, several | more))
        assert results[0]["counts"] == one["counts"]
        for result in results:
            assert result["held"]["weights"] == held
            for found, wanted in zip(result["lines"], one["lines"], strict=True):
                for key in {"loss", "grad_norm", "eval_loss"} & wanted.keys():
                    assert found[key] == pytest.approx(wanted[key], rel=1e-4), key
        assert differs(weights(tmp_path / name, 2), weights(tmp_path / "one", 2)) < 5e-4
    shutil.rmtree(tmp_path / "parts/checkpoint-2")
    alone = {**options, "gradient_accumulation_steps": 4, "resume_from_checkpoint": str(tmp_path / "parts")}
    train(tmp_path / "model", rows, tmp_path / "parts", **alone)
    assert differs(weights(tmp_path / "parts", 2), weights(tmp_path / "one", 2)) < 5e-4


def test_weights_of_four_bits_are_sharded_too(rows, tmp_path):
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    options = {"quant_bits": 4, "lora_dropout": 0.0}
    one = train(model, rows, tmp_path / "one", gradient_accumulation_steps=4, **options)
    held = []
    for name, more in (("copies", {}), ("parts", {"fsdp": "fsdp2", "gradient_checkpointing": True})):
        several = {**options, **more, "gradient_accumulation_steps": 2}
        for result in run_ranks(2, _train, (model, rows, tmp_path / name, several)):
            assert [line["loss"] for line in result["lines"] if "loss" in line] == pytest.approx(
                [line["loss"] for line in one["lines"] if "loss" in line], rel=1e-5
            )
            held.append(result["held"]["weights"])
        assert differs(weights(tmp_path / name, 2), weights(tmp_path / "one", 2)) < 1e-4
    assert held[2:] == [held[0] / 2, held[0] / 2] and held[0] < 0.6 * _bytes(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim": "muon", "fsdp": "fsdp2"}, "--optim muon and --strategy fsdp2 cannot be combined"),
        ({"tuner_type": "vera", "fsdp": "fsdp2"}, "--tuner_type vera and --strategy fsdp2 cannot be combined"),
        ({"tensor_model_parallel_size": 3}, "--tensor_model_parallel_size 3 needs a multiple of 3 processes, and there are 2"),
        ({"strategy": "single"}, "--strategy single is for one process, and there are 2"),
        ({"eval_dataset": ["mmlu"], "fsdp": "fsdp2"}, "--eval_dataset and --strategy fsdp2 cannot be combined"),
        ({"expert_model_parallel_size": 2, "deepspeed": "zero2"}, "--expert_model_parallel_size 2 and --strategy deepspeed cannot"),
        ({"pipeline_model_parallel_size": 2, "router_aux_loss_coef": 0.1}, "--router_aux_loss_coef and --pipeline_model_parallel_size 2"),
        ({"sequence_parallel_size": 2, "torch_compile": True}, "--torch_compile and --sequence_parallel_size 2 cannot be combined"),
        ({"tensor_model_parallel_size": 2, "quant_bits": 4}, "--quant_method bnb and --tensor_model_parallel_size 2 cannot be combined"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(options, said):
    config = build(SftConfig, ("python", {"model": "a", "dataset": ["b"], **options}))
    with pytest.raises(ConfigError) as caught:
        arrange(config, World(rank=0, size=2, local_rank=0, local_size=2))
    assert said in caught.value.message and "\n" not in caught.value.message and caught.value.hint


def test_experts_go_with_split_layers():
    options = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}
    config = build(SftConfig, ("python", {"model": "a", "dataset": ["b"], **options}))
    assert str(arrange(config, World(rank=0, size=4, local_rank=0, local_size=4))) == "ddp, dp 2 x tp 2, ep 2"


def test_processes_of_a_layer_read_the_same_rows_and_drop_the_same_activations():
    found = Arrangement("ddp", Sizes(pp=2, dp=2, cp=2, tp=2))
    assert [found.reader(rank) for rank in range(16)] == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    assert [found.stream(rank) for rank in range(16)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]  # stages have other layers


def test_a_process_takes_the_accelerator_of_its_number_or_the_only_one_that_it_sees():
    world = World(rank=5, size=8, local_rank=1, local_size=4)
    assert device_of(world, 2, {}) == 1
    assert device_of(world, 1, {"CUDA_VISIBLE_DEVICES": "3"}) == 0
    with pytest.raises(ConfigError, match=r"4 processes are started on a machine with 1 accelerator$") as caught:
        device_of(world, 1, {})
    assert "NPROC_PER_NODE=1" in caught.value.hint
    with pytest.raises(ConfigError, match="with 2 accelerators"):
        device_of(World(rank=7, size=8, local_rank=3, local_size=4), 2, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_one_process_is_no_several(tmp_path):
    config = build(SftConfig, ("python", {"model": "a", "dataset": ["b"], "fsdp": "fsdp2"}))
    with pytest.raises(ConfigError, match="needs several processes, and this is one"):
        arrange(config, World())


def _train(arguments):
    model, rows, out, options = arguments
    return train(model, rows, out, **options)


def _bytes(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return sum(4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_run_goes_on_in_another_number_of_processes(tiny_model, rows, tmp_path, tuner):
    options = {"tuner_type": tuner, "gradient_accumulation_steps": 2, "save_steps": 1}
    options |= {"lora_dropout": 0.0} if tuner == "lora" else {}
    run_ranks(2, _train, (tiny_model, rows, tmp_path / "parts", {**options, "fsdp": "fsdp2", "async_save": True}))
    run_ranks(2, _train, (tiny_model, rows, tmp_path / "copies", options))
    assert (tmp_path / "parts/checkpoint-1/optimizer/.metadata").is_file()
    assert (tmp_path / "copies/checkpoint-1/optimizer.pt").is_file()
    wanted = weights(tmp_path / "copies", 2)
    assert differs(weights(tmp_path / "parts", 2), wanted) < 2e-4
    again = [("parts", 1, {}), ("copies", 4, {"fsdp": "fsdp2"})]  # of an adapter, whose state is that of fewer weights
    if tuner == "full":
        again += [("parts", 4, {"fsdp": "fsdp2"}), ("parts", 2, {})]
    for begun, size, more in again:
        out = tmp_path / f"{begun}-{size}-{len(more)}"
        shutil.copytree(tmp_path / begun, out)
        shutil.rmtree(out / "checkpoint-2")
        several = {**options, **more, "resume_from_checkpoint": str(out)}
        run_ranks(size, _train, (tiny_model, rows, out, several))
        assert differs(weights(out, 2), wanted) < 2e-4, (begun, size)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
