"""The settings of DeepSpeed: a preset or a file, agreed with our options, and "auto" filled in as Hugging Face does."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swift.config.commands import SftConfig
from swift.errors import ConfigError, near

PRESETS = Path(__file__).parent / "presets"
AUTO = "auto"

# A value of the file -> the option of ours that says the same.
SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}
# Of these, the whole numbers, with the least of each.
COUNTS = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "scheduler.params.warmup_num_steps": 0}
# The schedules of DeepSpeed that ours are equal to, given a linear warm-up.
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# What DeepSpeed does in loops of its own, or to models of its own: (setting that turns it on, what to use instead).
REFUSED = {
    "tensor_parallel.autotp_size": "--tensor_model_parallel_size shares layers between processes",
    "hybrid_engine.enabled": "remove it",
    "autotuning.enabled": "remove it",
    "data_efficiency.enabled": "remove it: rows and their order are chosen by our options",
    "curriculum_learning.enabled": "remove it: rows and their order are chosen by our options",
    "compression_training": "remove it",
    "expert_parallel.enabled": "remove it",
    "compile.deepcompile": "remove it",
    "zero_optimization.zenflow": "remove it",
    "activation_checkpointing.partition_activations": "--gradient_checkpointing true keeps fewer activations",
    "activation_checkpointing.cpu_checkpointing": "--gradient_checkpointing true keeps fewer activations",
    "amp.enabled": "use bf16 or fp16",
    "checkpoint.load_universal": "remove it: checkpoints are made universal when they have to be",
}
# ZeRO-3's sizes that follow from the width of the model, as Hugging Face has them.
SIZES = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}


def read(name: str) -> dict[str, Any]:
    """The settings called ``name``: a preset, or a JSON file, or JSON itself. ConfigError for none, or no JSON object."""
    told, is_text = title(name), _is_text(name)
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.json"))}
    path = presets.get(name, Path(name).expanduser())
    try:
        if not is_text and not path.is_file():
            match = near(name, presets)
            hint = f"did you mean {match}?" if match else f"presets: {', '.join(presets)}"
            raise ConfigError(f"{told} is neither a preset nor a file", hint=hint)
        found = json.loads(name if is_text else path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{told}: not a JSON file: {problem}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{told}: not a JSON object of settings")
    for section in ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16"):
        if not isinstance(found.get(section, {}), dict):
            raise ConfigError(f"{told}: {section} must be an object, not {json.dumps(found[section])}")
    for section in ("optimizer", "scheduler"):
        if section in found and not isinstance(found[section].get("params", {}), dict):
            raise ConfigError(f"{told}: {section}.params must be an object")
    return found


def title(name: str | None) -> str:
    """How the settings called ``name`` are told of: settings that stand in the option itself are not repeated."""
    return "--deepspeed {...}" if name and _is_text(name) else f"--deepspeed {name}"


def _is_text(name: str) -> bool:
    return name.lstrip().startswith("{")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def stage(settings: dict[str, Any]) -> int:
    """What is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    return int(value_at(settings, "zero_optimization.stage") or 0)


