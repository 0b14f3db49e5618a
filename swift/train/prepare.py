"""Before the model loads: data read, checked and tokenized, open options filled, and what will happen told."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift import console
from swift.config.commands import PtConfig, SftConfig
from swift.data.encode import encode
from swift.data.encoded import Encoded
from swift.data.load import load_records
from swift.data.records import Record, Rejected
from swift.errors import ConfigError
from swift.hub import Snapshot
from swift.hub.cache import cache_root
from swift.model.load import context_length, load_tokenizer
from swift.model.template import read_system, read_template
from swift.train.optim import warmup_steps
from swift.train.steps import Steps, total_steps

ROWS_PER_STEP = 16


@dataclass(frozen=True)
class Data:
    """Everything that is known of the data before the model loads."""

    tokenizer: Any
    train: Encoded
    validation: Encoded | None
    validation_records: list[Record]
    rejected: list[Rejected]


def prepare_data(config: SftConfig, snapshot: Snapshot) -> Data:
    """Rows as tokens. Raises DataError before any model is loaded."""
    loaded = load_records(
        config.dataset,
        want=objective_of(config),
        columns=config.columns,
        strict=config.strict,
        max_rejected=config.max_rejected,
        data_seed=config.data_seed,
        shuffle=config.dataset_shuffle,
        shuffle_validation=config.val_dataset_shuffle,
        model_name=config.model_name,
        model_author=config.model_author,
        system=read_system(config.system),
        split_ratio=config.split_dataset_ratio,
        val_datasets=config.val_dataset,
        use_hf=config.use_hf,
        hub_token=config.hub_token,
        offline=config.offline,
    )
    tokenizer = load_tokenizer(snapshot.path, chat_template=read_template(config.chat_template))
    train = _encode(config, loaded.train, tokenizer)
    validation = _encode(config, loaded.validation, tokenizer) if loaded.validation else None
    rejected = [*loaded.rejected, *train.rejected, *(validation.rejected if validation else [])]
    return Data(tokenizer, train, validation, loaded.validation, rejected)


def _encode(config: SftConfig, records: list[Record], tokenizer: Any) -> Encoded:
    return encode(
        records,
        tokenizer,
        max_length=config.max_length,
        truncation_strategy=config.truncation_strategy,
        objective=objective_of(config),
        use_chat_template=config.use_chat_template is not False,
        loss_scale=config.loss_scale or "default",
        enable_thinking=config.enable_thinking,
        num_proc=config.dataset_num_proc,
        cache_dir=cache_root() / "tokens" if config.load_from_cache_file else None,
    )


def objective_of(config: SftConfig) -> str:
    """The kind of rows: "pt" for plain text whose every token is trained, "sft" for conversations."""
    return "pt" if isinstance(config, PtConfig) else "sft"


def fill_open_options(config: SftConfig, snapshot: Snapshot, data: Data | None = None) -> None:
    """Give every option that was left open its value, and remember why. With ``data``, those that depend on it too."""
    if config.max_length is None and (length := context_length(snapshot.path)):
        config.derive("max_length", length, "the model's context length")
    if config.learning_rate is None:
        rate = 1e-4 if config.tuner_type == "lora" else 1e-5
        config.derive("learning_rate", rate, f"tuner_type {config.tuner_type}")
    if config.gradient_accumulation_steps is None:
        steps = max(1, -(-ROWS_PER_STEP // config.per_device_train_batch_size))
        config.derive("gradient_accumulation_steps", steps, f"{ROWS_PER_STEP} rows a step")
    if config.output_dir is None:
        config.derive("output_dir", str(Path("output") / snapshot_name(config, snapshot)), "the model's name")
    if data is None:
        return
    if data.validation is None:
        if (
            config.eval_strategy in ("steps", "epoch")
            or config.eval_on_start
            or config.early_stop_interval
            or config.load_best_model_at_end
        ):
            raise ConfigError(
                "evaluation is asked for, but there is no validation data", hint="give --val_dataset or --split_dataset_ratio 0.01"
            )
        config.derive("eval_strategy", "no", "no validation data")
    elif config.eval_strategy is None:
        strategy = "no" if config.do_eval is False else "steps" if config.save_strategy == "no" else config.save_strategy
        config.derive("eval_strategy", strategy, "as save_strategy")
    if config.eval_steps is None:
        config.derive("eval_steps", config.save_steps, "as save_steps")
    if config.early_stop_interval and config.eval_strategy == "no":
        raise ConfigError("--early_stop_interval needs evaluation", hint="remove --eval_strategy no")


def snapshot_name(config: SftConfig, snapshot: Snapshot) -> str:
    """The last part of the model's reference, fit for a folder name."""
    reference = (config.model or snapshot.reference).split("@")[0].split("::")[-1].rstrip("/")
    return Path(reference).name


