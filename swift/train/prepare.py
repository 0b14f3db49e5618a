"""Before the model loads: data read, checked and tokenized, open options filled, and what will happen told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift import console
from swift.config.commands import PtConfig, RlhfConfig, SftConfig
from swift.data import pool
from swift.data.encode import Options, encode_with
from swift.data.encoded import Encoded
from swift.data.feed import Feed, Mixture
from swift.data.identity import Identity
from swift.data.load import load_records
from swift.data.records import Record, Rejected
from swift.data.rows import Rules
from swift.data.sources import parse_spec
from swift.data.spool import Joined
from swift.data.stream import Stream
from swift.errors import ConfigError
from swift.hub import Snapshot
from swift.hub.cache import cache_root
from swift.model.load import context_length
from swift.model.template import read_system, read_template
from swift.model.tokenizer import load_tokenizer
from swift.train.optim import warmup_steps
from swift.train.reference import reference_text
from swift.train.state import TrainState
from swift.train.steps import Steps

ROWS_PER_STEP = 16


@dataclass(frozen=True)
class Data:
    """Everything that is known of the data before the model loads."""

    tokenizer: Any
    rows: Encoded | Stream
    """The training rows: all of them, or (--streaming true) read as they are needed."""
    validation: Encoded | None
    validation_records: Sequence[Record]
    rejected: Sequence[Rejected]
    """Rejected rows that are known already; a stream has more to come."""

    @property
    def train(self) -> Encoded:
        assert isinstance(self.rows, Encoded)
        return self.rows

    @property
    def stream(self) -> Stream | None:
        return self.rows if isinstance(self.rows, Stream) else None


def prepare_data(config: SftConfig, snapshot: Snapshot) -> Data:
    """Rows as tokens. Raises DataError before any model is loaded."""
    if config.streaming:
        return _prepare_stream(config, snapshot)
    loaded = load_records(
        config.dataset,
        split_ratio=config.split_dataset_ratio,
        interleave_prob=config.interleave_prob,
        stopping_strategy=config.stopping_strategy,
        shuffle=config.dataset_shuffle,
        **_loading(config),
    )
    if config.dataset_num_proc is None:
        num_proc = max(loaded.num_proc, pool.usual() if len(loaded.train) >= pool.MANY_ROWS else 1)
        config.derive("dataset_num_proc", num_proc, f"{len(loaded.train):,} rows")
        if num_proc > 1:
            console.notice(f"{len(loaded.train):,} rows: {num_proc} processes tokenize (--dataset_num_proc)")
    tokenizer = _tokenizer(config, snapshot)
    train = _encode(config, loaded.train, tokenizer)
    validation = _encode(config, loaded.validation, tokenizer) if loaded.validation else None
    rejected = Joined(loaded.rejected, train.rejected, *([validation.rejected] if validation else []))
    return Data(tokenizer, train, validation, loaded.validation, rejected)


def _prepare_stream(config: SftConfig, snapshot: Snapshot) -> Data:
    """The training rows as a stream; the validation rows, which are few, read and tokenized."""
    loading = _loading(config)
    rules = Rules(
        want=loading["want"],
        columns=dict(config.columns or {}),
        strict=config.strict,
        system=loading["system"],
        identity=Identity.of(config.model_name, config.model_author),
    )
    hub_options = {"use_hf": config.use_hf, "token": config.hub_token, "offline": config.offline}
    feeds = [Feed(parse_spec(name), rules, hub_options) for name in config.dataset]
    records: Sequence[Record] = []
    parts: list[Sequence[Rejected]] = []
    if config.val_dataset:
        loaded = load_records(config.val_dataset, shuffle=config.val_dataset_shuffle, **{**loading, "val_datasets": ()})
        records, parts = loaded.train, [loaded.rejected]
    elif config.streaming_val_size:
        held = feeds[0].hold_out(config.streaming_val_size)
        records, parts = [row.record for row in held], [[item for row in held for item in row.rejected]]
    if config.dataset_num_proc is None:
        config.derive("dataset_num_proc", 1, "streaming")
    tokenizer = _tokenizer(config, snapshot)
    validation = _encode(config, records, tokenizer) if records else None
    stream = Stream(
        Mixture(feeds, probabilities=config.interleave_prob, stopping_strategy=config.stopping_strategy, seed=config.data_seed),
        tokenizer,
        _options(config),
        block_rows=config.shuffle_buffer_size,
        seed=config.data_seed,
        shuffle=config.dataset_shuffle,
        max_rejected=config.max_rejected,
        num_proc=config.dataset_num_proc or 1,
    )
    return Data(tokenizer, stream, validation, records, Joined(*parts, *([validation.rejected] if validation else [])))


def _loading(config: SftConfig) -> dict[str, Any]:
    """The options of load_records that training and validation rows share."""
    return {
        "want": objective_of(config),
        "columns": config.columns,
        "strict": config.strict,
        "max_rejected": config.max_rejected,
        "data_seed": config.data_seed,
        "shuffle_validation": config.val_dataset_shuffle,
        "model_name": config.model_name,
        "model_author": config.model_author,
        "system": read_system(config.system),
        "val_datasets": config.val_dataset,
        "use_hf": config.use_hf,
        "hub_token": config.hub_token,
        "offline": config.offline,
        "num_proc": config.dataset_num_proc,
    }


def _tokenizer(config: SftConfig, snapshot: Snapshot) -> Any:
    return load_tokenizer(snapshot.path, chat_template=read_template(config.chat_template))


def _options(config: SftConfig) -> Options:
    return Options(
        objective=objective_of(config),
        max_length=config.max_length,
        truncation_strategy=config.truncation_strategy,
        loss_scale=config.loss_scale or "default",
        use_chat_template=config.use_chat_template is not False,
        chat_template=None,
        enable_thinking=config.enable_thinking,
    )


def _encode(config: SftConfig, records: Sequence[Record], tokenizer: Any) -> Encoded:
    return encode_with(
        records,
        tokenizer,
        _options(config),
        num_proc=config.dataset_num_proc or 1,
        cache_dir=cache_root() / "tokens" if config.load_from_cache_file else None,
    )


def objective_of(config: SftConfig) -> str:
    """The kind of rows: "pt" for plain text whose every token is trained, "sft" for conversations, "preference" for pairs of them."""
    if isinstance(config, RlhfConfig):
        return "preference"
    return "pt" if isinstance(config, PtConfig) else "sft"


def command_of(rows: str) -> str:
    """The command that trains on such ``rows``."""
    return {"preference": "rlhf"}.get(rows, rows)


def fill_open_options(
    config: SftConfig, snapshot: Snapshot, data: Data | None = None, *, metrics: Sequence[str] = (), readers: int = 1
) -> None:
    """Give every option that was left open its value, and remember why. With ``data``, those that depend on it too.

    ``metrics`` are those of the tasks that are evaluated; ``readers`` the processes that see different rows.
    """
    if config.max_length is None and (length := context_length(snapshot.path)):
        config.derive("max_length", length, "the model's context length")
    if config.learning_rate is None:
        rate = 1e-5 if config.tuner_type == "full" else 1e-4
        config.derive("learning_rate", rate, f"tuner_type {config.tuner_type}")
    if config.gradient_accumulation_steps is None:
        steps = max(1, -(-ROWS_PER_STEP // (config.per_device_train_batch_size * readers)))
        config.derive("gradient_accumulation_steps", steps, f"{ROWS_PER_STEP} rows a step")
    if config.output_dir is None:
        config.derive("output_dir", str(Path("output") / snapshot_name(config, snapshot)), "the model's name")
    if data is None:
        return
    if data.validation is None and metrics:
        if not config.said("metric_for_best_model"):
            config.derive("metric_for_best_model", metrics[0], "no validation data")
        if config.metric_for_best_model.removeprefix("eval_") in config.loss_metrics:
            raise ConfigError(
                f"--metric_for_best_model {config.metric_for_best_model} needs validation data",
                hint=f"give --val_dataset, or say --metric_for_best_model {metrics[0]}",
            )
    if data.validation is None and not metrics:
        if (
            config.eval_strategy in ("steps", "epoch")
            or config.eval_on_start
            or config.early_stop_interval
            or config.load_best_model_at_end
        ):
            raise ConfigError(
                "evaluation is asked for, but there is no validation data",
                hint="give --val_dataset, --split_dataset_ratio 0.01, or tasks: --eval_dataset mmlu",
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


def plan_rows(config: SftConfig, snapshot: Snapshot, data: Data, steps: Steps, tasks: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What the run will do, as rows of a table; ``tasks`` say what is evaluated beside the validation rows."""
    rows = [
        ("model", f"{config.model} at {snapshot.path}"),
        *(stream_rows(config) if data.stream else training_rows(data)),
        ("validation rows", f"{len(data.validation):,}" if data.validation else "none"),
        ("packs" if config.packing else "rows", _units_text(config, data, steps)),
        ("steps", _steps_text(config, data, steps)),
        ("tuner", tuner_text(config)),
        *preference_rows(config),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_scheduler_type}"),
        *(("task", task) for task in tasks),
        ("evaluation", config.eval_strategy if config.eval_strategy != "steps" else f"every {config.eval_steps} steps"),
        ("checkpoints", config.save_strategy if config.save_strategy != "steps" else f"every {config.save_steps} steps and at the end"),
    ]
    return [(name, str(value)) for name, value in rows]


