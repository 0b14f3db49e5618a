"""Tasks that are evaluated while training leave no trace in it, and their numbers are those of the model at that step."""

import gc
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from swift.config.evaluate import EvalConfig
from swift.config.options import of_checkpoint
from swift.errors import ConfigError, DataError, ModelError
from tests.train.conftest import losses, metrics

QUESTIONS = [
    ("what falls in winter", ["snow", "sand", "the sea"], 0),
    ("who walks slowly on ice", ["the wind", "everybody", "nobody at all"], 1),
    ("what melts in spring", ["roads", "iron", "snow and ice"], 2),
    ("what is cold", ["frost", "fire", "summer"], 0),
    ("what is white", ["coal", "snow", "night"], 1),
]


def declare(folder, name="winter", **changes):
    """The options that evaluate a task of five questions, which are written to ``folder``; ``changes`` are of its declaration."""
    lines = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    declared = {
        "name": name,
        "title": "Winter",
        "licence": "CC0-1.0",
        "source": {"layouts": [{"splits": {"test": [f"{name}.jsonl"]}}]},
        "split": "test",
        "modes": {"choice": {"prompt": "Question: {{ question }}\nAnswer:", "choices": "choices", "gold": "answer"}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(declared | changes), encoding="utf-8")
    return dict(eval_dataset=[str(path)], eval_data_dir=str(folder), eval_steps=2, eval_on_start=True)


def declare_two(folder):
    """A task whose answers are scored, and one whose answers are written."""
    mode = {"prompt": "Q: {{ question }}", "gold": "choices[answer]", "max_new_tokens": 5, "extract": "text"}
    scored, written = declare(folder), declare(folder, "written", modes={"generate": mode})
    return scored | {"eval_dataset": scored["eval_dataset"] + written["eval_dataset"]}


@pytest.fixture
def tasks(tmp_path):
    return declare_two(tmp_path)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run of five steps without validation rows, with tasks at steps 0, 2, 4 and 5, and a checkpoint at each of these."""
    from swift.api import sft

    folder = tmp_path_factory.mktemp("finished")
    row = {"messages": [{"role": "user", "content": "what falls"}, {"role": "assistant", "content": "snow and ice"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return sft(
        model=str(tiny_model),
        dataset=str(folder / "rows.jsonl"),
        output_dir=str(folder / "run"),
        add_version=False,
        report_to="none",
        tuner_type="full",
        learning_rate=1e-2,
        max_steps=5,
        save_steps=2,
        logging_steps=1,
        report_samples=0,
        load_best_model_at_end=True,
        **declare_two(folder),
    )


def weights(result):
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(path for name in names if (path := result.checkpoint / name).exists()))


@pytest.mark.parametrize(
    "options",
    [
        dict(tuner_type="full", learning_rate=1e-3),
        dict(lora_dropout=0),  # the update is inside the weights
        dict(lora_dropout=0.05, packing=True, max_length=64),
        dict(lora_dropout=0.05, padding_free=False),
        dict(bf16=True),
        dict(torch_dtype="bfloat16", lora_dropout=0),
        dict(gradient_checkpointing=True, neftune_noise_alpha=5.0),
        dict(quant_method="bnb", quant_bits=4),
    ],
    ids=str,
)
def test_training_with_tasks_is_training_without_them_bit_for_bit(run, tasks, options):
    options |= dict(max_steps=3)
    without, with_tasks = run("without", **options), run("with", **options, **tasks)
    assert losses(with_tasks) == losses(without)
    expected, found = weights(without), weights(with_tasks)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_the_numbers_are_logged_at_each_evaluation_and_are_those_of_the_checkpoint(finished):
    found = {line["step"]: line for line in metrics(finished) if "eval_winter_acc" in line}
    assert list(found) == [0, 2, 4, 5]
    for step in (2, 4, 5):
        assert found[step]["eval_winter_acc"] == by_hand(finished.run / f"checkpoint-{step}"), step
    assert found[5]["eval_winter_acc_low"] <= found[5]["eval_winter_acc"] <= found[5]["eval_winter_acc_high"]
    line = json.loads((finished.run / "logging.jsonl").read_text().splitlines()[0])
    assert line["eval_winter_acc"] == pytest.approx(found[0]["eval_winter_acc"])


def by_hand(checkpoint):
    """The share of questions whose right choice is the likeliest text, by transformers alone, one text after the other."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    right = 0
    for question, choices, answer in QUESTIONS:
        totals = []
        for choice in choices:
            prompt = f"Question: {question}\nAnswer:"
            start = len(tokenizer(prompt).input_ids)
            ids = torch.tensor([tokenizer(f"{prompt} {choice}").input_ids])
            with torch.no_grad():
                logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            totals.append(float(logprobs.gather(1, ids[0, start:, None]).sum()))
        right += max(range(len(choices)), key=totals.__getitem__) == answer
    return right / len(QUESTIONS)


def test_without_validation_rows_the_tasks_alone_are_evaluated_and_choose_the_best(finished):
    lines = [line for line in metrics(finished) if "eval_winter_acc" in line]
    assert not any("eval_loss" in line for line in lines)
    best = max(lines[1:], key=lambda line: line["eval_winter_acc"])
    assert (finished.state.best_step, finished.state.best_metric) == (best["step"], best["eval_winter_acc"])
    assert finished.checkpoint.name == f"checkpoint-{best['step']}"


def test_with_validation_rows_both_are_evaluated_and_the_loss_chooses(run, tasks):
    result = run(**tasks, split_dataset_ratio=0.2)
    lines = [line for line in metrics(result) if "eval_loss" in line]
    assert all("eval_winter_acc" in line for line in lines)
    assert result.state.best_metric == min(line["eval_loss"] for line in lines[1:])


def test_the_metric_of_a_task_chooses_the_best_although_there_are_validation_rows(run, tasks):
    result = run(**tasks, split_dataset_ratio=0.2, metric_for_best_model="written_acc")
    assert result.state.best_metric == max(line["eval_written_acc"] for line in metrics(result) if line.get("eval_written_acc") is not None)


def test_a_task_without_gain_ends_the_run(run, tasks):
    result = run(**tasks, early_stop_interval=1, learning_rate=0, max_steps=20)
    assert result.state.global_step == 4


def test_the_report_has_a_table_with_intervals_and_a_plot(finished):
    text = (finished.run / "report.md").read_text(encoding="utf-8")
    first = next(line for line in metrics(finished) if "eval_winter_acc" in line)
    interval = f"{first['eval_winter_acc']:.4f} [{first['eval_winter_acc_low']:.4f}, {first['eval_winter_acc_high']:.4f}] at step 0"
    assert f"| winter_acc | {interval} |" in text
    assert "| written_acc |" in text
    assert (finished.run / "tasks.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_with_tasks_is_the_uninterrupted_one_bit_for_bit(run, tasks):
    options = dict(tasks, save_steps=2, max_steps=4)
    whole, part = run("whole", **options), run("part", **options)
    shutil.move(part.run / "checkpoint-4", part.run.parent / "lost")  # as if it had been killed after step 3
    resumed = run("part", **options, resume_from_checkpoint=str(part.run))
    assert untimed(metrics(resumed)) == untimed(metrics(whole))
    assert (resumed.run / "report.md").read_text().count("at step 0") == 2


def untimed(lines):
    return [{name: value for name, value in line.items() if not name.endswith(("runtime", "per_s"))} for line in lines]


def test_an_evaluation_leaves_no_tensor_in_memory_and_each_module_as_it_was(run, tasks, monkeypatch):
    from swift.train import run as module

    found = []

    def watched(live, loaded, model, **options):
        evaluate(live, loaded, model, **options)  # what is made once and kept, such as masks, is there now
        before = tensors(), state(model)
        values = evaluate(live, loaded, model, **options)
        found.append((tensors(), state(model)) == before)
        return values

    evaluate = module.evaluate_tasks
    monkeypatch.setattr(module, "evaluate_tasks", watched)
    run(**tasks, tuner_type="full", padding_free=False, max_steps=2)
    assert found == [True, True]


def tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def state(model):
    modes = [module.training for module in model.modules()]
    return modes, model.config._attn_implementation, model.config.use_cache, torch.get_rng_state().tolist()


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """A run that must end with an error before it loads weights or writes anything."""

    def start(error, words, **options):
        monkeypatch.setattr("swift.train.run.load_for_training", lambda *_: pytest.fail("the model is loaded"))
        with pytest.raises(error, match=words):
            run("refused", **options)
        assert not (tmp_path / "refused").exists()

    return start


def test_an_unknown_task_is_refused_before_the_model_loads(refused):
    refused(ConfigError, "mmul", eval_dataset=["mmul"])


def test_missing_data_are_refused_before_the_model_loads(refused, tasks, tmp_path):
    (tmp_path / "winter.jsonl").unlink()
    refused(DataError, "no data of task winter", **tasks)


def test_a_missing_column_is_refused_before_the_model_loads(refused, tasks, tmp_path):
    (tmp_path / "winter.jsonl").write_text('{"question": "q", "answer": 0}\n', encoding="utf-8")
    refused(DataError, "column 'choices' is missing", **tasks)


def test_images_for_a_model_that_reads_text_are_refused_before_the_model_loads(refused, tmp_path):
    mode = {"prompt": "{{ question }}", "gold": "choices[answer]", "extract": "text", "arguments": {"images": "['a.png']"}}
    refused(ModelError, "the model reads text only", **declare(tmp_path, modes={"generate": mode}))


def test_an_unknown_metric_is_refused_before_the_model_loads(refused, tasks):
    refused(ConfigError, "does not know 'winter_accuracy'", **tasks, metric_for_best_model="winter_accuracy")


def test_the_loss_cannot_choose_without_validation_rows(refused, tasks):
    refused(ConfigError, "loss needs validation data", **tasks, metric_for_best_model="loss")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(eval_limit=3), "--eval_limit has no effect without --eval_dataset"),
        (dict(eval_use_evalscope=True), "--eval_use_evalscope true needs tasks"),
        (dict(eval_dataset=["mmlu"], eval_strategy="no"), "--eval_dataset has no effect with --eval_strategy no"),
        (dict(eval_dataset=["mmlu"], do_eval=False), "--eval_dataset has no effect with --do_eval false"),
        (dict(metric_for_best_model="mmlu_acc"), "--metric_for_best_model does not know 'mmlu_acc'"),
    ],
    ids=str,
)
def test_options_that_cannot_go_together_are_refused(run, options, words):
    with pytest.raises(ConfigError, match=words):
        run(**options)


