"""What became of ranks: which failed first, why, and how a person is told."""

import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift import progress
from swift.errors import Interrupted, SwiftError
from swift.launch import rank
from swift.launch.logs import tail

INTERRUPTED = Interrupted.exit_code


class RankFailed(SwiftError):
    """A rank failed. The command ends as the rank did: with its exit code, or 128 and the number of its signal."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ending:
    """How a rank ended. ``code`` is negative for a signal; ``at`` is time.time() when it was seen, or when it raised its error."""

    rank: int
    code: int
    at: float
    folder: Path
    was_ended: bool = False  # by the launcher, because another had failed
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def how(self) -> str:
        if self.code < 0:
            return f"was ended by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


def ending_of(number: int, code: int, at: float, folder: Path, *, was_ended: bool = False) -> Ending:
    """An Ending with what the rank left of its error."""
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # a rank that was killed left nothing, or half of it
        record = json.loads((folder / "error.json").read_text(encoding="utf-8"))
    return Ending(number, code, float(record.get("time", at)), folder, was_ended, record)


def first_cause(endings: Sequence[Ending]) -> Ending:
    """The rank whose failure made the others fail.

    Not always the one that was seen first: when a rank is killed, those that wait for it fail at once in their collectives.
    So these, and those that the launcher ended, count only when there is no other.
    """

    def order(ending: Ending) -> tuple[bool, bool, bool, float]:
        is_of_others = bool(ending.record.get("is_of_others"))
        # SIGABRT is what the watchdog of NCCL ends a rank with whose peers do not answer. SystemExit leaves no record.
        is_vague = ending.code == -signal.SIGABRT or (ending.code == 1 and not ending.record)
        return ending.was_ended, is_of_others, is_vague, ending.at

    return min((ending for ending in endings if ending.code != 0), key=order)


def may_restart(ending: Ending) -> bool:
    """Whether starting again can help: not when a person has to act, or has stopped the run."""
    return not (ending.record.get("is_ours") or ending.code in (2, INTERRUPTED))


def explain(endings: Sequence[Ending], size: int, folder: Path, memory: "MemoryEvents") -> RankFailed:
    """One error for all that happened: the error of ours that ranks raised, else the block about the rank that failed."""
    first = first_cause(endings)
    if first.record.get("is_ours"):
        same = [ending for ending in endings if ending.record.get("text") == first.record["text"]]
        who = "" if len(same) == len(endings) or first.rank == 0 else f" (said by rank {first.rank} on {socket.gethostname()})"
        return RankFailed(f"{first.record['text']}{who}", hint=first.record.get("hint"), exit_code=first.exit_code)
    if first.code == INTERRUPTED:
        return RankFailed("interrupted", exit_code=INTERRUPTED)
    mark = progress.read(first.folder / "progress")
    lines = [f"rank {first.rank} of {size} on {socket.gethostname()} {first.how}{_when(mark)}"]
    if first.code == -signal.SIGKILL:
        lines.append(f"  {memory.explain(_pid(first))}")
    others = [ending for ending in endings if ending is not first and ending.code != 0 and not ending.was_ended]
    if others:
        lines.append(f"  after it failed: {', '.join(f'rank {ending.rank} ({_short(ending)})' for ending in others)}")
    log = first.folder / "err.log"
    marker = rank.MARKER.format(rank=first.rank)
    last = [line for line in tail(log) if not line.endswith(marker)]
    if not last and first.rank != 0:  # that of rank 0 is on the terminal
        log = first.folder / "out.log"
        last = tail(log)
    lines += [f"  its last lines, of {log}:", *(f"  | {line}" for line in last)] if last else ["  it has printed no error"]
    return RankFailed("\n".join(lines), hint=f"the whole logs of all ranks are in {folder}", exit_code=first.exit_code)


def _when(mark: progress.Mark) -> str:
    if not mark.phase:
        return ""
    return f" in step {mark.step}, {mark.phase}" if mark.step is not None else f", {mark.phase}"


def _short(ending: Ending) -> str:
    message = str(ending.record.get("message", {}).get("message", "")).splitlines()
    return message[0][:100] if message else ending.how


def _pid(ending: Ending) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((ending.folder / "pid").read_text())
    return None


class MemoryEvents:
    """What the kernel counts and writes of processes that it killed for want of memory, from now on."""

    def __init__(
        self, root: Path = Path("/sys/fs/cgroup"), log: Path = Path("/dev/kmsg"), cgroup: Path = Path("/proc/self/cgroup")
    ) -> None:
        self._files = _event_files(root, cgroup)
        self._log = log
        self._before = {path: _killed(path) for path in self._files}

    def explain(self, pid: int | None) -> str:
        """Why a process was killed by SIGKILL that nobody here sent, with the kernel's evidence if there is any."""
        for path, before in self._before.items():
            if (now := _killed(path)) > before:
                return f"out of memory: the kernel killed {now - before} process(es) for it meanwhile (oom_kill in {path})"
        if pid is not None and (line := self._line_about(pid)):
            return f"out of memory: the kernel wrote {line!r}"
        return "out of memory is likely, though no record of the kernel that can be read here says so; else somebody killed it"

    def _line_about(self, pid: int) -> str | None:
        """What the kernel's log says of having killed ``pid`` for memory."""
        found = None
        with contextlib.suppress(OSError):
            descriptor = os.open(self._log, os.O_RDONLY | os.O_NONBLOCK)
            try:
                while record := os.read(descriptor, 8192):
                    for line in record.decode(errors="replace").splitlines():
                        if re.search(rf"[Kk]illed process {pid}\b", line):
                            found = line.rpartition(";")[2]
            finally:
                os.close(descriptor)
        return found


def _event_files(root: Path, cgroup: Path) -> list[Path]:
    """Where the cgroups of this process count: memory.events (version 2) or memory.oom_control (version 1)."""
    files: list[Path] = []
    with contextlib.suppress(OSError):
        for line in cgroup.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers in ("", "memory"):
                for folder in (root / controllers / place.lstrip("/"), root / controllers):
                    files += [folder / name for name in ("memory.events", "memory.oom_control")]
    return [path for path in dict.fromkeys(files) if path.is_file()]


def _killed(path: Path) -> int:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