def agree(settings: dict[str, Any], config: SftConfig, world_size: int) -> None:
    """Take what the file says for options that were left open; ConfigError where it contradicts one that was given."""
    name = title(config.deepspeed)
    _refuse(settings, name)
    said: dict[str, tuple[str, Any]] = {}
    for key, option in SAME.items():
        value = value_at(settings, key)
        if value is None or value == AUTO:
            continue
        _check_kind(name, key, value)
        first, other = said.setdefault(option, (key, value))
        if other != value:
            raise ConfigError(f"{name}: {first} {json.dumps(other)} and {key} {json.dumps(value)} contradict each other", hint="keep one")
        _take(config, option, value, f"{name} has {key} {json.dumps(value)}")
    betas = value_at(settings, "optimizer.params.betas")
    if betas is not None and betas != AUTO:
        if not isinstance(betas, list) or len(betas) != 2:
            raise ConfigError(f"{name}: optimizer.params.betas must be two numbers, or auto")
        for option, value in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
            _take(config, option, value, f"{name} has optimizer.params.betas {json.dumps(betas)}")
    _agree_optimizer(settings, config, name)
    _agree_schedule(settings, config, name)
    whole = value_at(settings, "train_batch_size")
    if whole is not None and whole != AUTO:
        per_process, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        if accumulation is None and isinstance(whole, int) and whole % (per_process * world_size) == 0:
            accumulation = whole // (per_process * world_size)
            config.derive("gradient_accumulation_steps", accumulation, f"{name} has train_batch_size {whole}")
        if accumulation is None or whole != per_process * accumulation * world_size:
            told = f"--per_device_train_batch_size {per_process}"
            told += f" x --gradient_accumulation_steps {accumulation}" if accumulation is not None else ""
            raise ConfigError(
                f"{name} has train_batch_size {json.dumps(whole)}, and {told} x {world_size} processes contradicts it",
                hint='write "train_batch_size": "auto"',
            )


def _check_kind(name: str, key: str, value: Any) -> None:
    """ConfigError for a value of another kind than ``key`` takes, or one that makes no sense."""
    if key.endswith("enabled"):
        is_fit, wanted = isinstance(value, bool), "true or false"
    else:
        is_fit, wanted = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0, "a number, 0 or more"
        if key in COUNTS:
            is_fit, wanted = is_fit and value == int(value) and value >= COUNTS[key], f"a whole number, {COUNTS[key]} or more"
    if not is_fit:
        raise ConfigError(f"{name}: {key} must be {wanted}, or auto, not {json.dumps(value)}")


def _refuse(settings: dict[str, Any], name: str) -> None:
    """ConfigError for what our loop does not do by DeepSpeed."""
    for key, hint in REFUSED.items():
        value = value_at(settings, key)
        if value and not (key.endswith("autotp_size") and value == 1):
            raise ConfigError(f"{name}: {key} {json.dumps(value)} has no effect here, or a wrong one", hint=hint)
    if value_at(settings, "managed_gradient_accumulation") is False:
        raise ConfigError(f"{name}: managed_gradient_accumulation must be true: the loop says where a step ends")
    if value_at(settings, "zero_optimization.compute_grad_norm") is False:
        raise ConfigError(f"{name}: zero_optimization.compute_grad_norm must be true: the norm is logged, and clipped by")
    given = value_at(settings, "zero_optimization.stage")
    if given is not None and (isinstance(given, bool) or given not in (0, 1, 2, 3)):
        raise ConfigError(f"{name}: zero_optimization.stage is 0, 1, 2 or 3, not {json.dumps(given)}")
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = value_at(settings, f"zero_optimization.{part}.device") or "none"
        needed = 3 if device == "nvme" else least  # below, DeepSpeed 0.19.8 takes nvme for no offload at all
        if device != "none" and stage(settings) < needed:
            what = f"{part} to nvme" if needed != least else part
            raise ConfigError(f"{name}: {what} has no effect below zero_optimization.stage {needed}", hint=f"remove {part}")
        if device == "nvme" and not value_at(settings, f"zero_optimization.{part}.nvme_path"):
            raise ConfigError(f"{name}: {part} to nvme needs nvme_path, a folder on that disk")


def _take(config: SftConfig, option: str, value: Any, told: str) -> None:
    """``value`` for ``option``, unless the user has said another."""
    own = getattr(config, option)
    if config.said(option):
        if own != value:
            raise ConfigError(f"--{option} {_text(own)} contradicts {told}", hint='write "auto" there, or leave the option away')
    elif own != value:
        config.derive(option, type(own)(value) if isinstance(own, float | int) and not isinstance(own, bool) else value, told)