def tuner_text(config: SftConfig) -> str:
    return f"lora, rank {config.lora_rank}, alpha {config.lora_alpha:g}" if config.tuner_type == "lora" else config.tuner_type


def preference_rows(config: SftConfig) -> list[tuple[str, str]]:
    """What pairs are trained by, and compared with."""
    if not isinstance(config, RlhfConfig):
        return []
    names = config.loss_type or []
    weights = config.loss_weights or [1.0] * len(names)
    losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True))
    smoothed = f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""
    nll = f", plus {config.rpo_alpha:g} times the cross-entropy of the chosen answer" if config.rpo_alpha is not None else ""
    return [("objective", f"{config.rlhf_type}, {losses}, beta {config.beta:g}{smoothed}{nll}"), ("reference", reference_text(config))]


def training_rows(data: Data) -> list[tuple[str, str]]:
    """What the training rows are, and all that was left out of them."""
    stats = data.train.stats()
    cut = f"{stats['truncated']:,} rows, {stats['tokens_cut']:,} tokens" if stats["truncated"] else "none"
    rejected = f"{len(data.rejected):,}"
    if stats["too_long"]:
        rejected += f", {stats['too_long']:,} of them longer than max_length ({stats['tokens_too_long']:,} tokens)"
    rows = [
        ("training rows", f"{len(data.train):,} ({stats['tokens']:,} tokens, {stats['trained_tokens']:,} of them trained)"),
        ("longest row", f"{stats['max_length']:,} tokens"),
        ("rejected rows", rejected),
        ("cut to max_length", cut),
    ]
    return [*rows, ("split in pieces", f"{stats['split']:,} rows")] if stats["split"] else rows


