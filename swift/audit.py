"""A tamper-evident record of what happened: one JSON line an event, each holding the hash of the line before.

``hash`` is the SHA-256 of the line's other members in canonical JSON; ``previous`` is the hash of the line
before, or 64 zeros for the first. Changing, dropping or reordering a line breaks the chain.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift.errors import CheckpointError

START = "0" * 64


def append(path: Path, event: str, facts: Mapping[str, Any]) -> str:
    """Add an event to the record at ``path`` and return its hash. The line is on disk when this returns."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
    line["previous"] = _last_hash(path)
    line["hash"] = digest(line)
    with path.open("ab") as file:
        file.write(json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return str(line["hash"])


def verify(path: Path) -> int:
    """The number of events in an unbroken record; CheckpointError names the first line that was changed."""
    previous = START
    count = 0
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            broken = line["previous"] != previous or line["hash"] != digest(line)
        except (ValueError, KeyError, TypeError):
            broken = True
        if broken:
            raise CheckpointError(f"{path}:{number}: the audit record was changed here", hint="nothing after this line can be trusted")
        previous = line["hash"]
        count = number
    return count


def digest(line: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of ``line`` without its own hash, in canonical JSON."""
    content = {key: value for key, value in line.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _last_hash(path: Path) -> str:
    """Hash of the last whole line. A torn last line, left by a kill, is cut off."""
    if not path.exists():
        return START
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    if not whole:
        return START
    return str(json.loads(whole.splitlines()[-1])["hash"])
