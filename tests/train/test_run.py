import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swift import audit
from swift.errors import CheckpointError, ConfigError, DataError, MachineError, TrainingError
from swift.train.rundir import RunDirectory
from tests.train.conftest import losses, metrics


def adapter(result, step=None):
    path = result.checkpoint if step is None else result.run / f"checkpoint-{step}"
    return load_file(path / "adapter_model.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_lowers_the_loss(run):
    values = losses(run(max_steps=20, tuner_type="full"))
    assert values[-1] < 0.5 * values[0]


def test_the_loss_does_not_depend_on_how_a_step_is_cut(run):
    by_cut = [
        losses(run(f"cut{batch}", per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, lora_dropout=0))
        for batch in (8, 4, 1)
    ]
    torch.testing.assert_close(torch.tensor(by_cut[1]), torch.tensor(by_cut[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(by_cut[2]), torch.tensor(by_cut[0]), rtol=1e-5, atol=1e-5)


def test_two_runs_are_equal_bit_for_bit(run):
    assert_same_bits(adapter(run("a")), adapter(run("b")))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, rows):
    options = dict(save_steps=2, split_dataset_ratio=0.2, logging_steps=3, max_steps=8)
    whole = run("whole", **options)
    part = run("part", **options)
    for step in (6, 8):  # as if it had been killed after step 5
        (part.run / f"checkpoint-{step}").rename(part.run.parent / f"lost-{step}")
    resumed = run("part", **options, resume_from_checkpoint=str(part.run))
    assert_same_bits(adapter(resumed), adapter(whole))
    assert metrics(resumed) == metrics(whole)


def test_resuming_takes_its_options_from_the_run(run, tmp_path):
    from swift.api import sft

    whole = run("whole", save_steps=3)
    part = run("part", save_steps=3)
    (part.run / "checkpoint-6").rename(tmp_path / "lost")
    resumed = sft(resume_from_checkpoint=str(part.run))
    assert_same_bits(adapter(resumed), adapter(whole))


def test_full_training_resumes_bit_for_bit(run):
    options = dict(tuner_type="full", save_steps=3, learning_rate=1e-3)
    whole, part = run("whole", **options), run("part", **options)
    (part.run / "checkpoint-6").rename(part.run.parent / "lost")
    resumed = run("part", **options, resume_from_checkpoint=str(part.run))
    assert_same_bits(load_file(resumed.checkpoint / "model.safetensors"), load_file(whole.checkpoint / "model.safetensors"))


def test_a_checkpoint_loads_in_plain_peft_with_the_same_logits(run, tiny_model):
    from swift.config.commands import InferConfig
    from swift.config.options import build
    from swift.engine.load import load_for_inference

    result = run()
    ids = torch.arange(4, 24).unsqueeze(0)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), result.checkpoint).eval()
    ours = load_for_inference(build(InferConfig, ("argument", {"adapters": str(result.run)}))).model
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=0, atol=0)


def test_a_full_checkpoint_loads_in_plain_transformers(run):
    result = run(tuner_type="full", learning_rate=1e-3)
    model = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert torch.isfinite(model(torch.arange(4, 12).unsqueeze(0)).logits).all()


