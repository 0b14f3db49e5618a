"""What a run says of itself: which one it goes on from, what it is, and how it ended."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift import audit, console, hub
from swift.config.commands import SftConfig
from swift.config.options import to_dict
from swift.data.collate import documents
from swift.data.load import write_rejected
from swift.errors import ConfigError, TrainingError
from swift.files import write_json, write_text
from swift.model.checkpoints import find_checkpoint
from swift.train import report
from swift.train.prepare import Data, command_of, objective_of
from swift.train.rundir import RunDirectory
from swift.train.state import TrainResult
from swift.train.trackers import duration


def what_to_resume(config: SftConfig) -> tuple[Path | None, Path | None]:
    """(run directory to go on in, checkpoint to take); a model-only resume makes a new run directory."""
    place = config.resume_from_checkpoint
    if place is None or place.lower() == "false":
        return None, None
    run, found = find_checkpoint(config.output_dir or "output" if place.lower() == "true" else place)
    kind = _saved(run).get("objective", objective_of(config))
    if kind != objective_of(config) and not config.resume_only_model:
        command = command_of(str(kind))
        raise ConfigError(f"{run} is a run of swift {command}", hint=f"swift {command} --resume_from_checkpoint {run}")
    if config.resume_only_model:
        if found is None:
            raise ConfigError(f"{run} has no checkpoint whose weights could be taken")
        return None, found
    if found is None:
        console.notice(f"{run} has no checkpoint yet: starting from the beginning")
    return run, found


def describe(run: RunDirectory, config: SftConfig, snapshot: hub.Snapshot, data: Data, *, is_resumed: bool) -> None:
    """What the run is, for later commands and readers."""
    import yaml

    arguments = {**to_dict(config), "objective": objective_of(config)}
    if is_resumed:
        _compare(run, arguments)
    write_json(run / "args.json", {**arguments, "model_dir": str(snapshot.path)})
    write_text(run / "config.yaml", yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True))
    if not (is_resumed and data.stream and (run / "rejected.jsonl").exists()):
        write_rejected(run / "rejected.jsonl", data.rejected)
    facts = {
        "config": audit.digest(arguments),
        "model": snapshot.reference,
        "revision": snapshot.revision,
        "data": data.train.path.name if data.stream is None and data.train.path else None,
        "validation": data.validation.path.name if data.validation and data.validation.path else None,
        "versions": report.versions(),
    }
    audit.append(run / "audit.jsonl", "resume" if is_resumed else "start", facts)


# Options that may change between a run and its resumption without changing what it computes.
HARMLESS = set(
    "output_dir add_version logging_steps logging_first_step logging_dir report_to save_steps save_strategy save_total_limit eval_steps "
    "eval_strategy eval_on_start create_checkpoint_symlink dataset_num_proc dataloader_num_workers load_from_cache_file report_samples "
    "load_best_model_at_end early_stop_interval per_device_eval_batch_size max_shard_size device use_cpu do_eval eval_dataset "
    "eval_dataset_args eval_data_dir eval_limit eval_mode eval_num_fewshot eval_use_evalscope".split()
)


def _saved(run: Path) -> dict[str, object]:
    path = run / "args.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _compare(run: RunDirectory, arguments: dict[str, object]) -> None:
    """Warn of options that were others when the run began."""
    saved = _saved(run.path)
    changed = [name for name in arguments if name not in HARMLESS and name in saved and saved[name] != arguments[name]]
    if changed:
        told = ", ".join(f"{name} was {saved[name]}, is {arguments[name]}" for name in changed)
        console.warn(f"this is no longer the run that was begun: {told}")


def with_rows_dumped(
    problem: TrainingError, run: RunDirectory, step: int, passes: Sequence[Sequence[Any]], tokenizer: Any, reader: str | None
) -> TrainingError:
    """The error with the place of a file that holds the sequences of ``step``, each by itself and whole.

    ``reader`` names the one of several that has seen them; None if another process writes them, "" if there is one alone.
    """
    if reader is not None:
        rows = []
        for example in documents(list(itertools.chain.from_iterable(passes))):
            ids, labels = ([int(value) for value in example[name]] for name in ("input_ids", "labels"))
            rows.append({"input_ids": ids, "labels": labels, "text": tokenizer.decode(ids)})
        write_json(run / f"bad-step-{step}{reader}.json", {"step": step, "problem": problem.message, "rows": rows})
    files = run / (f"bad-step-{step}.json" if reader == "" else f"bad-step-{step}*.json")
    return TrainingError(
        f"step {step}: {problem.message}; its rows are in {files}",
        hint="lower --learning_rate, look at the rows, or train in bf16 or float32",
    )


def say_farewell(config: SftConfig, result: TrainResult) -> None:
    state = result.state
    speed = state.tokens / max(state.train_seconds, 1e-9)
    console.say(
        f"done: {state.global_step} steps in {duration(state.train_seconds)}, {speed:,.0f} tokens/s; report {result.run / 'report.md'}"
    )
    if result.checkpoint is not None:
        console.say(
            f"next: swift chat --adapters {result.checkpoint}" if config.trains_adapter else f"next: swift chat --model {result.checkpoint}"
        )
