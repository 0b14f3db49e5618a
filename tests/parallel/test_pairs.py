"""Pairs in several processes are pairs in one, whichever model they are compared with."""

import json

import pytest

from tests.ranks import run_ranks
from tests.tiny import make_model

pytestmark = pytest.mark.multi
KEYS = ("loss", "grad_norm", "eval_loss", "rewards/margins", "eval_rewards/margins", "logps/chosen")


def train(model, rows, out, options):
    from swift.api import rlhf

    common = dict(add_version=False, report_to="none", max_steps=2, learning_rate=1e-3, logging_steps=1, report_samples=0, eval_steps=2)
    result = rlhf(
        model=str(model),
        dataset=str(rows),
        output_dir=str(out),
        split_dataset_ratio=0.2,
        per_device_train_batch_size=1,
        **(common | options),
    )
    return [{key: line[key] for key in KEYS if key in line} for line in result.state.log_history]


def test_several_processes_compare_as_one(tiny_model, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    with rows.open("w") as file:
        for number in range(11):
            row = {
                "query": f"question {number} of the weather",
                "response": "snow " * (1 + number % 5),
                "rejected_response": f"rain {number}",
            }
            file.write(json.dumps(row) + "\n")
    lora, full = {"lora_dropout": 0.0}, {"tuner_type": "full"}
    # Six pairs of the nine, and three at the end of the epoch: the process with one of them fills the gap, with what must not count.
    one = [
        train(tiny_model, rows, tmp_path / name, {**kind, "gradient_accumulation_steps": 6}) for name, kind in (("l", lora), ("f", full))
    ]
    cases = [(lora, one[0]), ({**lora, "fsdp": "fsdp2"}, one[0]), ({**full, "precompute_ref_log_probs": True}, one[1])]
    cases.append(({**full, "fsdp": "fsdp2"}, one[1]))
    shared = {"gradient_accumulation_steps": 6}  # both processes see the same pairs
    cases.append(({**lora, **shared, "tensor_model_parallel_size": 2}, one[0]))
    cases += [({**full, **shared, name: 2}, one[1]) for name in ("tensor_model_parallel_size", "sequence_parallel_size")]
    # Stages compute the reference first, which is the model without its adapter, or a second one in stages of its own.
    stages = {"pipeline_model_parallel_size": 2}
    cases += [({**full, **shared, **stages, **more}, one[1]) for more in ({}, {"precompute_ref_log_probs": True})]
    four = [({**lora, **stages}, one[0]), ({**lora, **shared, **stages, "fsdp": "fsdp2", "sequence_parallel_size": 2}, one[0])]
    for number, (options, wanted) in enumerate([*cases, *four]):
        given = {"gradient_accumulation_steps": 3, **options}
        for found in run_ranks(2 if number < len(cases) else 4, train, tiny_model, rows, tmp_path / str(number), given):
            assert len(found) == len(wanted) == 3
            for line, expected in zip(found, wanted, strict=True):
                assert line == pytest.approx(expected, rel=2e-4, abs=2e-6), options


def _both(model, rows, out, options):
    """What copies of weights of four bits, and parts of them, log."""
    return [train(model, rows, out / str(len(more)), {**options, **more}) for more in ({}, {"fsdp": "fsdp2"})]


def test_pairs_on_weights_of_four_bits_compare_as_one(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    with rows.open("w") as file:
        for number in range(16):
            row = {"query": f"question {number}", "response": "snow " * (1 + number % 5), "rejected_response": f"rain {number}"}
            file.write(json.dumps(row) + "\n")
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    options = {"quant_bits": 4, "lora_dropout": 0.0, "max_steps": 2, "eval_steps": 2}
    wanted = train(model, rows, tmp_path / "one", {**options, "gradient_accumulation_steps": 4})
    for both in run_ranks(2, _both, model, rows, tmp_path, {**options, "gradient_accumulation_steps": 2}):
        for found in both:
            for line, expected in zip(found, wanted, strict=True):
                assert line == pytest.approx(expected, rel=2e-4, abs=2e-6)
