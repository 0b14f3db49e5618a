"""Megatron's option names in ours: what a command line for Megatron or for ms-swift's ``megatron`` asks of our trainer."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args

from swift import console
from swift.errors import ConfigError, near
from swift.parallel.megatron import package
from swift.parallel.megatron.names import modules_in

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
    "context_parallel_size": "sequence_parallel_size",
    "num_workers": "dataloader_num_workers",
    "load": "model",
    "adapter_load": "adapters",
    "no_save_optim": "save_only_model",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
}
# What the processes that share a sequence tell one another, by --cp_comm_type -> --sequence_parallel_kind.
EXCHANGES = {"p2p": "ring", "a2a": "ulysses"}
DECAY = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup", "inverse-square-root": "inverse_sqrt"}
# What happens anyway, and the value that asks for it.
INERT = {
    "finetune": "true",
    "no_load_optim": "true",
    "no_load_rng": "true",
    "no_save_rng": "true",
    "save_safetensors": "true",
    "load_safetensors": "true",
    "calculate_per_token_loss": "true",
}
REFUSED = {
    "expert_tensor_parallel_size": ("1", "experts are shared by --expert_model_parallel_size"),
    "eval_iters": ("-1", "all validation rows are evaluated"),
    "mcore_model": ("none", "training starts from safetensors, which swift export --to_hf true makes of Megatron's checkpoint"),
    "mcore_adapter": ("none", "training starts from safetensors, and adapters from PEFT's files (--adapters)"),
    "merge_lora": ("false", "checkpoints hold the adapter, of which swift merge-lora makes a model"),
}
# How Megatron-LM's and ms-swift's trainers go about their work; the numbers that are trained do not depend on it.
TRAINERS_OWN = (
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "attention_backend",
    "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl",
    "align_param_gather",
    "manual_gc",
    "async_save",
)
# Fields of TransformerConfig that follow from the model, from an option, or from how a step is divided.
DECIDED = frozenset(
    "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size virtual_pipeline_model_parallel_size "
    "context_parallel_size sequence_parallel params_dtype pipeline_dtype bf16 fp16 perform_initialization use_cpu_initialization "
    "calculate_per_token_loss variable_seq_lengths gradient_accumulation_fusion overlap_p2p_comm batch_p2p_comm "
    "deallocate_pipeline_outputs cp_comm_type hierarchical_context_parallel_sizes hybrid_context_parallel "
    "moe_token_dispatcher_type moe_router_load_balancing_type".split()
)

COMMANDS = ("sft", "pt")


def words_for_swift(words: Sequence[str], *, world_size: int | None = None) -> list[str]:
    """``words`` after ``megatron`` as words after ``swift``, for a run of ``world_size`` processes, by default those of the environment.

    ConfigError for a command that there is not.
    """
    if not words or words[0] in ("-h", "--help"):
        return ["sft", "--help"]
    if words[0] not in COMMANDS:
        match = near(words[0], COMMANDS)
        hint = f"did you mean {match!r}?" if match else "swift export --to_mcore true and --to_hf true convert weights"
        raise ConfigError(f"megatron {words[0]} is not available: it has {', '.join(COMMANDS)}", hint=hint)
    if {"-h", "--help"} & set(words):
        return [words[0], "--help"]
    given = translate(words[1:], world_size=world_size or _world_size(os.environ))
    # By itself Megatron trains all weights; a run that goes on trains what it has trained.
    is_told = {"--tuner_type", "--train_type", "--sft_type", "--resume_from_checkpoint"} & set(given)
    tuner = [] if is_told else ["--tuner_type", "full"]
    return [words[0], "--strategy", "megatron", *tuner, *given]


def _world_size(environment: Mapping[str, str]) -> int:
    """Processes of the run: those that a launcher has started, or that NPROC_PER_NODE and NNODES ask for."""
    names = ("WORLD_SIZE",) if environment.get("RANK") else ("NPROC_PER_NODE", "NNODES")
    size = 1
    for name in names:
        text = environment.get(name) or "1"
        if not text.isdigit():
            raise ConfigError(f"{name}={text!r} is not a number", hint="torchrun and swift launch set WORLD_SIZE")
        size *= int(text)
    return size


def translate(words: Sequence[str], *, world_size: int = 1) -> list[str]:
    """``words`` of a Megatron command line as words for ``swift sft``; ConfigError for what has no meaning here."""
    said = _read(words)
    out: dict[str, list[str]] = {}
    origin: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for name, values in said.items():
        value = values[0] if values else "true"
        if name in INERT:
            if value.lower() != INERT[name]:
                raise ConfigError(f"--{name} {value} is not available", hint="remove it")
        elif name in REFUSED:
            if value.lower() != REFUSED[name][0]:
                raise ConfigError(f"option --{name} is not available: {REFUSED[name][1]}", hint="remove it")
        elif name in TRAINERS_OWN:
            console.notice(f"--{name} says how Megatron-LM's own trainer works; nothing depends on it here")
        elif name == "target_modules":
            out[name] = [module for value in values for module in modules_in(value)]
        elif name == "lr_decay_style":
            if value not in DECAY:
                raise ConfigError(f"--lr_decay_style does not know {value!r}", hint=f"choose from: {', '.join(DECAY)}")
            out.setdefault("lr_scheduler_type", [DECAY[value]])
        elif name == "cp_comm_type":
            if value not in EXCHANGES or len(values) > 1:
                raise ConfigError(f"--cp_comm_type {' '.join(values)} is not available", hint=f"choose from: {', '.join(EXCHANGES)}")
            if _contexts(said) > 1:
                out["sequence_parallel_kind"] = [EXCHANGES[value]]
        elif name not in ("min_lr", "global_batch_size"):
            if not _is_ours(name) and name in (fields := _fields()):
                extra[name] = _typed(name, values, fields[name])
                continue
            new = RENAMED.get(name, name)
            if new in origin:
                raise ConfigError(f"--{origin[new]} and --{name} say the same", hint="keep one")
            out[new], origin[new] = values, name
    if extra:
        out["megatron_extra_kwargs"] = [json.dumps(_json_object(out.get("megatron_extra_kwargs")) | extra)]
    if "min_lr" in said and (lowest := _number(said, "min_lr", float)) > 0:
        if said.get("lr_decay_style", ["cosine"]) != ["cosine"]:
            raise ConfigError("--min_lr is for --lr_decay_style cosine", hint="remove one of them")
        out["lr_scheduler_type"] = ["cosine_with_min_lr"]
        out["lr_scheduler_kwargs"] = [f'{{"min_lr": {lowest}}}']
    if "global_batch_size" in said:
        out["gradient_accumulation_steps"] = [str(_accumulation(said, world_size))]
    return [word for name, values in out.items() for word in (f"--{name}", *values)]


def _json_object(values: Sequence[str] | None) -> dict[str, Any]:
    """What --megatron_extra_kwargs says itself."""
    text = (values or ["{}"])[0]
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"--megatron_extra_kwargs takes a JSON object, not {text!r}")
    return found


def _accumulation(said: dict[str, list[str]], world_size: int) -> int:
    """Forward passes a step: the global batch divided by the rows that all data parallel processes take at once."""
    total, micro = _number(said, "global_batch_size", int), _number(said, "micro_batch_size", int)
    tp, pp = _number(said, "tensor_model_parallel_size", int), _number(said, "pipeline_model_parallel_size", int)
    copies = world_size // max(tp * pp * _contexts(said), 1)
    if micro < 1 or copies < 1 or total % (micro * copies):
        raise ConfigError(
            f"--global_batch_size {total} is no multiple of --micro_batch_size {micro} x {copies} data parallel processes",
            hint="change one of them",
        )
    return total // (micro * copies)


def _contexts(said: dict[str, list[str]]) -> int:
    """Processes that share a sequence, by Megatron's name or ours."""
    return max(_number(said, name, int) for name in ("context_parallel_size", "sequence_parallel_size"))


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