def test_the_first_step_is_the_one_of_torch_alone(run, tiny_model, rows):
    """Loss and gradient norm of step 1, computed with transformers' own loss over the same rows in one batch."""
    from transformers import AutoTokenizer

    result = run(tuner_type="full", per_device_train_batch_size=40, gradient_accumulation_steps=1, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    loss_sum, count = 0.0, 0
    for line in map(json.loads, rows.read_text().splitlines()):
        question, answer = line["messages"]
        prompt = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt + answer["content"] + "<|im_end|>", add_special_tokens=False).input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        newline = tokenizer("\n", add_special_tokens=False).input_ids
        logits = model(torch.tensor([ids + newline])).logits[0, start - 1 : len(ids) - 1]
        loss_sum = loss_sum + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum")
        count += len(ids) - start
    (loss_sum / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    line = metrics(result)[0]
    assert line["loss"] == pytest.approx(float(loss_sum.detach()) / count, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_run_directory_holds_everything_and_its_audit_verifies(run):
    result = run(save_steps=3, split_dataset_ratio=0.2, report_samples=1)
    names = {path.name for path in result.run.iterdir()}
    wanted = {
        "args.json",
        "config.yaml",
        "metrics.jsonl",
        "logging.jsonl",
        "loss.png",
        "report.md",
        "plan.json",
        "rejected.jsonl",
        "audit.jsonl",
    }
    assert wanted | {"checkpoint-3", "checkpoint-6"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    inner = {"args.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_config.json", "adapter_model.safetensors"}
    assert inner <= {path.name for path in (result.run / "checkpoint-3").iterdir()}
    assert audit.verify(result.run / "audit.jsonl") == 4  # start, two checkpoints, end
    assert "Expected" in (result.run / "report.md").read_text()
    line = json.loads((result.run / "logging.jsonl").read_text().splitlines()[0])
    assert line["global_step/max_steps"] == "1/6"
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "token_acc",
        "epoch",
        "elapsed_time",
        "remaining_time",
        "train_speed(s/it)",
    } <= line.keys()


def test_old_checkpoints_go_and_the_best_and_the_last_stay(run):
    saving = dict(save_steps=1, eval_steps=1, save_total_limit=2, create_checkpoint_symlink=True)
    result = run(**saving, split_dataset_ratio=0.2, max_steps=8, learning_rate=0.0, lora_dropout=0)
    assert result.state.best_step == 1  # nothing is learned, so that it stays the best
    kept = {path.name for path in result.run.glob("checkpoint-*")}
    assert {f"checkpoint-{result.state.best_step}", "checkpoint-8"} <= kept
    assert len(kept) == 2
    assert (result.run / "best").resolve().name == f"checkpoint-{result.state.best_step}"
    assert (result.run / "last").resolve().name == "checkpoint-8"


def test_early_stopping_ends_after_evaluations_without_gain(run):
    result = run(
        max_steps=50, learning_rate=0.0, eval_steps=1, save_steps=50, split_dataset_ratio=0.2, early_stop_interval=2, lora_dropout=0
    )
    assert result.state.global_step == 3  # the first evaluation is the best, two bring no gain


def test_the_best_checkpoint_can_be_the_result(run):
    result = run(max_steps=6, eval_steps=1, save_steps=1, split_dataset_ratio=0.2, load_best_model_at_end=True, learning_rate=0.5)
    assert result.checkpoint.name == f"checkpoint-{result.state.best_step}"


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"]
)
def test_every_schedule_runs(run, name):
    assert len(losses(run(lr_scheduler_type=name, warmup_steps=2, max_steps=3))) == 3


def test_the_rate_rises_in_the_warm_up_and_falls_along_the_cosine(run):
    rates = [line["learning_rate"] for line in metrics(run(max_steps=6, warmup_steps=2, learning_rate=1.0))]
    # warm-up: 0, 1/2; then (1 + cos(pi * k / 4)) / 2 for k = 0..3
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0, 0.5, 1, 0.8535534, 0.5, 0.1464466]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"torch_dtype": "bfloat16"}, {"bf16": True}, {"fp16": True}, {"torch_dtype": "float16", "tuner_type": "full"}]
)
def test_16_bit_training_stays_near_float32(run, options):
    tuner = {"tuner_type": options.pop("tuner_type", "lora")}
    rate = {"learning_rate": 1e-3}
    exact, rounded = losses(run("a", **tuner, **rate)), losses(run("b", **tuner, **rate, **options))
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(exact), rtol=2e-2, atol=0)


def test_gradient_checkpointing_changes_nothing(run):
    assert_same_bits(adapter(run("a", gradient_checkpointing=True)), adapter(run("b", gradient_checkpointing=False)))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_every_optimizer_resumes_bit_for_bit(run, optim):
    options = dict(optim=optim, save_steps=3)
    whole, part = run("whole", **options), run("part", **options)
    (part.run / "checkpoint-6").rename(part.run.parent / "lost")
    assert_same_bits(adapter(run("part", **options, resume_from_checkpoint=str(part.run))), adapter(whole))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lorap_lr_ratio": 16},
        {"target_modules": ["q_proj"]},
        {"target_regex": r".*\.v_proj"},
        {"neftune_noise_alpha": 5},
        {"lora_bias": "all"},
        {"group_by_length": True},
    ],
)
def test_every_variant_trains(run, options):
    values = losses(run(max_steps=15, **options))
    assert values[-1] < values[0]


def test_frozen_parameters_do_not_move(run, tiny_model):
    result = run(tuner_type="full", learning_rate=1e-2, freeze_parameters_ratio=1.0, trainable_parameters=["model.layers.1"])
    before, after = load_file(tiny_model / "model.safetensors"), load_file(result.checkpoint / "model.safetensors")
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.layers.1") for name in moved)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_rows(run, tiny_model, tmp_path):
    import shutil

    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"].fill_(float("nan"))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"bad-step-1\.json") as caught:
        run(model=str(broken))
    dumped = json.loads((tmp_path / "run" / "bad-step-1.json").read_text())
    assert len(dumped["rows"]) == 8
    assert "question" in dumped["rows"][0]["text"]
    assert caught.value.exit_code == 1


