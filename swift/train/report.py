"""What a run leaves for a reader: report.md, loss.png, plan.json."""

import contextlib
import functools
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from swift.config.commands import RlhfConfig, SftConfig
from swift.data.render import render_prompt
from swift.engine.base import Sampling
from swift.engine.transformers import complete
from swift.files import new_file, write_json, write_text
from swift.train.memory import peak_memory_gib
from swift.train.prepare import Data, preference_rows, rows_read, training_rows, tuner_text
from swift.train.state import TrainState
from swift.train.tasks import LOWER_IS_BETTER
from swift.train.trackers import duration

ANSWER_TOKENS = 160


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages on which a result depends."""
    found = {"python": platform.python_version()}
    for name in ("swift-llm", "torch", "transformers", "peft", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def sample_prompts(tokenizer: Any, data: Data, config: SftConfig) -> list[tuple[list[int], str, str]]:
    """(prompt tokens, prompt text, expected answer) of the first validation rows that end in an answer."""
    found: list[tuple[list[int], str, str]] = []
    for record in data.validation_records:
        if len(found) == config.report_samples:
            break
        if config.use_chat_template is False or record.messages[-1].role != "assistant":
            continue
        ids = render_prompt(record.messages[:-1], tokenizer, tools=record.tools)
        found.append((ids, record.messages[-2].text() if len(record.messages) > 1 else "", record.messages[-1].text()))
    return found


def answers(model: Any, tokenizer: Any, data: Data, config: SftConfig) -> list[str]:
    """Greedy answers of ``model`` to the sample prompts."""
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0)
    return [complete(model, tokenizer, [ids], sampling)[0].text for ids, _, _ in sample_prompts(tokenizer, data, config)]


def write(
    run: Path,
    config: SftConfig,
    model: Any,
    tokenizer: Any,
    data: Data,
    state: TrainState,
    device: torch.device,
    *,
    before: list[str] | None,
    planned: dict[str, Any],
    tasks: Sequence[str] = (),
) -> None:
    """Write report.md, loss.png and plan.json, with what else was ``planned``, into the run directory.

    ``tasks`` are the metrics that stand for the tasks that were evaluated; they get a plot of their own, tasks.png.
    """
    plot_losses(run / "loss.png", state)
    if tasks:
        plot_tasks(run / "tasks.png", state, tasks)
    was_training = model.training
    model.eval()
    after = answers(model, tokenizer, data, config)
    if before is None and after:
        with model.disable_adapter():
            before = answers(model, tokenizer, data, config)
    model.train(was_training)
    measured = {"peak_memory_gib": peak_memory_gib(device), "train_seconds": round(state.train_seconds, 3)}
    write_json(run / "plan.json", {"planned": {"steps": state.max_steps, **data.rows.stats(), **planned}, "measured": measured})
    samples = [
        f"**Prompt**\n\n{_quote(text)}\n\n**Before**\n\n{_quote(old)}\n\n**After**\n\n{_quote(new)}\n\n**Expected**\n\n{_quote(expected)}\n"
        for (_, text, expected), old, new in zip(sample_prompts(tokenizer, data, config), before or [], after, strict=bool(before))
    ]
    write_text(run / "report.md", _report(config, data, state, measured, samples, tasks))


def _report(config: SftConfig, data: Data, state: TrainState, measured: dict[str, Any], samples: list[str], tasks: Sequence[str]) -> str:
    seconds = max(state.train_seconds, 1e-9)
    evaluations = [line for line in state.log_history if "eval_loss" in line]
    rows = [
        ("model", config.model),
        ("tuner", tuner_text(config)),
        *preference_rows(config),
        *(rows_read(data.stream) if data.stream else training_rows(data)),
        ("steps", f"{state.global_step} of {state.max_steps}"),
        ("time in steps", duration(state.train_seconds)),
        ("speed", f"{state.tokens / seconds:,.0f} tokens/s, {_items_text(config, state.supervised_tokens / seconds)}"),
        ("computed", computed_text(state)),
        ("peak memory", f"{measured['peak_memory_gib']:.2f} GiB measured"),
        ("validation loss", " -> ".join(f"{line['eval_loss']:.4f}" for line in _first_and_last(evaluations)) or "not measured"),
        ("best step", f"{state.best_step} ({state.best_metric:.4f})" if state.best_metric is not None else "-"),
        *((name, value) for name, value in versions().items()),
    ]
    parts = ["# Training report", "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)]
    parts.append("![loss](loss.png)")
    if tasks:
        parts += ["## Tasks", tasks_table(state, tasks), "![tasks](tasks.png)"]
    if samples:
        parts += ["## Answers before and after", *samples]
    return "\n\n".join(parts) + "\n"


def _items_text(config: SftConfig, speed: float) -> str:
    return f"{speed:,.2f} pairs/s" if isinstance(config, RlhfConfig) else f"{speed:,.0f} trained tokens/s"


def tasks_table(state: TrainState, tasks: Sequence[str]) -> str:
    """Each task's metric at the first and the last evaluation, with its 95% interval, and at the best one, as Markdown."""
    rows = ["| metric | first | last | best |", "|---|---|---|---|"]
    for name in tasks:
        lines = [line for line in state.log_history if f"eval_{name}" in line]
        if not lines:
            continue
        choose = min if name.endswith(LOWER_IS_BETTER) else max
        best = choose([line for line in lines if line["step"]] or lines, key=lambda line: line[f"eval_{name}"])
        rows.append(f"| {name} | " + " | ".join(_with_interval(line, f"eval_{name}") for line in (lines[0], lines[-1], best)) + " |")
    return "\n".join(rows) + "\n\nIn brackets the 95% interval, which says how far other examples of the same kind could lie."


