"""Settings of DeepSpeed are read, agreed with our options, filled in, and checked before anything is loaded."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from swift.config.commands import SftConfig
from swift.config.options import build
from swift.errors import ConfigError, DependencyError
from swift.parallel.choose import arrange
from swift.parallel.deepspeed import settings
from swift.parallel.world import World

ROOT = Path(__file__).parent.parent.parent
PRESETS = sorted(path.stem for path in settings.PRESETS.glob("*.json"))


def options(**given):
    return build(SftConfig, ("python", {"model": "tiny", "dataset": ["rows"], **given}))


def write(tmp_path, found):
    path = tmp_path / "mine.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return str(path)


def check(tmp_path, found, processes=2, **given):
    config = options(deepspeed=write(tmp_path, found), **given)
    arrange(config, World(0, processes))
    return config


@pytest.mark.parametrize("name", [*PRESETS, str(ROOT / "deepspeed_zero3.json")])
def test_presets_and_the_example_pass_the_reader_of_deepspeed(name):
    config = options(deepspeed=name)
    assert arrange(config, World(0, 2)).strategy == "deepspeed"
    assert PRESETS == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def test_auto_is_filled_as_hugging_face_fills_it():
    """The sizes against transformers' own reader of such files."""
    from transformers import LlamaConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = options(deepspeed="zero3", per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.5, bf16=True)
    found = settings.read("zero3")
    found["optimizer"] = {"type": "AdamW", "params": dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto")}
    config.learning_rate, config.weight_decay = 2e-5, 0.1
    theirs = HfTrainerDeepSpeedConfig(json.loads(json.dumps(found)))
    arguments = SimpleNamespace(  # what it reads of TrainingArguments, which takes seconds to import
        world_size=1, per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.5, bf16=True, fp16=False,
        bf16_full_eval=False, fp16_full_eval=False, learning_rate=2e-5, weight_decay=0.1, adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2, adam_epsilon=config.adam_epsilon, save_on_each_node=False, get_warmup_steps=lambda steps: 0,
    )  # fmt: skip
    theirs.trainer_config_process(arguments)
    theirs.trainer_config_finalize(arguments, type("Model", (), {"config": LlamaConfig(hidden_size=96)})(), 10)
    ours = settings.fill(found, config, 1, width=96, dtype="bfloat16")
    for key in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print"):
        ours.pop(key)
    assert ours == theirs.config


@pytest.mark.parametrize(
    ("found", "message", "hint"),
    [
        ({"zero_optimisation": {"stage": 2}}, "DeepSpeed does not know zero_optimisation", "zero_optimization"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
            "know zero_optimization.stage3_max_live_parameter",
            "parameters",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.devise", "device"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "offload_optimizer.device not 'gpu'", ""),
        ({"flops_profiler": {"enabled": False, "modul_depth": 1}}, "DeepSpeed does not know flops_profiler.modul_depth", "module_depth"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 0, 1, 2 or 3, not 4", ""),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param has no effect below", "remove"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "needs nvme_path", ""),
        ({"zero_optimization": 3}, "zero_optimization must be an object, not 3", ""),
        ({"sparse_attention": {}}, "Sparse Attention has been removed", ""),
        ({"prescale_gradients": "auto"}, 'prescale_gradients cannot be "auto"', ""),
        ({"optimizer": {"type": "AdamV"}}, "DeepSpeed does not know optimizer.type AdamV", "Adam"),
        ({"optimizer": {"type": "AdamW", "params": {"bettas": [0.9, 0.9]}}}, "know optimizer.params.bettas", "betas"),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing", "AdamW"),
        (
            {"optimizer": {"type": "Adafactor"}, "zero_optimization": {"stage": 2}},
            "optimizer.type Adafactor looks at whole matrices, of which each process has a part",
            "AdamW",
        ),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type OneCycle is none of", "--lr_scheduler_type"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}}, "warmup_type must be linear", ""),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size 2", "--tensor_model_parallel_size"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm must be true", ""),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation must be true", ""),
        ({"train_batch_size": 5}, "has train_batch_size 5, and --per_device_train_batch_size 1 x 2 processes contradicts it", "auto"),
        ({"gradient_clipping": "much"}, 'gradient_clipping must be a number, 0 or more, or auto, not "much"', ""),
        ({"gradient_clipping": -1}, "gradient_clipping must be a number, 0 or more, or auto, not -1", ""),
        ({"train_micro_batch_size_per_gpu": 2.5}, "train_micro_batch_size_per_gpu must be a whole number, 1 or more, or auto, not 2.5", ""),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number, 1 or more, or auto, not 0", ""),
        ({"bf16": {"enabled": 1}}, "bf16.enabled must be true or false, or auto, not 1", ""),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-5}}},
            "optimizer.params.lr 0.0001 and scheduler.params.warmup_max_lr 1e-05 contradict each other",
            "keep one",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/d"}}},
            "offload_optimizer to nvme has no effect below zero_optimization.stage 3",
            "remove",
        ),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal true has no effect here, or a wrong one", "remove"),
        ('{"bf16": {}, "bf16": {}}', "bf16 is given twice", ""),
        ("[1]", "not a JSON object", ""),
        ("{", "not a JSON file", ""),
    ],
)
def test_a_setting_that_is_unknown_or_wrong_is_named_in_one_line(tmp_path, found, message, hint):
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, found)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("found", "given", "message"),
    [
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 1.5}, "--max_grad_norm 1.5 contradicts"),
        ({"train_micro_batch_size_per_gpu": 4}, {"per_device_train_batch_size": 2}, "has train_micro_batch_size_per_gpu 4"),
        ({"bf16": {"enabled": True}}, {"bf16": False}, "--bf16 false contradicts"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, {"learning_rate": 1e-5}, "has optimizer.params.lr 0.0001"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}}, {"adam_beta2": 0.95}, "--adam_beta2 0.95 contradicts"),
        ({"optimizer": {"type": "AdamW"}}, {"optim": "sgd"}, "--optim sgd contradicts"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, {"lr_scheduler_type": "cosine"}, "--lr_scheduler_type cosine contradicts"),
    ],
)
def test_a_value_that_contradicts_an_option_names_both(tmp_path, found, given, message):
    with pytest.raises(ConfigError, match=r"mine\.json") as caught:
        check(tmp_path, found, **given)
    assert message in caught.value.message


