"""Training in several processes is training in one: the same loss, gradients and weights, of parts that are really parts."""

import json
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot
import peft
import pytest
import transformers.models.llama.modeling_llama
from safetensors.torch import load_file

import swift.parallel.spread
import swift.train.run
from tests.ranks import run_ranks

# What each forked process would import by itself.
PREPARED = (matplotlib.pyplot, peft, transformers.models.llama.modeling_llama, swift.parallel.spread, swift.train.run)
pytestmark = pytest.mark.multi
OPTIONS = {
    "add_version": False,
    "report_to": "none",
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_samples": 0,
    "save_steps": 2,
    "split_dataset_ratio": 0.2,
}


def train(model, rows, out, **options):
    """One run in this process, one of several or alone; what it holds of weights and optimizer, and the logged lines."""
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
    try:
        result = sft(model=str(model), dataset=str(rows), output_dir=str(out), **(OPTIONS | options))
    finally:
        Session.run_to_end = ends
    return {"held": seen, "lines": [line for line in result.state.log_history if "loss" in line or "eval_loss" in line]}


def weights(run: Path, step: int):
    file = next((run / f"checkpoint-{step}").glob("*.safetensors"))
    return load_file(file)


def differs(found, wanted) -> float:
    return max(
        float((found[name].double() - wanted[name].double()).norm() / wanted[name].double().norm().clamp_min(1e-12)) for name in wanted
    )


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("flat", [True, False])
def test_two_and_four_processes_train_as_one(tiny_model, rows, tmp_path, tuner, flat):
    options = {"tuner_type": tuner, "padding_free": flat, "gradient_accumulation_steps": 4}
    options |= {"lora_dropout": 0.0} if tuner == "lora" else {}
    one = train(tiny_model, rows, tmp_path / "one", **options)
    for name, size, more in (
        ("ddp", 2, {"strategy": "ddp"}),
        ("fsdp", 2, {"fsdp": "fsdp2"}),
        ("four", 4, {"fsdp": "full_shard auto_wrap"}),
        ("offload", 2, {"fsdp": "fsdp2", "fsdp_cpu_offload": True, "fsdp_reshard_after_forward": False, "gradient_checkpointing": True}),
    ):
        several = {**options, **more, "gradient_accumulation_steps": 4 // size}
        results = run_ranks(size, _train, (tiny_model, rows, tmp_path / name, several))
        for result in results:
            for found, wanted in zip(result["lines"], one["lines"], strict=True):
                for key in ("loss", "grad_norm", "eval_loss", "token_acc"):
                    if key in wanted:
                        assert found[key] == pytest.approx(wanted[key], rel=2e-5), (name, key)
        assert differs(weights(tmp_path / name, 4), weights(tmp_path / "one", 4)) < 2e-4, name
        whole = sum(parameter.numel() * 4 for parameter in _model(tiny_model).parameters())
        if "fsdp" in more and tuner == "full":
            held = [result["held"] for result in results]
            assert sum(each["weights"] for each in held) == whole
            assert max(each["weights"] for each in held) < 1.1 * whole / size
            assert max(each["optimizer"] for each in held) < 2.2 * whole / size


def _train(arguments):
    model, rows, out, options = arguments
    return train(model, rows, out, **options)


def _model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_run_goes_on_in_another_number_of_processes(tiny_model, rows, tmp_path, tuner):
    options = {"tuner_type": tuner, "gradient_accumulation_steps": 2}
    options |= {"lora_dropout": 0.0} if tuner == "lora" else {}
    run_ranks(2, _train, (tiny_model, rows, tmp_path / "parts", {**options, "fsdp": "fsdp2", "async_save": True}))
    run_ranks(2, _train, (tiny_model, rows, tmp_path / "copies", options))
    assert (tmp_path / "parts/checkpoint-2/optimizer/.metadata").is_file()
    assert (tmp_path / "copies/checkpoint-2/optimizer.pt").is_file()
    wanted = weights(tmp_path / "copies", 4)
    assert differs(weights(tmp_path / "parts", 4), wanted) < 2e-4
    for begun, size, more in (("parts", 4, {"fsdp": "fsdp2"}), ("parts", 1, {}), ("parts", 2, {}), ("copies", 4, {"fsdp": "fsdp2"})):
        out = tmp_path / f"{begun}-{size}-{len(more)}"
        shutil.copytree(tmp_path / begun, out)
        shutil.rmtree(out / "checkpoint-4")
        several = {**options, **more, "resume_from_checkpoint": str(out)}
        run_ranks(size, _train, (tiny_model, rows, out, several))
        assert differs(weights(out, 4), wanted) < 2e-4, (begun, size)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
