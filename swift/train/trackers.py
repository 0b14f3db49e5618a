"""Where a run reports: logging.jsonl (as ms-swift writes it), metrics.jsonl, TensorBoard, the screen."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift import console, deps
from swift.errors import DependencyError
from swift.files import write_text

# What a line on the screen shows, and under which name; the files hold everything.
SHOWN = {
    "loss": "loss",
    "token_acc": "accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "tokens_per_s": "tokens/s",
    "eval_loss": "eval_loss",
    "eval_token_acc": "eval_accuracy",
    "eval_rewards/accuracies": "eval_accuracy",
}


class Trackers:
    """Writes each logged line everywhere. ``start`` is the step a resumed run starts at: later lines are cut off.

    ``shown`` are names that the screen shows beside the usual ones. One of several processes ``writes``.
    """

    def __init__(
        self,
        run: Path,
        *,
        report_to: list[str],
        is_explicit: bool,
        logging_dir: str | None,
        start: int,
        total: int,
        plain: bool,
        shown: Sequence[str] = (),
        writes: bool = True,
    ) -> None:
        self.writes = writes
        self.run = run
        self.total = total
        self.shown = SHOWN | {name: name.removeprefix("eval_") for name in shown}
        self.begin = time.monotonic()
        self.start = start
        for name in ("logging.jsonl", "metrics.jsonl") if writes else ():
            cut_after(run / name, start or -1)  # a run that starts anew evaluates before its first step again
        self._board = None
        if writes and "tensorboard" in report_to:
            self._board = _tensorboard(Path(logging_dir) if logging_dir else run / "runs", start, is_explicit)
        self._bar = None
        if writes and console.is_terminal() and not plain:
            self._bar = console.progress()
            self._bar.start()
            self._task = self._bar.add_task("train", total=total, completed=start, facts="")

    def start_clock(self) -> None:
        """The time of the steps begins now: what came before (an evaluation) says nothing of how long they take."""
        self.begin = time.monotonic()

    def step(self, step: int) -> None:
        """Move the display."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, epoch: float, values: dict[str, float]) -> dict[str, Any]:
        """Write one line of numbers everywhere, and return it."""
        elapsed = time.monotonic() - self.begin
        done = max(1, step - self.start)
        remaining = elapsed / done * (self.total - step)
        line = {**values, "epoch": round(epoch, 6)}
        if not self.writes:
            return {"step": step, **line}
        _append(self.run / "metrics.jsonl", {"step": step, **line})
        shown = {key: round(value, 8) for key, value in values.items()}
        _append(
            self.run / "logging.jsonl",
            {
                **shown,
                "epoch": round(epoch, 6),
                "global_step/max_steps": f"{step}/{self.total}",
                "elapsed_time": duration(elapsed),
                "remaining_time": duration(remaining),
                "train_speed(s/it)": round(elapsed / done, 6),
            },
        )
        if self._board is not None:
            for key, value in values.items():
                kind, name = ("eval", key[5:]) if key.startswith("eval_") else ("train", key)
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._show(step, values, remaining)
        return {"step": step, **line}

    def summary(self, facts: dict[str, Any]) -> None:
        """The last line of logging.jsonl: what the run was and where its checkpoints are."""
        if self.writes:
            _append(self.run / "logging.jsonl", facts)

    def _show(self, step: int, values: dict[str, float], remaining: float) -> None:
        console.event("metrics", {"step": step, "max_steps": self.total, **values})
        if console.is_json():
            return
        facts = "  ".join(f"{self.shown[key]} {_short(value)}" for key, value in values.items() if key in self.shown)
        if self._bar is not None:
            if "loss" in values:
                self._bar.update(self._task, facts=f"loss {_short(values['loss'])}")
            self._bar.console.print(f"step {step}/{self.total}  {facts}", highlight=False)
        else:
            console.say(f"step {step}/{self.total}  {facts}  ETA {duration(remaining)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, start: int, is_explicit: bool) -> Any:
    try:
        deps.require("tensorboard", extra="tracking")
    except DependencyError:
        if is_explicit:
            raise
        console.notice("TensorBoard files are not written: pip install 'swift-llm[tracking]' for them, --report_to none for silence")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of a log that a killed run wrote after ``step``, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        at = line.get("step", str(line.get("global_step/max_steps", "")).split("/")[0])
        if at in ("", None) or int(at) > step:
            break
        kept.append(text)
    write_text(path, "".join(text + "\n" for text in kept))


def duration(seconds: float) -> str:
    """``seconds`` as 1h02m, 3m05s or 7s."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
