"""What a person sees: rich on a terminal, plain lines when piped, one JSON object a line with --json.

Everything here goes to standard output except notices, warnings and errors, which go to standard error.
Only rank 0 speaks.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from swift.errors import SwiftError

_json_mode = False


def use_json(on: bool) -> None:
    """Print every event as one JSON object a line from now on."""
    global _json_mode
    _json_mode = on


def is_json() -> bool:
    return _json_mode


def is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_terminal(stream: TextIO | None = None) -> bool:
    return not _json_mode and (stream or sys.stdout).isatty()


def say(text: str, **facts: Any) -> None:
    """One line for the user; ``facts`` are appended as key=value, or are the members of the JSON event."""
    if not is_main_rank():
        return
    if _json_mode:
        _print_json({"event": "say", "text": text, **facts})
        return
    tail = "".join(f"  {key}={value}" for key, value in facts.items())
    print(text + tail, flush=True)


def event(kind: str, facts: Mapping[str, Any]) -> None:
    """An event that only machines read: printed in JSON mode, silent otherwise."""
    if _json_mode and is_main_rank():
        _print_json({"event": kind, **facts})


def notice(text: str) -> None:
    """A line on standard error that needs no action (a renamed option, a fallback)."""
    _to_stderr("note", text, "cyan")


def warn(text: str) -> None:
    """A line on standard error on which the reader can act."""
    _to_stderr("warning", text, "yellow")


def error(problem: SwiftError) -> None:
    """The one line (and the hint) by which a command fails."""
    if _json_mode:
        print(
            json.dumps({"event": "error", "text": problem.message, "hint": problem.hint}, ensure_ascii=False), file=sys.stderr, flush=True
        )
        return
    _to_stderr("error", problem.message, "red")
    if problem.hint:
        _to_stderr("hint", problem.hint, "cyan")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table: drawn with rich on a terminal, aligned columns when piped, one object a row in JSON mode."""
    if not is_main_rank():
        return
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if _json_mode:
        _print_json({"event": "table", "title": title, "rows": [dict(zip(columns, row, strict=True)) for row in cells]})
        return
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        is_number = bool(cells) and all(_is_number(row[index]) for row in cells)
        drawn.add_column(column, justify="right" if is_number else "left", overflow="fold")
    from rich.text import Text

    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    rich_console().print(drawn)


def rich_console() -> Any:
    """A rich Console on standard output: colours only on a terminal, 100 columns when piped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def progress(*, transient: bool = False) -> Any:
    """A rich Progress for the terminal, disabled when output is piped or JSON."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=rich_console(),
        transient=transient,
        disable=not is_terminal() or not is_main_rank(),
    )


def _to_stderr(label: str, text: str, colour: str) -> None:
    if not is_main_rank():
        return
    if _json_mode:
        print(json.dumps({"event": label, "text": text}, ensure_ascii=False), file=sys.stderr, flush=True)
        return
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        code = {"cyan": 36, "yellow": 33, "red": 31}[colour]
        label = f"\x1b[{code}m{label}\x1b[0m"
    print(f"{label}: {text}", file=sys.stderr, flush=True)


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").rstrip("%"))
    except ValueError:
        return cell == ""
    return True


def quiet_libraries() -> None:
    """Keep off the screen what libraries say to their developers; --debug shows it."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("bitsandbytes", "torchao", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed, which transformers imports when it saves, sets its level itself; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
