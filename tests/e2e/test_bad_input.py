"""What a user may get wrong: one clear line on standard error, exit code 2, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swift import cli

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def swift(capsys, monkeypatch, tmp_path):
    """Run a command line in this process; returns (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in words])
        return caught.value.code, capsys.readouterr().err

    return run


def sft(model, data, *more):
    return ["sft", "--model", model, "--dataset", data, "--output_dir", "out", "--report_to", "none", "--max_steps", "1", *more]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def assert_one_line(outcome, *words):
    code, errors = outcome
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert code == 2, errors
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert word in lines[0] + errors, errors
    assert not Path("out").exists()


def test_a_missing_file(swift, tiny_model, tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    assert_one_line(swift(*sft(tiny_model, "./trian.jsonl")), "trian.jsonl", "train.jsonl")


def test_a_malformed_line_is_named(swift, tiny_model, tmp_path):
    assert_one_line(swift(*sft(tiny_model, write(tmp_path / "a.jsonl", GOOD, '{"messages": [', GOOD))), "a.jsonl:2")


def test_an_empty_data_set(swift, tiny_model, tmp_path):
    assert_one_line(swift(*sft(tiny_model, write(tmp_path / "a.jsonl"))), "a.jsonl")


def test_rows_without_an_assistant(swift, tiny_model, tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}]}
    assert_one_line(swift(*sft(tiny_model, write(tmp_path / "a.jsonl", row, row))), "assistant")


def test_an_unknown_option(swift, tiny_model):
    assert_one_line(swift(*sft(tiny_model, "d", "--lora_rnak", 4)), "--lora_rnak", "did you mean --lora_rank?")


def test_contradicting_options(swift, tiny_model):
    assert_one_line(swift(*sft(tiny_model, "d", "--bf16", "true", "--fp16", "true")), "--bf16", "--fp16")


def test_an_unknown_command(swift):
    assert_one_line(swift("trian"), "unknown command 'trian'")


def test_an_unknown_model_offline(swift, tmp_path):
    data = write(tmp_path / "a.jsonl", GOOD)
    assert_one_line(swift(*sft("hf::nobody/nothing", data, "--offline", "true")), "nobody/nothing")


def test_a_missing_model_path(swift, tmp_path):
    data = write(tmp_path / "a.jsonl", GOOD)
    assert_one_line(swift(*sft("./no-model", data)), "no-model")


def test_a_folder_that_is_no_model(swift, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line(swift(*sft(tmp_path / "empty", write(tmp_path / "a.jsonl", GOOD))), "config.json")


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_corrupt_safetensors(swift, tiny_model, tmp_path, damage):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if damage == "cut" else b"\xff" * 5000)
    assert_one_line(swift(*sft(broken, write(tmp_path / "a.jsonl", GOOD))), "model.safetensors")


def test_a_recipe_with_an_unknown_name(swift, tmp_path):
    recipe = write(tmp_path / "r.yaml", "modle: x")
    assert_one_line(swift("sft", recipe), "unknown option --modle", "did you mean --model?")


def test_rows_longer_than_max_length_are_counted(swift, tiny_model, tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "snow " * 500}]}
    assert_one_line(swift(*sft(tiny_model, write(tmp_path / "a.jsonl", row), "--max_length", 50)), "max_length 50")


def test_a_run_that_does_not_exist(swift):
    assert_one_line(swift("sft", "--resume_from_checkpoint", "nowhere"), "nowhere")


def test_an_adapter_for_another_model(swift, tiny_model, tmp_path, run):
    from tests.tiny import make_model

    result = run("other")
    other = make_model(tmp_path / "wide", hidden_size=64)
    data = write(tmp_path / "a.jsonl", GOOD)
    assert_one_line(
        swift("infer", "--model", other, "--adapters", result.checkpoint, "--val_dataset", data, "--load_args", "false"), "adapter"
    )


def test_a_full_disk_leaves_no_half_checkpoint(tiny_model, tmp_path):
    """A file system of 200 KiB fills up while the run writes to it."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small file system")
    try:
        data = write(tmp_path / "a.jsonl", *[GOOD] * 4)
        words = [
            "sft",
            "--model",
            tiny_model,
            "--dataset",
            data,
            "--output_dir",
            small / "out",
            "--add_version",
            "false",
            "--report_to",
            "none",
            "--max_steps",
            "3",
            "--save_steps",
            "1",
            "--tuner_type",
            "full",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "swift.cli", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"SWIFT_CACHE": str(tmp_path / "cache")},
        )
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        for checkpoint in (small / "out").glob("checkpoint-*"):
            assert (checkpoint / "trainer_state.json").is_file()
        assert not list((small / "out").glob(".checkpoint*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
