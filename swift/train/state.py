"""What a run must remember, besides weights and optimizer, to go on bit for bit."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from swift.errors import CheckpointError


@dataclass(kw_only=True)
class TrainState:
    """Counters of a run. Random numbers follow from ``global_step`` and the seed, and so do the rows unless they are streamed."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    supervised_tokens: int = 0
    train_seconds: float = 0.0
    readers: int = 1  # processes that see different rows
    units_per_step: int | None = None  # rows or packs of a step, of all readers
    place: dict[str, Any] | None = None  # in a stream; else it follows from global_step
    rejected: int = 0  # rows of a stream that were not trained on so far
    window_loss: float = 0.0  # loss and metrics since the last logged line, as sums
    window_count: float = 0.0
    window_steps: int = 0
    window_metrics: dict[str, float] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"format": "swift-llm 1", **asdict(self)}


@dataclass(frozen=True)
class TrainResult:
    """Where a run is, what it reached, and its newest checkpoint (None with --save_strategy no)."""

    run: Path
    checkpoint: Path | None
    state: TrainState


def read_state(path: Path) -> TrainState:
    """The state in a checkpoint's trainer_state.json; CheckpointError if another program wrote it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be read: {problem}") from None
    if raw.get("format") != "swift-llm 1":
        raise CheckpointError(
            f"{path.parent} was not written by this program, so its optimizer state cannot be taken over",
            hint="--resume_only_model true takes its weights",
        )
    return TrainState(**{item.name: raw[item.name] for item in fields(TrainState) if item.name in raw})
