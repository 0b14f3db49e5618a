"""Names of other times and tools: what an old spelling means today, and why a known option is refused.

The refusals are data: ``refused.json``, groups of options that share a reason. Each option there lists
the values that ask for what happens anyway; ``*`` stands for all values.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from swift.errors import ConfigError

RENAMED: dict[str, str] = {
    # ms-swift 2 and 3
    "train_type": "tuner_type",
    "sft_type": "tuner_type",
    "model_id_or_path": "model",
    "model_cache_dir": "model",
    "ckpt_dir": "adapters",
    "lora_modules": "adapters",
    "quantization_bit": "quant_bits",
    "quantization_method": "quant_method",
    "bnb_4bit_comp_dtype": "bnb_4bit_compute_dtype",
    "template_type": "template",
    "tools_prompt": "agent_template",
    "custom_train_dataset_path": "dataset",
    "custom_val_dataset_path": "val_dataset",
    "dataset_test_ratio": "split_dataset_ratio",
    "dataset_seed": "data_seed",
    "preprocess_num_proc": "dataset_num_proc",
    "load_dataset_config": "load_data_args",
    "streaming_buffer_size": "shuffle_buffer_size",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "only_save_model": "save_only_model",
    "add_output_dir_suffix": "add_version",
    "neftune_alpha": "neftune_noise_alpha",
    "use_liger": "use_liger_kernel",
    "vit_use_gc": "vit_gradient_checkpointing",
    "loss_name": "loss_type",
    "deepspeed_config_path": "deepspeed",
    "device_map_config": "device_map",
    "device_map_config_path": "device_map",
    "device_max_memory": "max_memory",
    "check_model_is_latest": "check_model",
    "push_hub_strategy": "hub_strategy",
    "additional_trainable_parameters": "trainable_parameters",
    "init_lora_weights": "init_weights",
    "lora_bias_trainable": "lora_bias",
    "lora_dropout_p": "lora_dropout",
    "lora_lr_ratio": "lorap_lr_ratio",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_modules": "target_modules",
    "lora_target_regex": "target_regex",
    "merge_lora_and_save": "merge_lora",
    "ref_model_id_or_path": "ref_model",
    # Hugging Face
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapters",
    "dtype": "torch_dtype",
    "attn_implementation": "attn_impl",
    "lora_r": "lora_rank",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "train_dataset": "dataset",
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "save_safetensors": "safe_serialization",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    # Megatron
    "context_parallel_size": "sequence_parallel_size",
}

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "auto": "none"}

# today's name of an option -> {old value, in lower case: new value}
RENAMED_VALUES: dict[str, dict[str, str]] = {
    "quant_method": {"bitsandbytes": "bnb"},
    "quant_bits": {"0": "none"},
    "infer_backend": {"pt": "transformers"},
    "deepspeed": {
        "default-zero2": "zero2",
        "default-zero3": "zero3",
        "zero2-offload": "zero2_offload",
        "zero3-offload": "zero3_offload",
    },
    "torch_dtype": _DTYPES,
    "lora_dtype": _DTYPES,
    "bnb_4bit_compute_dtype": _DTYPES,
    "attn_impl": {"flash_attn": "flash_attention_2"},
    "truncation_strategy": {"truncation_left": "left", "ignore": "delete"},
    "acc_strategy": {"sentence": "seq"},
    "save_total_limit": {"-1": "none"},
    "target_modules": {"all": "all-linear"},
}

# (option, value in lower case) -> the option and value that say the same today
MOVED: dict[tuple[str, str], tuple[str, str]] = {
    ("use_flash_attn", "true"): ("attn_impl", "flash_attention_2"),
    ("template", "chatml"): ("chat_template", "chatml"),
    ("device_map", "cpu"): ("device", "cpu"),
    ("use_mps_device", "true"): ("device", "mps"),
    ("load_in_4bit", "true"): ("quant_bits", "4"),
    ("load_in_8bit", "true"): ("quant_bits", "8"),
    ("adafactor", "true"): ("optim", "adafactor"),
    ("train_sampling_strategy", "group_by_length"): ("group_by_length", "true"),
    ("train_sampling_strategy", "sequential"): ("train_dataloader_shuffle", "false"),
}


@dataclass(frozen=True)
class Refusal:
    """Why an option is refused; ``reason`` stands after "option --x is not available: "."""

    name: str
    reason: str
    accepts: tuple[str, ...] = ()

    def is_inert(self, value: Any) -> bool:
        """Whether ``value``, typed or as text, asks for what happens anyway."""
        if value in (None, "", [], {}):
            return True
        text = _text(value)
        return "*" in self.accepts or any(text == each or _is_same_number(text, each) for each in self.accepts)


def modern(name: str, value: Any) -> tuple[str, Any, str | None]:
    """Today's name and value of an option, and a line that says what was changed (None if nothing was).

    Dashes equal underscores. A list is translated member by member. An option that is accepted without
    effect keeps its name and gets a line that says so.
    """
    old = name.replace("-", "_")
    new = RENAMED.get(old, old)
    changed = _modern_value(new, value)
    target = MOVED.get((new, _text(changed)))
    if target is not None:
        new, changed = target
    if new == "local_rank":
        return new, value, _local_rank_notice(_text(value))
    if new != old or changed != value:
        is_value_shown = changed != value
        before = f"--{old} {_written(value)}" if is_value_shown else f"--{old}"
        after = f"--{new} {_written(changed)}" if is_value_shown else f"--{new}"
        return new, changed, f"{before} is read as {after}"
    refused = refusal(new)
    if refused is not None and "*" in refused.accepts and value is not None:
        return new, value, f"--{new} has no effect: {refused.reason}"
    return new, value, None


def _modern_value(name: str, value: Any) -> Any:
    renamed = RENAMED_VALUES.get(name)
    if renamed is None:
        return value
    if isinstance(value, list):
        return [renamed.get(_text(item), item) for item in value]
    return renamed.get(_text(value), value)


def _local_rank_notice(given: str) -> str | None:
    """What is said about a rank that a launcher passed; ConfigError if it contradicts the environment."""
    if given in ("-1", "none"):
        return None
    fact = os.environ.get("LOCAL_RANK")
    if fact is None and given == "0":
        return "--local_rank 0 is not needed: LOCAL_RANK is not set, so this process is the only one"
    if fact != given:
        told = "LOCAL_RANK is not set" if fact is None else f"LOCAL_RANK is {fact}"
        raise ConfigError(f"--local_rank {given} was given, but {told}", hint="start with torchrun, and remove --local_rank")
    return f"--local_rank {given} is not needed: LOCAL_RANK={fact} says it"


def refusal(name: str) -> Refusal | None:
    """Why the option ``name`` is refused, or None if it is not a known refused option."""
    return refusals().get(name.replace("-", "_"))


@cache
def refusals() -> dict[str, Refusal]:
    """All refused options by name."""
    return {
        name: Refusal(name, group["reason"], tuple(accepts))
        for group in _refused_file()["groups"]
        for name, accepts in group["options"].items()
    }


def elsewhere(name: str) -> str | None:
    """The command line that does what an option asks for which a command does not have, or None."""
    hint: str | None = _refused_file()["elsewhere"].get(name)
    return hint


def refused_command(name: str) -> str | None:
    """Why a command of ms-swift is not available, or None; stands after "swift NAME is not available: "."""
    reason: str | None = _refused_file()["commands"].get(name.replace("_", "-"))
    return reason


@cache
def _refused_file() -> Any:
    return json.loads(Path(__file__).with_name("refused.json").read_text(encoding="utf-8"))


def _written(value: Any) -> str:
    """``value`` as one would write it on a command line."""
    if isinstance(value, list | tuple):
        return " ".join(_written(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _text(value: Any) -> str:
    """``value`` as text that is compared: without regard to case."""
    return _written(value).lower()


def _is_same_number(left: str, right: str) -> bool:
    try:
        return float(left) == float(right)
    except ValueError:
        return False
