"""Commands about runs."""

import json
from pathlib import Path
from typing import Any

from swift import audit, console
from swift.config.commands import RunsConfig, SftConfig
from swift.errors import CheckpointError, ConfigError
from swift.files import sha256_file
from swift.model.checkpoints import ARGS_FILE, checkpoints_in, find_checkpoint


def run_training(config: SftConfig) -> Any:
    """swift sft, swift pt, swift rlhf."""
    from swift.train.run import train

    return train(config)


def runs_list(config: RunsConfig) -> None:
    """swift runs list [FOLDER]: one line a run."""
    root = Path(config.run or "output")
    if not root.is_dir():
        raise CheckpointError(f"there is no folder {root}", hint="name the folder that holds runs, such as output")
    found = sorted((path.parent for path in root.rglob(ARGS_FILE) if not path.parent.name.startswith("checkpoint-")), key=str)
    rows = [_row(run) for run in found]
    if not rows:
        console.say(f"no runs in {root}")
        return
    console.table(("run", "model", "step", "loss", "eval loss", "checkpoints"), rows)


def _row(run: Path) -> tuple[Any, ...]:
    lines = _metrics(run)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    args = json.loads((run / ARGS_FILE).read_text(encoding="utf-8"))
    return (
        run,
        args.get("model"),
        lines[-1]["step"] if lines else 0,
        f"{losses[-1]:.4f}" if losses else "",
        f"{evaluations[-1]:.4f}" if evaluations else "",
        len(checkpoints_in(run)),
    )


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def runs_show(config: RunsConfig) -> None:
    """swift runs show RUN: its report, in the terminal."""
    run = _run(config)
    report = run / "report.md"
    if report.is_file():
        from rich.markdown import Markdown

        console.rich_console().print(Markdown(report.read_text(encoding="utf-8")))
    else:
        console.say(f"{run} has no report yet: it is going on, or was interrupted", step=len(_metrics(run)))
    for path in checkpoints_in(run):
        console.say(str(path))


def audit_verify(config: RunsConfig) -> None:
    """swift audit RUN, or the folder of an export: exit code 2 if the record or what it names was changed."""
    named = Path(config.run or "")
    run = named if config.run and (named / "audit.jsonl").is_file() else _run(config)
    path = run / "audit.jsonl"
    if not path.is_file():
        raise CheckpointError(f"{run} has no audit record")
    events = audit.verify(path)
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["event"] not in ("checkpoint", "export") or not (run / line.get("checkpoint", "")).is_dir():
            continue
        for name, digest in line["sha256"].items():
            file = run / line.get("checkpoint", "") / name
            if not file.is_file() or sha256_file(file) != digest:
                raise CheckpointError(f"{file} is not the file that was recorded", hint="it was changed after it was written")
    console.say(f"{path}: {events} events, unbroken; all recorded files are as written")


def _run(config: RunsConfig) -> Path:
    if config.run is None:
        raise ConfigError("no run is given", hint="name a run directory: swift runs list shows them")
    return find_checkpoint(config.run)[0]
