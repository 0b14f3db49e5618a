"""One thread, one cache below a temporary folder, no hub: the same for every test."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

from tests.tiny import make_model


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SWIFT_CACHE of the whole session, unless one is given (slow tests then reuse converted models)."""
    root = tmp_path_factory.mktemp("cache")
    os.environ.setdefault("SWIFT_CACHE", str(root))
    return Path(os.environ["SWIFT_CACHE"])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with its tokenizer and a ChatML template."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def rows(tmp_path):
    """40 short conversations of unequal length."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(40):
            answer = " ".join(["snow"] * (1 + number % 7)) + f" {number}"
            file.write(
                json.dumps({"messages": [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]})
                + "\n"
            )
    return path


@pytest.fixture
def run(tiny_model, rows, tmp_path):
    """Train the tiny model on ``rows``; options override the defaults. Returns the TrainResult."""

    from swift.api import sft

    def start(name="run", **options):
        defaults = dict(
            model=str(tiny_model),
            dataset=str(rows),
            output_dir=str(tmp_path / name),
            add_version=False,
            report_to="none",
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_samples=0,
        )
        return sft(**(defaults | options))

    return start
