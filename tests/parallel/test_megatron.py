"""Training by Megatron-Core is training in one process: the same losses, norms and checkpoints, of parts that are really parts."""

import json
import shlex

import matplotlib
import matplotlib.pyplot
import pytest
import torch
import transformers

import swift.api
import swift.cli
import swift.train.run
from swift.parallel.megatron import package
from swift.parallel.megatron.convert import Converter
from swift.parallel.megatron.model import Layout
from swift.parallel.megatron.strategy import Megatron
from swift.parallel.world import join
from tests.families import build
from tests.ranks import run_ranks
from tests.tiny import make_tokenizer

# What each forked process would import by itself.
PREPARED = (matplotlib.pyplot, swift.train.run)
pytestmark = pytest.mark.multi
KEYS = ("loss", "grad_norm", "eval_loss", "token_acc", "eval_token_acc", "rewards/margins")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Once, rather than in each process that is forked."""
    for name in ("parallel_state", "models.gpt.gpt_layer_specs", "models.gpt.gpt_model", "pipeline_parallel", "tensor_parallel"):
        package.part(name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each family, with the tokenizer of the tests."""

    def make(family, **options):
        path = tmp_path_factory.mktemp(family)
        tokenizer = make_tokenizer(path)
        build(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options).save_pretrained(path)
        return path

    return {
        "tied": make("llama", num_hidden_layers=4, tie_word_embeddings=True),
        "qwen2": make("qwen2"),
        "experts": make("qwen3_moe"),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(16):
            file.write(json.dumps({"query": f"question {number}", "response": "snow " * (1 + number % 5)}) + "\n")
    return path


def train(model, rows, out, options, *, command="sft"):
    """(logged numbers, the last checkpoint, shapes of what this process has) of a run."""
    shapes = {}
    prepare = Megatron.prepare

    def seen(strategy, *arguments):
        model, optimizer = prepare(strategy, *arguments)
        shapes.update({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
        return model, optimizer

    Megatron.prepare = seen
    common = dict(add_version=False, report_to="none", max_steps=3, learning_rate=1e-3, logging_steps=1, report_samples=0, eval_steps=3)
    common |= dict(padding_free=False, tuner_type="full", per_device_train_batch_size=1, split_dataset_ratio=0.2)
    try:
        given = {"output_dir": str(out), "model": str(model), "dataset": str(rows), **common, **options}
        result = getattr(swift.api, command)(**given)
    finally:
        Megatron.prepare = prepare
    lines = [{key: line[key] for key in KEYS if key in line} for line in result.state.log_history]
    return lines, str(result.checkpoint), shapes


SHARED, DEALT = {"gradient_accumulation_steps": 6}, {"gradient_accumulation_steps": 3}  # both see the same rows, or not
QKV, EXPERT = "chunks.0.decoder.layers.{}.self_attention.linear_qkv.weight", "chunks.0.decoder.layers.0.mlp.experts.local_experts.{}."
# (model, options, parameters that a process has of it with their shapes, parameters that it has not)
CASES = {
    "tp": (
        "qwen2",
        {**SHARED, "tensor_model_parallel_size": 2},
        # 4 heads and 2 x 2 of keys and values, of 8 numbers; gate and up of 48; 320 tokens, to a multiple of 128
        {QKV.format(1): (32, 32), "chunks.0.decoder.layers.0.mlp.linear_fc1.weight": (48, 32), "chunks.0.output_layer.weight": (192, 32)},
        (),
    ),
    "dp": ("tied", {**DEALT}, {QKV.format(3): (64, 32)}, ()),
    "pp": ("tied", {**SHARED, "pipeline_model_parallel_size": 2}, {QKV.format(1): (64, 32)}, (QKV.format(2),)),
    "vpp": (
        "tied",
        {**SHARED, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {QKV.format(0): (64, 32), QKV.format(0).replace("chunks.0", "chunks.1"): (64, 32)},
        (QKV.format(1),),
    ),
    "ep": (
        "experts",
        {**DEALT, "expert_model_parallel_size": 2},
        {EXPERT.format(1) + "linear_fc1.weight": (32, 32)},
        (EXPERT.format(2) + "linear_fc1.weight",),
    ),
}


@pytest.fixture(scope="module")
def alone(models, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return {name: train(path, rows, out / name, SHARED) for name, path in models.items()}


def logits(path):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=torch.arange(4, 24)[None]).logits


def same(found, wanted):
    assert len(found) == len(wanted)
    for line, expected in zip(found, wanted, strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=2e-6), (found, wanted)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(models, rows, alone, tmp_path, name):
    family, options, present, absent = CASES[name]
    wanted, checkpoint, _ = alone[family]
    results = run_ranks(2, train, models[family], rows, tmp_path, {**options, "strategy": "megatron"})
    for found, _, shapes in results:
        same(found, wanted)
        assert {name: shapes.get(name) for name in present} == present
        assert not set(absent) & set(shapes)
    torch.testing.assert_close(logits(results[0][1]), logits(checkpoint), rtol=1e-3, atol=1e-3)


def test_a_run_goes_on_in_another_layout(models, rows, alone, tmp_path):
    options = {**SHARED, "strategy": "megatron", "tensor_model_parallel_size": 2, "save_steps": 2, "save_total_limit": 2}
    run_ranks(2, train, models["tied"], rows, tmp_path / "first", options)
    run = {**options, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}
    run |= {"resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-2"), "output_dir": str(tmp_path / "second")}
    for found, _, _ in run_ranks(2, train, models["tied"], rows, tmp_path / "second", run):
        same(found, alone["tied"][0])


def test_pairs_are_compared_by_megatron_as_by_one_process(models, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for number in range(16):
            row = {"query": f"question {number}", "response": "snow " * (1 + number % 5), "rejected_response": f"rain {number}"}
            file.write(json.dumps(row) + "\n")
    wanted, _, _ = train(models["tied"], pairs, tmp_path / "one", SHARED, command="rlhf")
    options = {**SHARED, "strategy": "megatron", "pipeline_model_parallel_size": 2}
    for found, _, _ in run_ranks(2, compare, models["tied"], pairs, tmp_path / "two", options):
        same(found, wanted)


def compare(*arguments):
    return train(*arguments, command="rlhf")


def export(command):
    swift.cli.run(shlex.split(command))


def read_in_parts(folder, model, layout):
    """({name: whole tensor} in the main process, numbers that this one has) of a checkpoint that two processes read."""
    with join(torch.device("cpu")):
        converter = Converter(transformers.AutoModelForCausalLM.from_pretrained(model), torch.float32, layout)
        converter.load(folder)
        return converter.give(), sum(parameter.numel() for parameter in converter.chunk.parameters())


@pytest.mark.parametrize("family", ["tied", "experts"])
def test_a_model_becomes_a_checkpoint_of_megatron_and_comes_back(models, tmp_path, family):
    model, mcore, back = models[family], tmp_path / "mcore", tmp_path / "back"
    run_ranks(1, export, f"export --model {model} --to_mcore true --output_dir {mcore} --quant_eval_samples 1")
    assert json.loads((mcore / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    original = transformers.AutoModelForCausalLM.from_pretrained(model)
    layout = Layout(ep=2) if family == "experts" else Layout(pp=2)
    (found, some), (_, others) = run_ranks(2, read_in_parts, mcore, model, layout)
    tensors = original.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    assert set(tensors) - set(found) <= {"lm_head.weight"}
    assert max(some, others) < 0.9 * sum(tensor.numel() for tensor in found.values())
    run_ranks(1, export, f"export --mcore_model {mcore} --to_hf true --output_dir {back}")
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)
