"""Steps that compute in 16 bits do in two processes what they do in one, loss scale and all."""

import pytest

from tests.parallel.test_ranks import train
from tests.ranks import run_ranks

COMMON = {"max_steps": 2, "learning_rate": 1e-3}
HALF = {"tuner_type": "full", "fp16": True}  # a step is left out if its gradients overflow the first loss scale
KINDS = {"scaled": HALF, "bfloat16": {"torch_dtype": "bfloat16", "lora_dropout": 0.0}}
SPREAD = {"copies": {}, "parts": {"fsdp": "fsdp2"}, "layers": {"tensor_model_parallel_size": 2}}


def _runs(model, rows, folder):
    found = {}
    for kind, options in KINDS.items():
        for name, more in SPREAD.items():
            several = {"gradient_accumulation_steps": 2 if name == "layers" else 1}
            found[kind, name] = train(model, rows, folder / f"{kind} {name}", **COMMON, **several, **options, **more)["lines"]
    return found


@pytest.mark.multi
def test_sixteen_bits_in_two_processes_are_those_of_one(tiny_model, rows, tmp_path):
    wanted = {
        kind: train(tiny_model, rows, tmp_path / kind, **COMMON, gradient_accumulation_steps=2, **more) for kind, more in KINDS.items()
    }
    for found in run_ranks(2, _runs, tiny_model, rows, tmp_path):
        for (kind, name), lines in found.items():
            for line, expected in zip(lines, wanted[kind]["lines"], strict=True):
                for key in {"loss", "grad_norm", "learning_rate", "eval_loss"} & expected.keys():
                    assert line[key] == pytest.approx(expected[key], rel=2e-3), (kind, name, key)