def _with_interval(line: dict[str, Any], key: str) -> str:
    interval = f" [{line[key + '_low']:.4f}, {line[key + '_high']:.4f}]" if f"{key}_low" in line else ""
    return f"{line[key]:.4f}{interval} at step {line['step']}"


def plot_tasks(path: Path, state: TrainState, tasks: Sequence[str]) -> None:
    """The metric of each task over steps, with its 95% interval, as a PNG; one panel a task, since scales differ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(tasks)), dpi=120, layout="constrained")
    panels = figure.subplots(len(tasks), squeeze=False, sharex=True)
    for axes, name in zip(panels[:, 0], tasks, strict=True):
        lines = [line for line in state.log_history if f"eval_{name}" in line]
        steps = [line["step"] for line in lines]
        ends = [[line.get(f"eval_{name}_{end}", line[f"eval_{name}"]) for line in lines] for end in ("low", "high")]
        axes.fill_between(steps, *ends, alpha=0.2, linewidth=0)
        axes.plot(steps, [line[f"eval_{name}"] for line in lines], "o-", markersize=4)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("step")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def computed_text(state: TrainState) -> str:
    """How many tokens the forward passes had, beside those of the rows."""
    text = f"{state.computed_tokens:,} tokens for the {state.tokens:,} of the rows"
    if state.computed_tokens < state.tokens:
        return f"{text}: {1 - state.computed_tokens / state.tokens:.0%} saved, beginnings that rows share are computed once"
    if state.computed_tokens > state.tokens:
        return f"{text}: {state.computed_tokens / state.tokens - 1:.0%} more, padding"
    return text


def _first_and_last(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lines if len(lines) < 2 else [lines[0], lines[-1]]


def plot_losses(path: Path, state: TrainState) -> None:
    """Training and validation loss over steps, as a PNG."""
    from matplotlib.figure import Figure  # pyplot takes longer to import, and keeps every figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.add_axes((0.1, 0.13, 0.87, 0.83))  # the place is known: to find it takes longer than to draw
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in state.log_history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    is_of_pairs = any("rewards/margins" in line for line in state.log_history)
    axes.set_ylabel("loss of a pair" if is_of_pairs else "loss (nats a token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines()) or "> (nothing)"
