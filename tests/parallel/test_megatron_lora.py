"""LoRA on Megatron-Core's layers is LoRA in one process: the same losses, norms and adapters, of parts that are really parts."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import swift.api
from swift.config.commands import RlhfConfig, SftConfig
from swift.config.options import build as options_of
from swift.data.collate import flat_batch, padded_batch
from swift.errors import ConfigError
from swift.model.policy import evaluating
from swift.parallel.megatron.arguments import translate
from swift.parallel.megatron.describe import describe
from swift.parallel.megatron.lora import plan_adapters, read
from swift.parallel.megatron.strategy import Megatron
from swift.parallel.mesh import Sizes
from swift.parallel.world import join
from tests.families import build
from tests.ranks import run_ranks

pytestmark = pytest.mark.multi
KEYS = ("loss", "grad_norm", "eval_loss", "token_acc", "eval_token_acc", "rewards/margins", "eval_rewards/margins")


@pytest.fixture(scope="module")
def models(megatron, folder_of, tied):
    return {"tied": tied, "fused": folder_of("phi3"), "experts": folder_of("qwen3_moe")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of questions, and of pairs of answers."""
    folder = tmp_path_factory.mktemp("rows")
    plain = [{"query": f"question {number}", "response": "snow " * (1 + number % 5)} for number in range(14)]
    pairs = [row | {"rejected_response": f"rain {number}"} for number, row in enumerate(plain)]
    for name, content in (("sft", plain), ("rlhf", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def train(model, rows, out, options, *, command="sft"):
    """(logged numbers, the last checkpoint, what this process says of its parts) of a run."""
    seen = {}
    prepare = Megatron.prepare

    def prepared(own, *arguments):
        seen["strategy"] = own
        return prepare(own, *arguments)

    common = dict(add_version=False, report_to="none", max_steps=3, learning_rate=1e-2, logging_steps=1, report_samples=0, eval_steps=3)
    common |= dict(
        padding_free=False, save_only_model=True, lora_dropout=0.0, lora_rank=4, per_device_train_batch_size=1, split_dataset_ratio=0.2
    )
    common |= dict(gradient_accumulation_steps=4, model=str(model), dataset=str(rows / f"{command}.jsonl"), output_dir=str(out))
    Megatron.prepare = prepared
    try:
        result = getattr(swift.api, command)(**{**common, **options})
    finally:
        Megatron.prepare = prepare
    lines = [{key: line[key] for key in KEYS if key in line} for line in result.state.log_history]
    return lines, str(result.checkpoint), parts(seen["strategy"]) if seen else {}


IDS = torch.arange(4, 24)[None]


def parts(strategy):
    """Shapes of what is trained here, bytes of weights and of optimizer state, and the log-probabilities of IDS."""
    trained = {name: tuple(parameter.shape) for name, parameter in strategy.model.named_parameters() if parameter.requires_grad}
    row = [{"input_ids": IDS[0].numpy(), "labels": IDS[0].numpy()}]
    batch = flat_batch(row) if strategy.layout.is_flat else padded_batch(row, pad_token_id=0)
    count = IDS.shape[1] - 1
    batch = replace(batch, document_S=torch.arange(count), num_documents=count)  # each prediction by itself
    with torch.no_grad(), evaluating(strategy.model):
        logps = strategy.make_policy(strategy.model).logps(batch)
    return {"trained": trained, "logps": logps, **strategy.local_bytes()}


def logps(model, checkpoint):
    """The same by transformers and PEFT."""
    tuned = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), checkpoint).eval()
    with torch.no_grad():
        return tuned(input_ids=IDS).logits[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]


TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
AGAIN = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PLUS = {"use_rslora": True, "lorap_lr_ratio": 4.0, "init_weights": "pissa", "target_modules": ["q_proj", "v_proj", "down_proj"]}
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
FLAT = {"padding_free": True}
# name -> (model, options of one process and of two, options of two)
CASES = {
    "tp": ("tied", {}, TP),
    "one matrix": ("fused", {}, TP),
    "vpp": ("tied", {}, {**PP, **AGAIN, **FLAT, "virtual_pipeline_model_parallel_size": 2}),
    "cp": ("tied", {}, {"sequence_parallel_size": 2, "sequence_parallel_kind": "ring"}),
    "plus": ("tied", PLUS, {**TP, "save_steps": 2, "save_only_model": False}),
    "experts": ("experts", ATTENTION, {"expert_model_parallel_size": 2, "gradient_accumulation_steps": 2}),
}
# Of four processes.
PRODUCTS = {"tp x pp": ("tied", {**TP, **PP}), "tp x dp": ("fused", {**TP, "gradient_accumulation_steps": 2})}


@pytest.fixture(scope="module")
def alone(models, rows, tmp_path_factory):
    out, found = tmp_path_factory.mktemp("alone"), {}
    for family, options, _ in CASES.values():
        if (key := str((family, options))) not in found:
            found[key] = train(models[family], rows, out / str(len(found)), options)
    start = {"adapters": [found[str(("tied", {}))][1]]}
    found["pairs"] = train(models["tied"], rows, out / "pairs", start, command="rlhf")
    return found


