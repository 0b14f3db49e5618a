"""Training by DeepSpeed is training in one process: the same losses, norms and weights, of parts that are really parts."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from swift.config.commands import SftConfig
from swift.config.options import build
from swift.data.collate import flat_batches, padded_batch
from swift.model.attention import use_packed_attention
from swift.model.load import load_model
from swift.model.policy import Policy
from swift.objectives import OBJECTIVES
from swift.parallel.world import join
from swift.train.loop import train_step
from swift.train.optim import make_optimizer
from tests.ranks import run_ranks
from tests.tiny import make_model

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
pytestmark = pytest.mark.multi
ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
PRESETS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Once, rather than in each process that is forked."""
    from swift.parallel.deepspeed import package

    package.load("cpu")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A model whose head is a weight of its own, of 39,072 numbers in all."""
    return make_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)


def options(deepspeed, **more):
    given = {"model": "tiny", "dataset": ["rows"], "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    return build(SftConfig, ("python", {**given, "deepspeed": deepspeed, **more}))


def batches(step, rank, size, *, flat):
    """Two passes of this process's share of the 8 rows of ``step``; the second is of another length in each."""
    random = np.random.default_rng(step)
    rows = [random.integers(4, 300, size=5 + number) for number in range(8)]
    examples = [{"input_ids": row, "labels": np.concatenate([[-100, -100], row[2:]])} for row in rows][rank::size]
    parts = [examples[:1], examples[1:]]
    return flat_batches(parts, root=False) if flat else [padded_batch(part, pad_token_id=3, padding_side="right") for part in parts]