def _agree_optimizer(settings: dict[str, Any], config: SftConfig, name: str) -> None:
    kind = value_at(settings, "optimizer.type")
    if "optimizer" in settings and not isinstance(kind, str):
        raise ConfigError(f"{name}: optimizer.type is missing", hint="write AdamW, or leave optimizer away: --optim is used then")
    if kind is not None and config.said("optim"):
        raise ConfigError(f"--optim {config.optim} contradicts {name}, which has optimizer.type {kind}", hint="keep one")


def _agree_schedule(settings: dict[str, Any], config: SftConfig, name: str) -> None:
    """The learning rate follows our schedule, which the file may name in DeepSpeed's words."""
    kind = value_at(settings, "scheduler.type")
    if kind is None:
        return
    if kind not in SCHEDULES:
        raise ConfigError(
            f"{name}: scheduler.type {kind} is none of {', '.join(SCHEDULES)}", hint="remove scheduler: use --lr_scheduler_type"
        )
    _take(config, "lr_scheduler_type", SCHEDULES[kind], f"{name} has scheduler.type {kind}")
    for key, accepted in (("warmup_min_lr", (0, AUTO)), ("total_num_steps", (AUTO,)), ("warmup_type", ("linear", AUTO))):
        value = value_at(settings, f"scheduler.params.{key}")
        if value is not None and value not in accepted:
            raise ConfigError(f"{name}: scheduler.params.{key} must be {accepted[0]}, not {json.dumps(value)}: the schedule is ours")
    unknown = set(settings["scheduler"].get("params", {})) - {
        "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps"
    }  # fmt: skip
    if unknown:
        raise ConfigError(f"{name}: scheduler.params.{min(unknown)} has no effect: the schedule is ours", hint="use --lr_scheduler_kwargs")


def fill(settings: dict[str, Any], config: SftConfig, world_size: int, *, width: int | None, dtype: str | None) -> dict[str, Any]:
    """What DeepSpeed is given: every "auto" has its value. ``dtype`` is that of forward passes; ``width`` the model's.

    Batch sizes mean nothing to DeepSpeed here but have to fit each other; the learning-rate schedule is ours.
    """
    filled = copy.deepcopy(settings)
    filled.pop("scheduler", None)
    per_process, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps or 1
    filled["train_micro_batch_size_per_gpu"] = per_process
    filled["gradient_accumulation_steps"] = accumulation
    filled["train_batch_size"] = per_process * accumulation * world_size
    filled["gradient_clipping"] = config.max_grad_norm
    # PyTorch's own autocast, if the file has it, keeps weights in float32: no precision of weights beside it.
    low = None if value_at(filled, "torch_autocast.enabled") else dtype
    filled["bf16"] = {**filled.get("bf16", {}), "enabled": low == "bfloat16"}
    filled["fp16"] = {**filled.get("fp16", {}), "enabled": low == "float16"}
    zero = filled.setdefault("zero_optimization", {})
    for key, size in SIZES.items():
        if zero.get(key) == AUTO:
            if width is None:
                raise ConfigError(
                    f'{title(config.deepspeed)}: {key} "auto" follows from hidden_size, which the model does not have',
                    hint="write a number there",
                )
            zero[key] = max(size(width), 1)
    if "optimizer" in filled:
        rates: dict[str, Any] = {"lr": config.learning_rate, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}
        rates["betas"] = [config.adam_beta1, config.adam_beta2]
        parameters = filled["optimizer"].setdefault("params", {})
        parameters |= {key: rates[key] for key, value in parameters.items() if value == AUTO and key in rates}
        parameters.setdefault("lr", config.learning_rate)
    # Any optimizer of torch may be sharded whose updates look at single numbers; others are refused before.
    filled.setdefault("zero_allow_untested_optimizer", True)
    filled.setdefault("zero_force_ds_cpu_optimizer", False)
    filled.setdefault("steps_per_print", None)
    return filled


def autos(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Where "auto" stands, as section.key."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from autos(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield f"{prefix}{key}"


def value_at(settings: dict[str, Any], key: str) -> Any:
    """The value of ``section.key``; None if it is not there."""
    found: Any = settings
    for name in key.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(name)
    return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
