"""Training by Megatron-Core is training in one process: the same losses, norms and checkpoints, of parts that are really parts."""

import json
import shlex

import pytest
import torch
import transformers

import swift.api
import swift.cli
import swift.train.run
from swift.errors import CheckpointError
from swift.parallel.megatron import checkpoint, strategy
from swift.parallel.megatron.convert import Converter
from swift.parallel.megatron.model import Layout
from swift.parallel.megatron.strategy import Megatron
from swift.parallel.world import join
from tests.ranks import run_ranks

pytestmark = pytest.mark.multi
KEYS = ("loss", "grad_norm", "eval_loss", "token_acc", "eval_token_acc", "rewards/margins")


@pytest.fixture(scope="module")
def models(megatron, folder_of, tied):
    return {"tied": tied, "qwen2": folder_of("qwen2"), "experts": folder_of("qwen3_moe"), "windows": folder_of("mistral")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(16):
            file.write(json.dumps({"query": f"question {number}", "response": "snow " * (1 + number % 5)}) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as file:
        for number in range(16):
            row = {"query": f"question {number}", "response": "snow " * (1 + number % 5), "rejected_response": f"rain {number}"}
            file.write(json.dumps(row) + "\n")
    return path


def train(model, rows, out, options, *, command="sft"):
    """(logged numbers, the last checkpoint, shapes of what this process has) of a run."""
    shapes = {"parts": set()}
    prepare, compute = Megatron.prepare, strategy.compute_part

    def computed(chunk, part):
        shapes["parts"].add((part.input_ids.shape[1], part.layout.num_tokens))
        return compute(chunk, part)

    def seen(own, *arguments):
        model, optimizer = prepare(own, *arguments)
        shapes.update({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
        return model, optimizer

    Megatron.prepare, strategy.compute_part = seen, computed
    common = dict(add_version=False, report_to="none", max_steps=3, learning_rate=1e-3, logging_steps=1, report_samples=0, eval_steps=3)
    common |= dict(padding_free=False, tuner_type="full", per_device_train_batch_size=1, split_dataset_ratio=0.2)
    try:
        given = {"output_dir": str(out), "model": str(model), "dataset": str(rows), **common, **options}
        result = getattr(swift.api, command)(**given)
    finally:
        Megatron.prepare, strategy.compute_part = prepare, compute
    lines = [{key: line[key] for key in KEYS if key in line} for line in result.state.log_history]
    return lines, str(result.checkpoint), shapes


SHARED, DEALT = {"gradient_accumulation_steps": 6}, {"gradient_accumulation_steps": 3}  # both see the same rows, or not
QKV, EXPERT = "chunks.0.decoder.layers.{}.self_attention.linear_qkv.weight", "chunks.0.decoder.layers.0.mlp.experts.local_experts.{}."
# (model, options, parameters that a process has of it with their shapes, parameters that it has not)
CASES = {
    "tp": (
        "tied",
        {**SHARED, "tensor_model_parallel_size": 2},
        # Half of 4 heads and 2 x 2 of keys and values, of 8 numbers; of gate and up of 48; of 320 tokens, to a multiple of 128.
        {
            QKV.format(1): (32, 32),
            "chunks.0.decoder.layers.0.mlp.linear_fc1.weight": (48, 32),
            "chunks.0.embedding.word_embeddings.weight": (192, 32),
        },
        (),
    ),
    "biased": (
        "qwen2",
        {**SHARED, "tensor_model_parallel_size": 2},
        {QKV.format(1).replace("weight", "bias"): (32,), "chunks.0.output_layer.weight": (192, 32)},
        (),
    ),
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
    # Experts are shared by the processes that share a sequence.
    "ulysses": (
        "experts",
        {**SHARED, "sequence_parallel_size": 2, "expert_model_parallel_size": 2},
        {EXPERT.format(1) + "linear_fc1.weight": (32, 32)},
        (EXPERT.format(2) + "linear_fc1.weight",),
    ),
    "ring": ("windows", {**SHARED, "sequence_parallel_size": 2, "sequence_parallel_kind": "ring"}, {QKV.format(1): (64, 32)}, ()),
}
# Of four processes.
PRODUCTS = {
    "cp x pp": (
        {**SHARED, "sequence_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel_kind": "ring"},
        {QKV.format(1): (64, 32)},
        (QKV.format(2),),
    ),
    "cp x tp": ({**SHARED, "sequence_parallel_size": 2, "tensor_model_parallel_size": 2}, {QKV.format(3): (32, 32)}, ()),
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


@pytest.fixture(scope="module")
def mcore(models, tmp_path_factory):
    """Checkpoints of Megatron's, made of the models, and what was made of them again."""
    folder = tmp_path_factory.mktemp("mcore")
    run_ranks(1, convert, models, folder)
    return folder


def convert(models, folder):
    for family in CONVERTED:
        swift.cli.run(shlex.split(f"export --model {models[family]} --to_mcore true --output_dir {folder / family} --quant_eval_samples 1"))
        swift.cli.run(shlex.split(f"export --mcore_model {folder / family} --to_hf true --output_dir {folder / family}-hf"))


# How two processes read it, and the numbers that each has then: of a stage two layers of 7,744, the embedding of 384 rows, and in
# the last the final norm; of experts all 43,456 (with two matrices of 384 rows) but 2 of 4 experts of 1,536 in both layers.
CONVERTED = {"tied": (Layout(pp=2), [27776, 27808]), "experts": (Layout(ep=2), [37312, 37312])}


@pytest.fixture(scope="module")
def two(models, rows, pairs, mcore, tmp_path_factory):
    """What each of two processes says of every run, by its name."""
    return run_ranks(2, every, models, rows, pairs, mcore, tmp_path_factory.mktemp("two"), deadline_s=400)


def every(models, rows, pairs, mcore, out):
    with join(torch.device("cpu")):
        found = {}
        for name, (family, options, _, _) in CASES.items():
            more = {"save_steps": 2} if name == "tp" else {}
            found[name] = train(models[family], rows, out / name, {**options, **more, "strategy": "megatron"})
        on = {**CASES["pp"][1], "strategy": "megatron", "tensor_model_parallel_size": 1}
        found["resumed"] = train(models["tied"], rows, out / "on", {**on, "resume_from_checkpoint": str(out / "tp" / "checkpoint-2")})
        with pytest.raises(CheckpointError) as refused:
            train(models["tied"], rows, out / "copies", {"strategy": "ddp", "resume_from_checkpoint": str(out / "tp" / "checkpoint-2")})
        found["refused"] = refused.value
        found["pairs"] = train(models["tied"], pairs, out / "pairs", on, command="rlhf")
        for family, (layout, _) in CONVERTED.items():
            found[f"read {family}"] = read_in_parts(mcore / family, models[family], layout)
    return found


@pytest.fixture(scope="module")
def four(models, rows, tmp_path_factory):
    """What each of four processes says of every product, by its name."""
    return run_ranks(4, multiply, models["tied"], rows, tmp_path_factory.mktemp("four"))


def multiply(model, rows, out):
    with join(torch.device("cpu")):
        return {name: train(model, rows, out / name, {**options, "strategy": "megatron"}) for name, (options, _, _) in PRODUCTS.items()}


def read_in_parts(folder, model, layout):
    """({name: whole tensor} in the main process, numbers that this one has) of a checkpoint that two processes read."""
    converter = Converter(transformers.AutoModelForCausalLM.from_pretrained(model), torch.float32, layout)
    converter.load(folder)
    return converter.give(), sum(parameter.numel() for parameter in converter.chunk.parameters())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two, alone, name):
    family, _, present, absent = CASES[name]
    wanted, checkpoint, _ = alone[family]
    for result in two:
        found, saved, shapes = result[name]
        same(found, wanted)
        if result is two[0]:
            assert {name: shapes.get(name) for name in present} == present
            assert not set(absent) & set(shapes)
            torch.testing.assert_close(logits(saved), logits(checkpoint), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_each_of_two_processes_computes_half_of_a_row(two, name):
    for result in two:
        parts = result[name][2]["parts"]
        assert all(2 * part == whole for part, whole in parts)
        assert max(parts) == (16, 32)  # the longest row has 32 tokens


@pytest.mark.parametrize("name", PRODUCTS)
def test_four_processes_train_as_one(four, alone, name):
    _, present, absent = PRODUCTS[name]
    for found, _, shapes in (result[name] for result in four):
        same(found, alone["tied"][0])
        assert max(shapes["parts"]) == (16, 32)
    shapes = four[0][name][2]
    assert {name: shapes.get(name) for name in present} == present
    assert not set(absent) & set(shapes)


def test_a_run_goes_on_in_another_layout(two, alone):
    for result in two:
        same(result["resumed"][0], alone["tied"][0])


def test_another_strategy_cannot_read_its_state_nor_it_that_of_another(two, tmp_path):
    for result in two:
        assert "its state is not of this strategy, but of Megatron-Core" in result["refused"].message
        assert result["refused"].hint.startswith("say --strategy megatron; --resume_only_model true")
    (tmp_path / "optimizer.pt").touch()
    with pytest.raises(CheckpointError, match="its state is not of Megatron-Core, but of another strategy"):
        checkpoint.load(tmp_path / "optimizer.pt", None, None, None)


def test_pairs_are_compared_by_megatron_as_by_one_process(two, models, pairs, tmp_path):
    wanted, _, _ = train(models["tied"], pairs, tmp_path, SHARED, command="rlhf")
    for result in two:
        same(result["pairs"][0], wanted)


@pytest.mark.parametrize("family", CONVERTED)
def test_a_model_becomes_a_checkpoint_of_megatron_and_comes_back(two, models, mcore, family):
    assert json.loads((mcore / family / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    tensors = transformers.AutoModelForCausalLM.from_pretrained(models[family]).state_dict()
    (found, _), _ = (result[f"read {family}"] for result in two)
    assert [result[f"read {family}"][1] for result in two] == CONVERTED[family][1]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    assert set(tensors) - set(found) <= {"lm_head.weight"}
    torch.testing.assert_close(logits(f"{mcore / family}-hf"), logits(models[family]), rtol=0, atol=0)


def test_a_folder_that_is_no_checkpoint_is_refused(models):
    with pytest.raises(CheckpointError, match="is no distributed checkpoint of Megatron-Core"):
        swift.cli.run(["export", "--mcore_model", str(models["tied"]), "--to_hf", "true"])