@pytest.fixture(scope="module")
def two(models, rows, alone, tmp_path_factory):
    """What each of two processes says of every run, by its name."""
    start = alone[str(("tied", {}))][1]
    return run_ranks(2, every, models, rows, start, tmp_path_factory.mktemp("two"), deadline_s=300)


def every(models, rows, start, out):
    on = {"strategy": "megatron"}
    with join(torch.device("cpu")):
        found = {name: train(models[family], rows, out / name, {**on, **own, **more}) for name, (family, own, more) in CASES.items()}
        from_tp = {"resume_from_checkpoint": str(out / "plus" / "checkpoint-2"), "tensor_model_parallel_size": 1}
        found["resumed"] = train(models["tied"], rows, out / "on", {**on, **PLUS, **PP, **from_tp})
        for name, more in (("pairs tp", {**TP, **FLAT}), ("pairs pp", PP)):
            found[name] = train(models["tied"], rows, out / name, {**on, **more, "adapters": [start]}, command="rlhf")
        found["dropped"] = train(models["fused"], rows, out / "dropped", {**on, **TP, **DROPPING})
        found["half"] = train(models["fused"], rows, out / "half", {**on, **TP, "torch_dtype": "bfloat16", "max_steps": 2})
        found["no adapter"] = refused(models["tied"], rows, out / "none", {**on, **PP, "target_regex": r"model\.layers\.[01]\..*proj"})
    return found


def refused(model, rows, out, options):
    try:
        train(model, rows, out, options)
    except ConfigError as problem:
        return str(problem)
    return "nothing"


@pytest.fixture(scope="module")
def four(models, rows, tmp_path_factory):
    return run_ranks(4, multiply, models, rows, tmp_path_factory.mktemp("four"))


def multiply(models, rows, out):
    on = {"strategy": "megatron"}
    with join(torch.device("cpu")):
        return {name: train(models[family], rows, out / name, {**options, **on}) for name, (family, options) in PRODUCTS.items()}


def same(found, wanted):
    assert len(found) == len(wanted)
    for line, expected in zip(found, wanted, strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=2e-6), (found, wanted)


def same_adapters(found, wanted):
    one, other = (load_file(f"{path}/adapter_model.safetensors") for path in (found, wanted))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    settings = [json.loads((Path(path) / "adapter_config.json").read_text()) for path in (found, wanted)]
    assert set(settings[0].pop("target_modules")) == set(settings[1].pop("target_modules"))
    assert settings[0] == settings[1]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_an_adapter_as_one(two, alone, models, name):
    family, own, _ = CASES[name]
    wanted, checkpoint, _ = alone[str((family, own))]
    for result in two:
        same(result[name][0], wanted)
    saved, said = two[0][name][1:]
    same_adapters(saved, checkpoint)
    assert any(tensor.abs().max() > 1e-3 for key, tensor in load_file(f"{saved}/adapter_model.safetensors").items() if "lora_B" in key)
    torch.testing.assert_close(said["logps"], logps(models[family], saved), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRODUCTS)
def test_four_processes_train_an_adapter_as_one(four, alone, name):
    wanted, checkpoint, _ = alone[str((PRODUCTS[name][0], {}))]
    for result in four:
        same(result[name][0], wanted)
    same_adapters(four[0][name][1], checkpoint)


LAYER = "chunks.0.decoder.layers.{}."
QKV, PROJ = LAYER + "self_attention.linear_qkv.adapter.", LAYER + "self_attention.linear_proj.adapter."


