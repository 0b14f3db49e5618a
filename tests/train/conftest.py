import json

import pytest

from swift.api import sft


@pytest.fixture
def rows(tmp_path):
    """40 short conversations of unequal length."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(40):
            answer = " ".join(["snow"] * (1 + number % 7)) + f" {number}"
            file.write(json.dumps({"messages": [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]}) + "\n")
    return path


@pytest.fixture
def run(tiny_model, rows, tmp_path):
    """Train the tiny model on ``rows``; options override the defaults. Returns the TrainResult."""

    def start(name="run", **options):
        defaults = dict(
            model=str(tiny_model), dataset=str(rows), output_dir=str(tmp_path / name), add_version=False, report_to="none",
            max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_samples=0,
        )
        return sft(**(defaults | options))

    return start


def metrics(result):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    clock = {"tokens_per_s", "supervised_tokens_per_s", "memory(GiB)", "eval_runtime"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def losses(result):
    return [line["loss"] for line in metrics(result) if "loss" in line]
