"""The file of a task: every example as it was answered, one JSON line after the other, so that a stopped run goes on."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swift.errors import DataError, MachineError
from swift.evaluate.base import About, Outcome, TaskResult
from swift.files import explain_os_errors

ITEMS = "items"  # in the folder of the reports


def file_of(folder: Path, model: Mapping[str, Any], about: About) -> Path:
    """Where outcomes of ``about`` lie for the model of these facts. Other questions, or another model, have another name."""
    return folder / ITEMS / f"{model['slug']}-{model['digest'][:8]}" / f"{about.name}-{about.mode}-{about.digest[:8]}.jsonl"


class TaskFile:
    """Outcomes that are there already, and those that are added. ``head`` says which questions were asked of which model."""

    def __init__(self, path: Path, about: About, model: Mapping[str, Any]) -> None:
        """DataError if ``path`` is the file of something else."""
        self.path = path
        self.head = {"about": asdict(about), "model": dict(model)}
        self.done = self._found(about, model)

    def _found(self, about: About, model: Mapping[str, Any]) -> dict[str, Outcome]:
        if not self.path.exists():
            return {}
        with explain_os_errors(self.path):
            raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if not whole:
            return {}
        head, outcomes = read(self.path, whole)
        if head["about"].get("digest") != about.digest or head["model"].get("digest") != model["digest"]:
            raise DataError(f"{self.path} holds answers to other questions", hint="name another --eval_output_dir, or remove it")
        return {outcome.id: outcome for outcome in outcomes}

    @contextmanager
    def appending(self) -> Iterator["TaskFile"]:
        """Within, outcomes can be added, by this process alone. A last line that is not whole is cut off first.

        MachineError if another process is at it.
        """
        with explain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as self._file:
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise MachineError(
                        f"another evaluation answers the same questions, in {self.path}", hint="name another --eval_output_dir"
                    ) from None
                raw = self.path.read_bytes()
                os.truncate(self.path, whole := raw.rfind(b"\n") + 1)
                if not whole:
                    self._line(self.head)
                yield self

    def add(self, outcome: Outcome) -> None:
        self._line(asdict(outcome))
        self.done[outcome.id] = outcome

    def _line(self, value: Any) -> None:
        text = json.dumps(value, ensure_ascii=False)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            text = json.dumps(value)  # half of a pair, which a model can write and UTF-8 cannot
        self._file.write(text + "\n")
        self._file.flush()


def read(path: Path, raw: bytes | None = None) -> tuple[dict[str, Any], list[Outcome]]:
    """The head and the outcomes of a file, in the order in which they were written. DataError for what is none."""
    with explain_os_errors(path):
        raw = path.read_bytes() if raw is None else raw
    try:
        head, *lines = [json.loads(line) for line in raw.decode("utf-8").split("\n") if line]
        assert isinstance(head["about"], dict) and isinstance(head["model"], dict)
        return head, list({line["id"]: Outcome(**line) for line in lines}.values())  # an example that was asked twice counts once
    except (ValueError, TypeError, KeyError, AssertionError):
        raise DataError(f"{path} is no file of answers", hint="remove it, or name another --eval_output_dir") from None


def result_of(file: TaskFile, about: About, ids: Sequence[str], facts: dict[str, float]) -> TaskResult:
    """The outcomes of the examples ``ids``, in their order. The file may hold those of others, which were asked for before."""
    return TaskResult(about, [file.done[id] for id in ids], facts)
