import json
import os
import subprocess
import sys

import pytest

from swift import cli
from swift.config.completion import whole_parser
from swift.errors import ConfigError


def swift(*words, **more):
    return subprocess.run([sys.executable, "-m", "swift.cli", *words], capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize("words", [[], ["--help"], ["sft", "--help"], ["models", "list", "--help"]])
def test_help_loads_no_heavy_package(words):
    heavy = ("torch", "transformers", "msgspec", "yaml")
    code = f"import sys; from swift import cli; cli.run({words!r}); print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_a_config_and_a_run_function_that_exist():
    from importlib import import_module

    for class_name, target, summary in cli.COMMANDS.values():
        assert hasattr(import_module("swift.config.options" if class_name == "Config" else "swift.config.commands"), class_name)
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function)), target
        assert summary


@pytest.mark.parametrize(("words", "hint"), [(["sftt"], "did you mean 'sft'?"), (["models", "lst"], "swift models list --help")])
def test_a_mistyped_command_gets_a_near_match(words, hint):
    with pytest.raises(ConfigError) as caught:
        cli.run(words)
    assert caught.value.hint == hint


@pytest.mark.parametrize("command", ["rollout", "web-ui", "app"])
def test_a_command_of_ms_swift_that_is_not_built_is_refused_by_name(command):
    with pytest.raises(ConfigError, match=f"swift {command} is not available: "):
        cli.run([command])


def test_the_process_ends_with_2_and_one_line():
    done = swift("sft", "--warmup_ration", "0.1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --warmup_ration\nhint: did you mean --warmup_ratio?\n"


def test_json_mode_prints_objects():
    done = swift("doctor", "--json", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["table"]
    failed = swift("sft", "--json", "--nonsense", "1")
    assert json.loads(failed.stderr)["event"] == "error"


def test_show_config_says_where_each_value_came_from(capsys):
    cli.run(["sft", "--model", "m", "--dataset", "d", "--quant_bits", "4"], show_config=True)
    printed = capsys.readouterr().out
    assert "derived: --quant_bits is given" in printed
    assert "hub_token" in printed


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_know_commands_and_options(shell, capsys):
    cli.run(["completion", shell])
    printed = capsys.readouterr().out
    assert "--lora_rank" in printed
    assert "merge-lora" in printed


def test_the_completion_parser_accepts_what_the_command_line_accepts():
    namespace = whole_parser(cli.COMMANDS).parse_args(["sft", "--lora_rank", "4"])
    assert namespace.lora_rank == "4"


QUICK_START = """
sft --model MODEL --tuner_type lora --dataset DATA#20 DATA#10 --torch_dtype bfloat16 --num_train_epochs 1
    --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32
    --target_modules all-linear --gradient_accumulation_steps 16 --eval_steps 50 --save_steps 50 --save_total_limit 2
    --logging_steps 5 --max_length 2048 --output_dir output --system 'You are a helpful assistant.' --warmup_ratio 0.05
    --dataset_num_proc 4 --dataloader_num_workers 4 --model_author swift --model_name swift-robot
"""


def test_the_quick_start_of_ms_swift_runs_unchanged(tiny_model, rows, tmp_path, monkeypatch, capsys):
    import shlex

    monkeypatch.chdir(tmp_path)
    words = [word.replace("MODEL", str(tiny_model)).replace("DATA", str(rows)) for word in shlex.split(QUICK_START)]
    result = cli.run(words)
    assert result.checkpoint.parent.parent.absolute() == tmp_path / "output"
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("who are you?\n"))
    cli.run(["infer", "--adapters", str(result.checkpoint), "--stream", "true", "--temperature", "0", "--max_new_tokens", "8"])
    cli.run(["export", "--adapters", str(result.checkpoint), "--merge_lora", "true"])
    assert "merged" in capsys.readouterr().out