def plan_steps(config: SftConfig, data: Data) -> Steps:
    accumulation, batch = config.gradient_accumulation_steps, config.per_device_train_batch_size
    assert accumulation is not None
    rows = batch * accumulation
    lengths = data.train.lengths.tolist()
    return Steps(
        lengths=lengths,
        rows_per_step=rows,
        rows_per_batch=batch,
        total=total_steps(len(lengths), rows, epochs=config.num_train_epochs, max_steps=config.max_steps),
        seed=config.data_seed,
        shuffle=config.train_dataloader_shuffle,
        group_by_length=config.group_by_length,
    )


def plan_rows(config: SftConfig, snapshot: Snapshot, data: Data, steps: Steps) -> list[tuple[str, str]]:
    """What the run will do, as rows of a table."""
    stats = data.train.stats()
    rows = [
        ("model", f"{config.model} at {snapshot.path}"),
        ("training rows", f"{len(data.train):,} ({stats['tokens']:,} tokens, {stats['trained_tokens']:,} of them trained)"),
        ("longest row", f"{stats['max_length']:,} tokens"),
        ("validation rows", f"{len(data.validation):,}" if data.validation else "none"),
        ("rejected rows", f"{len(data.rejected):,}"),
        ("cut rows", f"{stats['truncated']:,}"),
        ("rows a step", f"{steps.rows_per_step} = batch {steps.rows_per_batch} x accumulation {config.gradient_accumulation_steps}"),
        ("steps", f"{steps.total} ({steps.per_epoch} an epoch, {warmup_steps(config, steps.total)} of warm-up)"),
        ("tuner", f"lora, rank {config.lora_rank}, alpha {config.lora_alpha:g}" if config.tuner_type == "lora" else "full"),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_scheduler_type}"),
        ("evaluation", config.eval_strategy if config.eval_strategy != "steps" else f"every {config.eval_steps} steps"),
        ("checkpoints", config.save_strategy if config.save_strategy != "steps" else f"every {config.save_steps} steps and at the end"),
    ]
    return [(name, str(value)) for name, value in rows]


def advise(config: SftConfig, data: Data) -> None:
    """Warnings from practice, each with what to do."""
    if config.tuner_type == "lora":
        if config.lora_rank < 8:
            console.warn(f"--lora_rank {config.lora_rank}: a rank below 8 seldom learns more than style; try 8 to 64")
        if not config.lora_rank <= config.lora_alpha <= 4 * config.lora_rank and not config.use_rslora:
            usual = f"twice the rank ({2 * config.lora_rank}) is the usual choice"
            console.warn(f"--lora_alpha {config.lora_alpha:g} with rank {config.lora_rank}: {usual}")
        if config.lora_dropout == 0 and len(data.train) < 1000:
            console.warn(f"--lora_dropout 0 on {len(data.train)} rows: small data is soon learned by heart; 0.05 to 0.1 helps")
    if data.rejected:
        first = data.rejected[0]
        console.warn(f"{len(data.rejected)} rows are rejected and kept in rejected.jsonl; the first: {first.source}: {first.reason}")


def refuse_several_processes() -> None:
    """ConfigError when a launcher started more than one process: training is on one device so far."""
    for name in ("WORLD_SIZE", "NPROC_PER_NODE"):
        if os.environ.get(name, "1") not in ("", "1"):
            raise ConfigError(f"{name}={os.environ[name]}: training on several devices is not built yet", hint=f"unset {name}")