def test_a_process_has_its_part_of_an_adapter_and_of_its_state(two, four):
    trained = two[0]["tp"][2]["trained"]
    # Half of 4 heads and of 2 of keys and values, of 8 numbers, come out of q, k and v; half of the 4 heads go into o.
    parts = {QKV + "lora_A.q_proj": (4, 32), QKV + "lora_B.q_proj": (16, 4), QKV + "lora_B.k_proj": (8, 4)}
    parts |= {PROJ + "lora_A.o_proj": (4, 16), PROJ + "lora_B.o_proj": (32, 4), LAYER + "mlp.linear_fc1.adapter.lora_B.up_proj": (24, 4)}
    assert {name: trained[name.format(3)] for name in parts} == parts
    assert all(".adapter.lora_" in name for name in trained)
    # In a layer rank 4 times 32 inputs of q, k, v, gate, up and 32 outputs of o, down, whole; half of 224 other rows and columns.
    numbers = 4 * 4 * (7 * 32 + (32 + 16 + 16 + 48 + 48 + 32 + 48) // 2)
    assert sum(torch.Size(shape).numel() for shape in trained.values()) == numbers
    count = len(trained)  # AdamW has two numbers for each, and a step for each tensor
    assert two[0]["tp"][2]["optimizer"] == 4 * (2 * numbers + count)
    assert QKV.format(1) + "lora_A.q_proj" in two[0]["pairs pp"][2]["trained"]
    assert QKV.format(2) + "lora_A.q_proj" not in two[0]["pairs pp"][2]["trained"]  # it has two layers of the four
    both = four[0]["tp x pp"][2]["trained"]
    assert both[QKV.format(1) + "lora_B.q_proj"] == (16, 4) and QKV.format(2) + "lora_B.q_proj" not in both
    # Frozen weights are shards too: of 4 layers of 7,744 numbers less 64 of norms and of 384 x 32 half, norms whole, and the adapter.
    assert two[0]["tp"][2]["weights"] == 4 * ((4 * 7680 + 384 * 32) // 2 + 4 * 64 + 32 + numbers)


def test_a_run_goes_on_in_another_layout(two, alone):
    wanted, checkpoint, _ = alone[str(("tied", PLUS))]
    for result in two:
        same(result["resumed"][0], wanted)
    same_adapters(two[0]["resumed"][1], checkpoint)


@pytest.mark.parametrize("name", ["pairs tp", "pairs pp"])
def test_pairs_are_compared_with_the_model_without_its_adapter(two, alone, name):
    assert abs(alone["pairs"][0][0]["rewards/margins"]) > 1e-3  # the run starts from an adapter, and the reference has none
    for result in two:
        same(result[name][0], alone["pairs"][0])


def test_weights_of_16_bits_train_an_adapter_of_32(two, alone):
    losses = [[line["loss"] for line in lines[:2]] for lines in (two[0]["half"][0], alone[str(("fused", {}))][0])]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {tensor.dtype for tensor in load_file(f"{two[0]['half'][1]}/adapter_model.safetensors").values()} == {torch.float32}


# Layers whose inputs all processes have drop the same; layers are computed again in one run, and not in the other.
DROPPING = {"lora_dropout": 0.3, "target_modules": ["qkv_proj", "gate_up_proj"], "max_steps": 2, **AGAIN}


def dropping(model, rows, out):
    with join(torch.device("cpu")):
        own = {name: value for name, value in DROPPING.items() if name not in AGAIN}
        return train(model, rows, out, {**own, "strategy": "megatron"})


def test_processes_that_share_a_layer_drop_the_same(two, alone, models, rows, tmp_path):
    [wanted] = run_ranks(1, dropping, models["fused"], rows, tmp_path)
    for result in two:
        same(result["dropped"][0], wanted[0])
    assert wanted[0][1]["loss"] != pytest.approx(alone[str(("fused", {}))][0][1]["loss"], rel=1e-3)


def test_a_stage_without_an_adapter_is_refused_in_every_process(two):
    for result in two:
        assert result["no adapter"].startswith("a stage of the pipeline has no adapter")


OPTIONS = {"model": "m", "dataset": "d", "strategy": "megatron", "lora_dropout": 0.0}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SftConfig, {"tuner_type": "adalora"}, "trains all weights or LoRA, not --tuner_type adalora"),
        (SftConfig, {"use_dora": True}, "--use_dora cannot be combined: the size of a row is spread"),
        (SftConfig, {"lora_bias": "all"}, "--lora_bias cannot be combined: biases of its layers stay frozen"),
        (SftConfig, {"modules_to_save": ["lm_head"]}, "--modules_to_save cannot be combined"),
        (RlhfConfig, {"ref_adapters": ["a"]}, "--ref_adapters cannot be combined: it has one adapter"),
    ],
)
def test_what_is_more_than_lora_is_refused_before_a_model_is_loaded(kind, options, message):
    given = {name: value for name, value in OPTIONS.items() if name != "lora_dropout" or "tuner_type" not in options}
    with pytest.raises(ConfigError, match=message):
        Megatron.check(options_of(kind, ("python", given | options)), Sizes(dp=2))


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["q_proj", "lm_head"], "has no adapter for lm_head"),
        ("llama", ["embed_tokens"], "has no adapter for model.embed_tokens, a Embedding"),
        ("qwen3_moe", "all-linear", "has no adapter for model.layers.0.mlp.experts, a Qwen3MoeExperts"),
    ],
)
def test_a_layer_that_has_no_place_for_an_adapter_is_named(family, targets, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT, of names that it looks for in a mixture of experts
        model = peft.get_peft_model(build(family), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=message):
        source = read(model)
        plan_adapters(source.adapters, describe(source.model, source.names)[1])


def test_layers_are_named_as_by_megatron():
    words = translate("--target_modules linear_qkv linear_proj --adapter_load a --lora_rank 8 --merge_lora false".split())
    assert words == "--target_modules q_proj k_proj v_proj qkv_proj o_proj --adapters a --lora_rank 8".split()
    assert translate(["--target_modules", "all-linear"]) == ["--target_modules", "all-linear"]
    with pytest.raises(ConfigError, match="option --merge_lora is not available: checkpoints hold the adapter"):
        translate(["--merge_lora", "true"])