def check_fields(values: dict[str, Any], taken: Collection[str] = ()) -> None:
    """ConfigError for a name that TransformerConfig does not have, or that the model or another option decides (``taken``)."""
    names = _fields()
    for name in values:
        if name in taken or name in DECIDED:
            raise ConfigError(f"--megatron_extra_kwargs: {name} is decided by the model or by another option", hint="remove it")
        if name not in names:
            match = near(name, names)
            raise ConfigError(
                f"--megatron_extra_kwargs: Megatron-Core's TransformerConfig has no field {name}",
                hint=f"did you mean {match}?" if match else None,
            )


def _is_ours(name: str) -> bool:
    """Whether ``name`` is an option of swift sft, today's or an old one's name."""
    from swift.config import compat
    from swift.config.commands import SftConfig

    return name in RENAMED or name in SftConfig.__dataclass_fields__ or name in compat.RENAMED or compat.refusal(name) is not None


def _fields() -> dict[str, Any]:
    """The fields of TransformerConfig, with their types."""
    module = package.part("transformer.transformer_config")
    return {field.name: field.type for field in dataclasses.fields(module.TransformerConfig)}


def _typed(name: str, values: Sequence[str], kind: Any) -> Any:
    """What ``values`` say, as a truth value, a number or text, whichever the field takes."""
    if len(values) > 1:
        return list(values)
    text = values[0] if values else "true"
    parts = get_args(kind) or (kind,)
    if bool in parts and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in parts:
            with contextlib.suppress(ValueError):
                return number(text)
    if str in parts:
        return text
    raise ConfigError(f"--{name} does not take {text!r} in Megatron-Core", hint="say it in --megatron_extra_kwargs, or remove it")