def test_rows_side_by_side_are_left_each_by_itself_and_whole(run, tmp_path):
    with pytest.raises(TrainingError, match=r"bad-step-2\.json"):
        run(tuner_type="full", learning_rate=1e30, lr_scheduler_type="constant")
    dumped = json.loads((tmp_path / "run" / "bad-step-2.json").read_text())
    assert len(dumped["rows"]) == 8
    for row in dumped["rows"]:
        assert row["text"].startswith("<|im_start|>user\nquestion")
        assert row["text"].count("<|im_start|>") == 2
        trained = [(token, label) for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert trained and all(token == label for token, label in trained)


def test_a_run_directory_in_use_is_refused(run, tmp_path):
    with RunDirectory(tmp_path / "run"), pytest.raises(MachineError, match="in use"):
        run()


def test_a_finished_run_is_not_overwritten(run):
    run()
    with pytest.raises(CheckpointError, match="holds a finished or interrupted run"):
        run()


def test_a_dry_run_writes_nothing(run, tmp_path):
    assert run(dry_run=True) is None
    assert not (tmp_path / "run").exists()


def test_evaluation_without_validation_rows_is_refused(run):
    with pytest.raises(ConfigError, match="no validation data"):
        run(eval_strategy="steps")


def test_bad_data_is_refused_before_a_model_loads_and_leaves_nothing(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(DataError):
        run(dataset=str(bad))
    assert not (tmp_path / "run").exists()


def test_only_a_model_can_be_taken_over(run):
    first = run("first", save_only_model=True)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        run("first", resume_from_checkpoint=str(first.run), save_only_model=True)
    second = run("second", resume_from_checkpoint=str(first.checkpoint), resume_only_model=True, learning_rate=0.0, lora_dropout=0)
    assert_same_bits(adapter(second), adapter(first))


def test_the_embeddings_get_noise_of_the_size_that_neftune_says(tiny_model):
    from swift.model.noise import add_noise

    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    ids = torch.arange(4, 20).unsqueeze(0)
    clean = model.get_input_embeddings()(ids)
    add_noise(model, 5.0)
    noise = (model.get_input_embeddings()(ids) - clean).detach()
    bound = 5.0 / (16 * 32) ** 0.5  # alpha / sqrt(T * D)
    assert 0.9 * bound < float(noise.abs().max()) <= bound


def test_training_goes_on_from_an_adapter(run):
    first = run("first")
    second = run("second", adapters=str(first.run), learning_rate=0.0, lora_dropout=0)
    assert_same_bits(adapter(second), adapter(first))


def test_pre_training_trains_every_token_and_splits_long_texts(run, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Heavy snow is expected, {number}. " * 20}) + "\n" for number in range(8)))
    from swift.api import pt

    result = pt(
        model=json.loads((run("other").run / "args.json").read_text())["model"],
        dataset=str(texts),
        output_dir=str(tmp_path / "pt"),
        add_version=False,
        report_to="none",
        max_steps=3,
        max_length=64,
        truncation_strategy="split",
    )
    stats = json.loads((result.run / "plan.json").read_text())["planned"]
    assert stats["examples"] > 8
    assert stats["tokens_cut"] == 0
    assert stats["trained_tokens"] == stats["tokens"] - stats["examples"]  # all but the first of each piece
    with pytest.raises(ConfigError, match="is a run of swift pt"):
        from swift.api import sft

        sft(resume_from_checkpoint=str(result.run), truncation_strategy="right")


def test_a_run_that_resumes_with_other_options_is_warned_of(run, capsys):
    first = run("a", save_steps=3)
    run("a", save_steps=3, learning_rate=5e-3, resume_from_checkpoint=str(first.run / "checkpoint-3"))
    assert "learning_rate was 0.01, is 0.005" in capsys.readouterr().err


def test_the_best_step_has_a_checkpoint_when_it_is_wanted(run):
    result = run(max_steps=5, eval_steps=1, save_steps=100, split_dataset_ratio=0.2, load_best_model_at_end=True, eval_on_start=True)
    assert result.checkpoint.name == f"checkpoint-{result.state.best_step}"
    assert result.state.best_step >= 1


def test_a_run_killed_before_its_first_checkpoint_starts_with_clean_logs(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 9.0}\n{"step": 1, "loss": 9.0}\n{"st')
    result = run(eval_on_start=True, split_dataset_ratio=0.2)
    assert [line["step"] for line in metrics(result)] == [0, 1, 2, 3, 4, 5, 6, 6]  # the last step is logged and evaluated