def test_options_that_were_left_open_take_what_the_file_says(tmp_path):
    found = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    found |= {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.9], "eps": "auto"}}, "scheduler": {"type": "WarmupLR"}}
    config = check(tmp_path, found)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.max_grad_norm) == (4, 3, 0.5)
    assert (config.bf16, config.learning_rate, config.adam_beta1, config.adam_beta2) == (True, 3e-4, 0.8, 0.9)
    assert config.lr_scheduler_type == "constant_with_warmup"


def test_the_option_may_hold_the_settings_themselves():
    settings_of = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000}, "gradient_clipping": 0.5, **{"x" * 300: 1}}
    with pytest.raises(ConfigError, match=r"^--deepspeed \{\.\.\.\}: DeepSpeed does not know xxx"):
        arrange(options(deepspeed=json.dumps(settings_of)), World(0, 2))
    del settings_of["x" * 300]
    config = options(deepspeed=json.dumps(settings_of))
    assert arrange(config, World(0, 2)).strategy == "deepspeed"
    assert config.max_grad_norm == 0.5
    with pytest.raises(ConfigError, match=r"is neither a preset nor a file|File name too long"):
        settings.read("x" * 300)


def test_a_preset_that_does_not_exist_names_the_near_one():
    with pytest.raises(ConfigError, match="--deepspeed zero22 is neither a preset nor a file") as caught:
        arrange(options(deepspeed="zero22"), World(0, 2))
    assert "zero2" in caught.value.hint


def test_other_axes_and_missing_settings_are_refused():
    with pytest.raises(ConfigError, match="--deepspeed zero2 and dp 2 x tp 2 cannot be combined"):
        arrange(options(deepspeed="zero2", tensor_model_parallel_size=2), World(0, 4))
    with pytest.raises(ConfigError, match="--fp16 and --deepspeed zero2 cannot be combined: DeepSpeed has no float16 on this device"):
        arrange(options(deepspeed="zero2", fp16=True, device="cpu"), World(0, 2))
    with pytest.raises(ConfigError, match="--strategy deepspeed needs settings"):
        arrange(options(strategy="deepspeed"), World(0, 2))


def test_without_the_package_contradictions_are_named_first_and_then_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    find = importlib.import_module

    def absent(name, *rest):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
        return find(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match="contradicts"):
        check(tmp_path, {"gradient_clipping": 0.5}, max_grad_norm=1.5)
    with pytest.raises(DependencyError) as caught:
        check(tmp_path, {"gradient_clipping": 0.5})
    assert caught.value.hint == "pip install 'swift-llm[deepspeed]'"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--local_rank=1", "--model", "m"], ["sft", "--model", "m"]),
        (["--local-rank=1", "pt", "--model", "m"], ["pt", "--model", "m"]),
        ([], ["sft"]),
    ],
)
def test_the_script_of_launchers_runs_sft_unless_a_command_is_named(words, wanted):
    found = {"__name__": "script"}
    exec(compile((ROOT / "train.py").read_text(encoding="utf-8"), "train.py", "exec"), found)
    assert found["command"](words) == wanted