def stream_rows(config: SftConfig) -> list[tuple[str, str]]:
    mixed = f", mixed {' '.join(f'{value:g}' for value in config.interleave_prob)}" if config.interleave_prob else ""
    return [
        ("training rows", f"unknown: read while training, {config.shuffle_buffer_size:,} at a time{mixed}"),
        ("longest row", f"at most {config.max_length:,} tokens" if config.max_length else "unknown"),
        ("rejected rows", f"counted as they come; the run ends above {config.max_rejected:.0%}"),
    ]


def rows_read(stream: Stream) -> list[tuple[str, str]]:
    """What a stream has read, and all that was left out, up to the last block."""
    stats = stream.stats()
    return [
        ("training rows", f"{stats['examples']:,} read ({stats['tokens']:,} tokens), {stats['passes']} passes over the data"),
        ("rejected rows", f"{stats['rejected']:,} of {stats['rows']:,}"),
        ("cut to max_length", f"{stats['truncated']:,} rows, {stats['tokens_cut']:,} tokens" if stats["truncated"] else "none"),
    ]


def _units_text(config: SftConfig, data: Data, steps: Steps) -> str:
    cutting = steps.cutting
    text = f"{cutting.units_per_step} a step = batch {cutting.rows_per_batch} x accumulation {config.gradient_accumulation_steps}"
    text += f" x {cutting.readers} processes" if cutting.readers > 1 else ""
    if not config.packing:
        return text
    number = "" if data.stream or steps.packs is None else f"{len(steps.packs):,}, "
    return f"{number}{text}; at most {cutting.packing_length:,} tokens each"


def _steps_text(config: SftConfig, data: Data, steps: Steps) -> str:
    warmup = f"{warmup_steps(config, steps.total)} of warm-up"
    return f"{steps.total} ({warmup})" if data.stream else f"{steps.total} ({steps.per_epoch} an epoch, {warmup})"


def advise(config: SftConfig, data: Data) -> None:
    """Warnings from practice, each with what to do."""
    if config.tuner_type == "lora":
        if config.lora_rank < 8:
            console.warn(f"--lora_rank {config.lora_rank}: a rank below 8 seldom learns more than style; try 8 to 64")
        if not config.lora_rank <= config.lora_alpha <= 4 * config.lora_rank and not config.use_rslora:
            usual = f"twice the rank ({2 * config.lora_rank}) is the usual choice"
            console.warn(f"--lora_alpha {config.lora_alpha:g} with rank {config.lora_rank}: {usual}")
        if config.lora_dropout == 0 and not data.stream and len(data.train) < 1000:
            console.warn(f"--lora_dropout 0 on {len(data.train)} rows: small data is soon learned by heart; 0.05 to 0.1 helps")
    if data.rejected:
        first = data.rejected[0]
        console.warn(f"{len(data.rejected)} rows are rejected and kept in rejected.jsonl; the first: {first.source}: {first.reason}")


def rows_of_a_step(config: SftConfig, saved: TrainState | None, readers: int) -> int | None:
    """Rows of a step, of all readers, when the run that was ``saved`` goes on among another number of them: as many as before."""
    if saved is None or saved.units_per_step is None or saved.readers == readers:
        return None
    assert config.gradient_accumulation_steps is not None
    if config.per_device_train_batch_size * config.gradient_accumulation_steps * readers != saved.units_per_step:
        console.notice(f"the run goes on in {readers} processes, not {saved.readers}: a step keeps its {saved.units_per_step} rows")
    return saved.units_per_step
