"""swift eval from the command to the report, on small models."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from swift import cli
from swift.config.commands import EvalConfig
from swift.config.options import build
from swift.errors import ConfigError, DataError, HubError, MachineError
from swift.evaluate.base import About, Outcome
from swift.evaluate.results import TaskFile, read
from swift.evaluate.run import run_eval
from swift.evaluate.subject import subjects
from swift.model.load import load_model
from tests.evaluate.rows import make_mmlu, write
from tests.tiny import make_model


def evaluate(*models: Path, data: Path, out: Path, **options: Any) -> Any:
    given = {"models": [str(model) for model in models], "eval_dataset": ["mmlu"], "eval_data_dir": str(data), "eval_num_fewshot": 0}
    return run_eval(build(EvalConfig, ("argument", given | {"eval_output_dir": str(out), "device": "cpu"} | options)))


def lines_of(out: Path) -> dict[str, list[Any]]:
    return {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(out.glob("items/*/*.jsonl"))}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_mmlu(tmp_path / "mmlu")


def test_the_likeliest_letters_are_those_of_the_model_itself(tmp_path: Path, model: Path, data: Path) -> None:
    found = evaluate(model, data=data, out=tmp_path / "out", eval_num_fewshot=1)
    [result] = found.models[0].tasks
    loaded = load_model(model, device="cpu")
    for outcome in result.outcomes:
        context = loaded.tokenizer(outcome.prompt, add_special_tokens=False).input_ids
        letters = [loaded.tokenizer(outcome.prompt + f" {letter}", add_special_tokens=False).input_ids for letter in "ABCD"]
        totals = []
        for ids in letters:
            with torch.inference_mode():
                logps = loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            totals.append(sum(float(logps[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        assert outcome.detail["logprobs"] == pytest.approx(totals, abs=1e-4)
        assert outcome.prediction == "ABCD"[max(range(4), key=totals.__getitem__)]
    assert [outcome.category for outcome in result.outcomes] == ["astronomy", "astronomy", "marketing"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["items", "report.html", "report.json", "report.md"]


def test_models_are_compared_with_the_first_on_the_same_examples(tmp_path: Path, model: Path, data: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    evaluate(model, other, data=data, out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["name"] for entry in report["models"]] == [str(model), str(other)]
    [comparison] = report["comparisons"]
    assert (comparison["first"], comparison["second"]) == (str(model), str(other))
    assert sum(comparison["counts"].values()) == 3


def test_what_is_answered_is_not_asked_again(tmp_path: Path, model: Path, data: Path, capsys: Any) -> None:
    evaluate(model, data=data, out=tmp_path / "out")
    [(name, lines)] = lines_of(tmp_path / "out").items()
    [path] = (tmp_path / "out").glob(f"items/*/{name}")
    cut = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(cut[:3]) + cut[3][:20])  # killed while the third answer was written
    before = (tmp_path / "out" / "report.json").read_text()
    (tmp_path / "out" / "report.json").unlink()
    again = evaluate(model, data=data, out=tmp_path / "out")
    assert "2 of 3 examples are answered already" in capsys.readouterr().out
    assert lines_of(tmp_path / "out")[name] == lines
    assert again.models[0].tasks[0].facts["asked_now"] == 1
    values = [json.loads(text)["tasks"][0]["results"][0]["value"] for text in (before, (tmp_path / "out" / "report.json").read_text())]
    assert values[0] == values[1]


def test_texts_with_any_character_are_read_back(tmp_path: Path) -> None:
    about = About("t", "T", "generate", "acc", 0, False, "", "", "d")
    text = "line\u2028separator, next\x85line, half a pair \ud83d, \r and \n"
    file = TaskFile(tmp_path / "t.jsonl", about, {"digest": "m"})
    with file.appending():
        file.add(Outcome("1", "", text, "", None, {"acc": 1.0}, {"answer": text}))
        file.add(Outcome("2", "", "plain", "", None, {"acc": 0.0}))
        other = TaskFile(tmp_path / "t.jsonl", about, {"digest": "m"})
        with pytest.raises(MachineError, match="another evaluation answers the same questions"), other.appending():
            pass
    assert TaskFile(tmp_path / "t.jsonl", about, {"digest": "m"}).done == file.done
    with other.appending():
        other.add(Outcome("2", "", "plain", "", None, {"acc": 0.0}))
    assert len(read(tmp_path / "t.jsonl")[1]) == 2
    with pytest.raises(DataError, match="answers to other questions"):
        TaskFile(tmp_path / "t.jsonl", about, {"digest": "another"})
    (tmp_path / "t.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="is no file of answers"):
        TaskFile(tmp_path / "t.jsonl", about, {"digest": "m"})


def test_other_questions_or_another_model_have_files_of_their_own(tmp_path: Path, model: Path, data: Path) -> None:
    out = tmp_path / "out"
    evaluate(model, data=data, out=out)
    evaluate(model, data=data, out=out, eval_num_fewshot=1)
    write(data / "test" / "marketing_test.csv", "What is dear?,A price,A tree,A cloud,A fish,A\n")
    evaluate(model, data=data, out=out)
    make_model(model, seed=2)
    evaluate(model, data=data, out=out)
    assert len(lines_of(out)) == 3
    assert len(list((out / "items").iterdir())) == 2


def test_answers_to_prompts_that_were_cut_are_not_those_of_whole_ones(tmp_path: Path, model: Path, data: Path) -> None:
    cut = evaluate(model, data=data, out=tmp_path / "out", eval_num_fewshot=1, max_model_len=40).models[0].tasks[0]
    whole = evaluate(model, data=data, out=tmp_path / "out", eval_num_fewshot=1).models[0].tasks[0]
    assert [outcome.detail.get("notes", {}) for outcome in whole.outcomes] == [{}, {}, {}]
    assert all(outcome.detail["notes"]["shots_left_out"] == 1 for outcome in cut.outcomes)


@pytest.mark.parametrize(
    ("options", "is_another"),
    [
        ({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "fp4"}, True),
        ({"infer_backend": "openvino", "openvino_weight_format": "int8"}, True),
        ({"infer_backend": "remote", "remote_url": "http://127.0.0.1:2"}, True),
        ({"infer_backend": "remote", "remote_url": "http://127.0.0.1:1", "remote_timeout_s": 5}, False),
        ({"max_batch_size": 2}, False),
    ],
)
def test_options_that_change_answers_make_another_model(model: Path, options: dict[str, Any], is_another: bool) -> None:
    def digest(**given: Any) -> str:
        said = {"models": [str(model)], "eval_dataset": ["mmlu"], **given}
        return str(subjects(build(EvalConfig, ("argument", said)))[0].facts["digest"])

    plain = {name: value for name, value in options.items() if name in ("quant_method", "quant_bits", "infer_backend")}
    if "remote_url" in options:
        plain["remote_url"] = "http://127.0.0.1:1"
    assert (digest(**plain) != digest(**options)) is is_another


def test_a_smaller_limit_takes_what_was_answered(tmp_path: Path, model: Path, data: Path) -> None:
    evaluate(model, data=data, out=tmp_path / "out")
    fewer = evaluate(model, data=data, out=tmp_path / "out", eval_limit=1)
    assert [outcome.category for outcome in fewer.models[0].tasks[0].outcomes] == ["astronomy", "marketing"]
    assert fewer.models[0].tasks[0].facts["asked_now"] == 0


def test_an_earlier_report_is_a_baseline(tmp_path: Path, model: Path, data: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    evaluate(other, data=data, out=tmp_path / "before")
    evaluate(model, data=data, out=tmp_path / "now", eval_baseline=[str(tmp_path / "before")])
    report = json.loads((tmp_path / "now" / "report.json").read_text())
    assert [entry["is_baseline"] for entry in report["models"]] == [False, True]
    assert len(report["comparisons"]) == 1


def test_training_data_that_contain_the_test_are_named(tmp_path: Path, model: Path, data: Path) -> None:
    question = "Which of these is hot, and far away, and seen by all of us on each clear day?"
    write(data / "test" / "astronomy_test.csv", f'"{question}",Ice,Snow,The Sun,Rain,C\n')
    train = write(tmp_path / "train.jsonl", json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
    evaluate(model, data=data, out=tmp_path / "out", eval_train_dataset=[str(train)])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "astronomy" in json.dumps(report["contamination"])


def test_answers_are_written_and_kept(tmp_path: Path, model: Path, data: Path) -> None:
    found = evaluate(model, data=data, out=tmp_path / "out", eval_mode="generate", max_new_tokens=4, eval_limit=1)
    outcomes = found.models[0].tasks[0].outcomes
    assert len(outcomes) == 2
    assert all("answer" in outcome.detail and outcome.metrics["acc"] in (0.0, 1.0) for outcome in outcomes)


@pytest.mark.parametrize(
    ("options", "problem", "said"),
    [
        ({"eval_dataset": ["mmlo"]}, ConfigError, "mmlo"),
        ({"eval_mode": "perplexity"}, ConfigError, "has no mode perplexity"),
        ({"eval_data_dir": "nowhere"}, (DataError, ConfigError, HubError), "nowhere"),
        ({"models": ["no/such/folder"]}, (ConfigError, HubError), "no/such/folder"),
        ({"eval_baseline": ["no-report"]}, DataError, "no-report holds no report"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    tmp_path: Path, model: Path, data: Path, options: dict[str, Any], problem: Any, said: str
) -> None:
    given = {"models": [str(model)], "eval_dataset": ["mmlu"], "eval_data_dir": str(data), "eval_output_dir": str(tmp_path / "out")}
    with pytest.raises(problem, match=said):
        run_eval(build(EvalConfig, ("argument", given | {"offline": True} | options)))
    assert not (tmp_path / "out").exists()


def test_a_model_named_twice_is_refused(tmp_path: Path, model: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="is named twice"):
        evaluate(model, model, data=data, out=tmp_path / "out")


def test_tasks_are_listed(capsys: Any) -> None:
    cli.run(["eval", "--list_tasks", "true"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("mmlu", "ceval", "gsm8k", "humaneval"))


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(tmp_path: Path, model: Path, data: Path) -> None:
    rows = "".join(f"Is {number} a number of many digits or few?,Yes,No,Both,None,A\n" for number in range(3000))
    write(data / "test" / "astronomy_test.csv", rows)
    command = [
        sys.executable,
        "-m",
        "swift.cli",
        "eval",
        str(model),
        "--eval_dataset",
        "mmlu",
        "--eval_data_dir",
        str(data),
        "--eval_num_fewshot",
        "0",
    ]
    running = subprocess.Popen(
        [*command, "--eval_output_dir", str(tmp_path / "out"), "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a test run in the background ignores it
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(len(lines) > 20 for lines in _texts(tmp_path / "out")):
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "the same command goes on there" in said
    [lines] = _texts(tmp_path / "out")
    assert all(json.loads(line) for line in lines) and len(lines) < 3000


def _texts(out: Path) -> list[list[str]]:
    return [path.read_text().splitlines() for path in out.glob("items/*/*.jsonl")]
