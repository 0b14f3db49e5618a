"""Megatron's option names in ours: what a command line for Megatron or for ms-swift's ``megatron`` asks of our trainer."""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from swift.deps import require
from swift.errors import ConfigError, near

N = TypeVar("N", int, float)
# Megatron's name -> ours, where one value says the same.
RENAMED = {
    "micro_batch_size": "per_device_train_batch_size",
    "train_iters": "max_steps",
    "max_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_warmup_fraction": "warmup_ratio",
    "lr_warmup_iters": "warmup_steps",
    "clip_grad": "max_grad_norm",
    "adam_eps": "adam_epsilon",
    "save": "output_dir",
    "save_interval": "save_steps",
    "eval_interval": "eval_steps",
    "log_interval": "logging_steps",
    "tensorboard_dir": "logging_dir",
    "num_workers": "dataloader_num_workers",
    "load": "model",
    "no_save_optim": "save_only_model",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
}
DECAY = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup", "inverse-square-root": "inverse_sqrt"}
# What happens anyway, and the value that asks for it.
INERT = {"finetune": "true", "no_load_optim": "true", "no_load_rng": "true", "no_save_rng": "true"}
REFUSED = {
    "context_parallel_size": "its attention over parts of a sequence is Transformer Engine's; --sequence_parallel_size is ours",
    "use_distributed_optimizer": "each process keeps the optimizer state of its shards; --strategy fsdp2 shards it further",
    "overlap_grad_reduce": "gradients are summed once a step",
    "overlap_param_gather": "there is no distributed optimizer",
}


COMMANDS = ("sft", "pt")


def words_for_swift(words: Sequence[str]) -> list[str]:
    """``words`` after ``megatron`` as words after ``swift``. ConfigError for a command that there is not."""
    if not words or words[0] in ("-h", "--help"):
        return ["sft", "--help"]
    if words[0] not in COMMANDS:
        match = near(words[0], COMMANDS)
        hint = f"did you mean {match!r}?" if match else "swift export converts weights"
        raise ConfigError(f"megatron {words[0]} is not available: it has {' and '.join(COMMANDS)}", hint=hint)
    if {"-h", "--help"} & set(words):
        return [words[0], "--help"]
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not world_size.isdigit():
        raise ConfigError(f"WORLD_SIZE={world_size!r} is not a number", hint="torchrun and swift launch set it")
    return [words[0], "--strategy", "megatron", *translate(words[1:], world_size=int(world_size))]


def translate(words: Sequence[str], *, world_size: int = 1) -> list[str]:
    """``words`` of a Megatron command line as words for ``swift sft``; ConfigError for what has no meaning here."""
    said = _read(words)
    out: dict[str, list[str]] = {}
    origin: dict[str, str] = {}
    for name, values in said.items():
        value = values[0] if values else "true"
        if name in INERT:
            if value.lower() != INERT[name]:
                raise ConfigError(f"--{name} {value} is not available", hint="remove it")
        elif name in REFUSED:
            if value.lower() not in ("1", "false"):
                raise ConfigError(f"option --{name} is not available: {REFUSED[name]}", hint="remove it")
        elif name == "lr_decay_style":
            if value not in DECAY:
                raise ConfigError(f"--lr_decay_style does not know {value!r}", hint=f"choose from: {', '.join(DECAY)}")
            out.setdefault("lr_scheduler_type", [DECAY[value]])
        elif name not in ("min_lr", "global_batch_size"):
            new = RENAMED.get(name, name)
            if new in origin:
                raise ConfigError(f"--{origin[new]} and --{name} say the same", hint="keep one")
            out[new], origin[new] = values, name
    if "min_lr" in said and (lowest := _number(said, "min_lr", float)) > 0:
        if said.get("lr_decay_style", ["cosine"]) != ["cosine"]:
            raise ConfigError("--min_lr is for --lr_decay_style cosine", hint="remove one of them")
        out["lr_scheduler_type"] = ["cosine_with_min_lr"]
        out["lr_scheduler_kwargs"] = [f'{{"min_lr": {lowest}}}']
    if "global_batch_size" in said:
        out["gradient_accumulation_steps"] = [str(_accumulation(said, world_size))]
    return [word for name, values in out.items() for word in (f"--{name}", *values)]


def _accumulation(said: dict[str, list[str]], world_size: int) -> int:
    """Forward passes a step: the global batch divided by the rows that all data parallel processes take at once."""

    total, micro = _number(said, "global_batch_size", int), _number(said, "micro_batch_size", int)
    tp, pp = _number(said, "tensor_model_parallel_size", int), _number(said, "pipeline_model_parallel_size", int)
    copies = world_size // max(tp * pp, 1)
    if micro < 1 or copies < 1 or total % (micro * copies):
        raise ConfigError(
            f"--global_batch_size {total} is no multiple of --micro_batch_size {micro} x {copies} data parallel processes",
            hint="change one of them",
        )
    return total // (micro * copies)


def _number(said: dict[str, list[str]], name: str, kind: type[N]) -> N:
    """The value of ``name``, 1 if it is not said."""
    text = (said.get(name) or ["1"])[0]
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--{name} takes {kind.__name__}, not {text!r}") from None


def _read(words: Sequence[str]) -> dict[str, list[str]]:
    said: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in said:
                raise ConfigError(f"--{name} is given twice", hint="give it once")
            said[name] = [value] if equals else []
        elif not name:
            raise ConfigError(f"unexpected argument {word!r}", hint="megatron sft takes options only")
        else:
            said[name].append(word)
    return said


def known_names() -> Collection[str]:
    """Megatron's own option names: of its argument parser where this release has one that imports, else its configuration's fields."""
    require("megatron.core", extra="megatron")
    with contextlib.suppress(ImportError):
        from megatron.training.arguments import add_megatron_arguments

        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_megatron_arguments(parser)
        return {name.lstrip("-").replace("-", "_") for action in parser._actions for name in action.option_strings}
    return {field.name for field in _fields()}


def check_fields(values: dict[str, Any], taken: Collection[str]) -> None:
    """ConfigError for a name that TransformerConfig does not have, or that the model or another option decides (``taken``)."""
    names = {field.name for field in _fields()}
    for name in values:
        if name in taken:
            raise ConfigError(f"{name} is decided by the model or by another option", hint="remove it")
        if name in names:
            continue
        if name in known_names():
            raise ConfigError(f"Megatron-LM's option {name} has no effect here: the trainer is not Megatron-LM's", hint="remove it")
        match = near(name, names)
        raise ConfigError(f"Megatron-Core has no option {name}", hint=f"did you mean {match}?" if match else None)


def _fields() -> Sequence[Any]:
    module = require("megatron.core.transformer.transformer_config", extra="megatron")
    return dataclasses.fields(module.TransformerConfig)