def start(strategy, config, model, tuner, *, flat):
    loaded = load_model(model).model
    if tuner == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        loaded = get_peft_model(loaded, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if strategy.__class__.__name__ == "DeepSpeed" and strategy.dtype is not None:
        loaded.to(strategy.dtype)
    if flat:
        use_packed_attention(loaded)
    loaded, optimizer = strategy.prepare(loaded, functools.partial(make_optimizer, config=config))
    policy = Policy(loaded, call=getattr(strategy, "call", None))
    assert policy.has_own_head
    return policy, optimizer


def steps(strategy, policy, numbers, rank, size, *, flat):
    """(loss, gradient norm) of each step."""
    objective, found = OBJECTIVES.get("sft")(), []
    for number in numbers:
        own = batches(number, rank, size, flat=flat)
        result = train_step(policy, own, objective=objective, strategy=strategy, max_grad_norm=1.0)
        assert result.was_applied
        found.append((result.loss, result.grad_norm))
    return found


def alone(model, tuner, *, flat, count=2):
    from swift.parallel.single import Single

    strategy, config = Single(CPU), options(None)
    policy, _ = start(strategy, config, model, tuner, flat=flat)
    return steps(strategy, policy, range(count), 0, 1, flat=flat), strategy.whole(policy.model)


def each_preset(model, tuner, presets):
    """In one of several processes: what training by each preset gives."""
    from swift.parallel.deepspeed.strategy import DeepSpeed
    from swift.parallel.mesh import Sizes

    found = {}
    with join(CPU) as world:
        for name, flat in presets:
            config = options(name)
            DeepSpeed.check(config, Sizes(dp=world.size))
            strategy = DeepSpeed(config, world, CPU)
            policy, _ = start(strategy, config, model, tuner, flat=flat)
            seen = steps(strategy, policy, range(2), world.rank, world.size, flat=flat)
            found[name] = seen, strategy.local_bytes(), strategy.whole(policy.model)
    return found


# Weights that are not trained matter where parameters are cut, and where trained ones alone are.
@pytest.mark.parametrize(("tuner", "names"), [("full", PRESETS), ("lora", ("zero2", "zero3"))])
def test_every_preset_trains_as_one_process(untied, tuner, names):
    presets = [(name, PRESETS.index(name) % 2 == 1) for name in names]
    wanted = {flat: alone(untied, tuner, flat=flat) for flat in (False, True)}
    every, trained = (39_072, 39_072) if tuner == "full" else (43_168, 4_096)
    first, second = run_ranks(2, each_preset, untied, tuner, presets)
    for name, flat in presets:
        seen, held, whole = first[name]
        assert second[name][0] == seen
        assert second[name][2] == {}
        for found, known in zip(seen, wanted[flat][0], strict=True):
            assert found == pytest.approx(known, rel=1e-5), name
        weights = wanted[flat][1]
        assert whole.keys() == weights.keys()
        # Adam divides by the size of gradients, of which some are as small as their rounding.
        assert max(float((whole[key] - weights[key]).abs().max()) for key in weights) < 5e-4, name
        # Evidence of sharding: two moments of each trained number, and a few counts of steps.
        share = 1 if name == "zero0" else 2
        assert held["optimizer"] == pytest.approx(8 * trained / share, rel=0.02), name
        assert held["weights"] == 4 * every // (2 if "3" in name else 1), name


def in_bfloat16(model):
    from swift.parallel.deepspeed.strategy import DeepSpeed

    found = {}
    with join(CPU) as world:
        for name in ("zero0", "zero2", "zero3"):
            config = options(name, bf16=True)
            strategy = DeepSpeed(config, world, CPU, torch.bfloat16)
            policy, _ = start(strategy, config, model, "full", flat=True)
            seen = steps(strategy, policy, range(2), world.rank, world.size, flat=True)
            states = [value for own in strategy.engine.basic_optimizer.state.values() for value in own.items()]
            types, counts = {str(value.dtype) for _, value in states}, {float(value) for key, value in states if key == "step"}
            found[name] = seen, strategy.local_bytes(), types, counts, strategy.whole(policy.model)
    return found


def test_bfloat16_halves_the_weights_and_keeps_moments_in_float32(untied):
    wanted, _ = alone(untied, "full", flat=True)
    for of_rank in run_ranks(2, in_bfloat16, untied):
        for name, (seen, held, types, counts, weights) in of_rank.items():
            assert seen[0][0] == pytest.approx(wanted[0][0], rel=2e-3)  # 8 bits of precision
            assert seen[0][1] == pytest.approx(wanted[0][1], rel=2e-2)
            assert seen[1] == pytest.approx(wanted[1], rel=2e-3), name
            assert held["weights"] == 2 * 39_072 // (2 if name == "zero3" else 1)
            assert types == {"torch.float32"}
            assert counts == {2.0}, name
            same = of_rank["zero2"][4]  # an update is 1e-2 at most, and bfloat16 rounds where it was
            assert sum(float((weights[key].float() - same[key].float()).abs().mean()) for key in weights) / max(len(weights), 1) < 1e-4


def save_and_go_on(model, folder, kinds):
    from swift.parallel.deepspeed.strategy import DeepSpeed

    found = {}
    with join(CPU) as world:
        for name, tuner in kinds:
            config, path = options(name), folder / name / tuner
            strategy = DeepSpeed(config, world, CPU)
            policy, optimizer = start(strategy, config, model, tuner, flat=True)
            steps(strategy, policy, range(2), world.rank, world.size, flat=True)
            optimizer.param_groups[0]["lr"] = 5e-3  # as a schedule would
            if world.is_main:
                path.mkdir(parents=True)
            world.barrier()
            strategy.save(path / "optimizer.pt")
            saved = strategy.whole(policy.model)
            found[name, tuner] = steps(strategy, policy, [2], world.rank, world.size, flat=True), saved, strategy.whole(policy.model)
    return found


def resume(model, folder, kinds, instead=None):
    """``instead`` has for the preset that wrote a checkpoint the one that goes on with it."""
    from swift.parallel.deepspeed.strategy import DeepSpeed

    found = {}
    with join(CPU) as world:
        for name, tuner in kinds:
            config = options((instead or {}).get(name, name))
            strategy = DeepSpeed(config, world, CPU)
            policy, optimizer = start(strategy, config, model, tuner, flat=True)
            strategy.load(folder / name / tuner / "optimizer.pt")
            rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            found[name, tuner] = steps(strategy, policy, [2], world.rank, world.size, flat=True), strategy.whole(policy.model), rates
    return found


def test_a_checkpoint_goes_on_bit_for_bit_and_on_another_number_of_processes_or_stage_1_for_2(untied, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    kinds = [("zero2", "lora"), ("zero3", "full")]
    first, _ = run_ranks(2, save_and_go_on, untied, tmp_path, kinds)
    for name, tuner in kinds:
        folder = tmp_path / name / tuner
        assert (folder / "latest").read_text() == "global_step2"
        assert (folder / "zero_to_fp32.py").is_file()
        saved = first[name, tuner][1]
        consolidated = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        assert consolidated.keys() == {key for key in saved if tuner == "full" or "lora" in key}  # the model's own names
        assert all(torch.equal(consolidated[key], saved[key]) for key in consolidated)
    for size, instead in ((2, {}), (1, {"zero2": "zero1"})):
        again = run_ranks(size, resume, untied, tmp_path, kinds, instead)[0]
        for kind in kinds:
            seen, weights, rates = again[kind]
            wanted, _, known = first[kind]
            assert rates == ([(5e-3, 0.1), (1e-2, 0.0)] if kind[1] == "full" else [(5e-3, 0.1)])
            if size == 2:
                assert seen == wanted
                assert all(torch.equal(weights[key], known[key]) for key in known)
            else:
                assert seen[0] == pytest.approx(wanted[0], rel=1e-6)
                assert max(float((weights[key] - known[key]).abs().max()) for key in known) < 1e-5, kind
    assert not list(tmp_path.rglob("*universal*"))


def load_as(model, folder, deepspeed):
    from swift.parallel.deepspeed.strategy import DeepSpeed

    with join(CPU) as world:
        config = options(deepspeed)
        strategy = DeepSpeed(config, world, CPU)
        start(strategy, config, model, "full", flat=True)
        strategy.load(folder / "optimizer.pt")


def test_a_checkpoint_of_another_stage_is_refused(untied, tmp_path):
    run_ranks(1, save_and_go_on, untied, tmp_path, [("zero2", "full")])
    with pytest.raises(AssertionError, match="it was written by ZeRO stage 2, and this is stage 3"):
        run_ranks(1, load_as, untied, tmp_path / "zero2" / "full", "zero3")


def test_settings_that_deepspeed_does_not_take_together_are_refused_in_one_line(untied, tmp_path):
    together = json.dumps({"zero_optimization": {"stage": 2}, "prescale_gradients": True, "gradient_predivide_factor": 2.0})
    with pytest.raises(AssertionError, match=r"ConfigError: --deepspeed \{\.\.\.\}: DeepSpeed refuses it: gradient_predivide_factor"):
        run_ranks(1, load_as, untied, tmp_path, together)


def test_what_another_package_raises_is_not_said_of_deepspeed():
    from deepspeed import DeepSpeedConfig

    from swift.parallel.deepspeed import package

    wrong = {"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    for call, wanted in ((lambda: DeepSpeedConfig(wrong), True), (lambda: torch.zeros(2).view(3), False)):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            call()
        assert package.has_raised(caught.value) is wanted


def train(model, rows, out, more):
    from swift.api import sft

    given = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "logging_steps": 1}
    given |= {"add_version": False, "report_to": "none", "report_samples": 0, "tuner_type": "full", "deepspeed": "zero3"}
    result = sft(model=str(model), dataset=str(rows), output_dir=str(out), **(given | more))
    return [line for line in result.state.log_history if "loss" in line]


def train_alone(*arguments):
    """As a process that no launcher started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return train(*arguments)


def test_a_run_saves_what_transformers_loads_and_goes_on_in_one_process(untied, rows, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoModelForCausalLM

    straight = run_ranks(2, train, untied, rows, tmp_path / "run", {"max_steps": 4, "save_steps": 2})[0]
    folder = tmp_path / "run" / "checkpoint-2"
    saved = AutoModelForCausalLM.from_pretrained(folder)
    consolidated = AutoModelForCausalLM.from_pretrained(untied)
    ids = torch.arange(4, 40)[None]
    assert not torch.equal(saved(ids).logits, consolidated(ids).logits)
    consolidated.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(folder)))
    assert torch.equal(saved(ids).logits, consolidated(ids).logits)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = run_ranks(1, train_alone, untied, rows, tmp_path / "run", {"max_steps": 4, "resume_from_checkpoint": str(folder)})[0]
    for found, known in zip(again[-2:], straight[-2:], strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert found[key] == pytest.approx(known[key], rel=1e-5), key


def test_lora_on_four_bits_trains_in_parts_as_in_one_process(untied, rows, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")
    given = {"tuner_type": "lora", "lora_dropout": 0.0, "quant_method": "bnb", "quant_bits": 4, "save_strategy": "no"}
    one = run_ranks(1, train, untied, rows, tmp_path / "one", given | {"deepspeed": None, "gradient_accumulation_steps": 2})[0]
    for seen in run_ranks(2, train, untied, rows, tmp_path / "two", given):
        for found, known in zip(seen, one, strict=True):
            assert (found["loss"], found["grad_norm"]) == pytest.approx((known["loss"], known["grad_norm"]), rel=1e-4)


@pytest.mark.slow
def test_the_launcher_of_deepspeed_trains(tiny_model, rows, tmp_path):
    words = "--lora_rank 64 --deepspeed deepspeed_zero3.json --max_steps 2 --per_device_train_batch_size 2 --logging_steps 1"
    words += " --gradient_accumulation_steps 1 --add_version false --report_to none"
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    done = subprocess.run(
        [launcher, "--num_gpus=2", "train.py", "--model", tiny_model, "--dataset", rows, "--output_dir", tmp_path / "out", *words.split()],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"step \d/2  loss", done.stdout)) == 2  # of the main process alone
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-2")
    assert any(parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)