def test_the_option_of_ms_swift_is_accepted_and_says_what_happens(run, tasks, capsys):
    result = run(**tasks, eval_use_evalscope=True, max_steps=1)
    assert "--eval_use_evalscope true is not needed" in capsys.readouterr().err
    assert any("eval_winter_acc" in line for line in metrics(result))


def test_tasks_of_a_run_are_no_options_of_its_later_evaluation():
    saved = {"eval_dataset": ["mmlu"], "eval_limit": 2, "eval_mode": "letter", "torch_dtype": "float32"}
    assert of_checkpoint(EvalConfig, saved) == {"torch_dtype": "float32"}


def test_a_dry_run_reads_the_tasks_and_says_so(run, tasks, capsys):
    assert run(**tasks, dry_run=True) is None
    assert "winter: 5 examples, choice, 0 solved before each" in capsys.readouterr().out


def test_a_perplexity_is_better_when_it_is_lower(run, tmp_path):
    result = run(**declare(tmp_path, modes={"perplexity": {"text": "{{ question }}"}}), max_steps=4)
    values = [line["eval_winter_perplexity"] for line in metrics(result) if "eval_winter_perplexity" in line]
    assert len(values) == 3
    assert all(math.isfinite(value) for value in values)
    assert result.state.best_metric == min(values[1:])
