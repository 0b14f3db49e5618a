"""The server that another package asks: ``swift deploy`` on loopback with a key of its own, or the one at --eval_url."""

import contextlib
import http.client
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.deploy import DeployConfig
from swift.config.evaluate import EvalConfig
from swift.config.options import options_of
from swift.errors import MachineError
from swift.evaluate.external.base import safe_name
from swift.evaluate.external.process import POLL_S, Child, started
from swift.evaluate.subject import Subject
from swift.evaluate.written import served_at

START_S = 600.0  # a model may be large; a server that fails ends at once
# Said by this module, secret, or of no meaning to a server that answers evaluation alone.
OURS = frozenset(
    "model model_revision adapters hub_token use_hf offline load_args stream stop_words num_beams logprobs top_logprobs max_new_tokens"
    " temperature top_k top_p repetition_penalty".split()
)


@dataclass(frozen=True)
class Served:
    """A server: ``url`` up to /v1, the name by which it knows the model, and its process if it is ours."""

    url: str
    key: str | None
    model: str
    child: Child | None


def words_of(subject: Subject, name: str, key_file: Path) -> list[str]:
    """The command line of the server: what was said of the model and of the engine is said to it."""
    config, source = subject.config, subject.source
    words = ["deploy", "--model", str(source.path)]
    if source.adapter is not None:
        words += ["--adapters", str(source.adapter), "--load_args", "false"]
    words += ["--port", "0", "--api_key", f"@{key_file}", "--served_model_name", name, "--drain_timeout_s", "0", "--offline", "true"]
    for field in options_of(DeployConfig):
        if field.name in OURS or field.name not in type(config).__dataclass_fields__ or field.name not in config.sources:
            continue
        words += [f"--{field.name}", *_written(getattr(config, field.name))]
    return words


def _written(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict | bool) else "none" if value is None else str(value)]


@contextlib.contextmanager
def serving(subject: Subject, log: Path) -> Iterator[Served]:
    """A server of ``subject`` that answers, until the block ends; what it prints goes to ``log``.

    Raises MachineError with its last line if it ends before it answers.
    """
    if subject.config.eval_url is not None:
        yield at_url(subject.config)
        return
    name, key = safe_name(Path(subject.name.removeprefix("pkg::")).name), secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix="swift-eval-") as folder:
        key_file = Path(folder, "key")
        key_file.touch(mode=0o600)
        key_file.write_text(key + "\n", encoding="utf-8")
        log.unlink(missing_ok=True)
        words = ["cli", *words_of(subject, name, key_file)]
        with started("swift deploy", words, log, env=_environment()) as child:
            yield Served(_address(child), key, name, child)


def _environment() -> dict[str, str]:
    """The program must find swift where this process did, and say its address at once."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "PYTHONUNBUFFERED": "1"}


def _address(child: Child) -> str:
    """Where the server listens, once it answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if not child.is_alive:
            raise child.ended()
        said = re.search(r" at (http://\S+/v1) ", child.log.read_text(encoding="utf-8", errors="replace"))
        if said and _is_ready(said[1]):
            return said[1]
        time.sleep(POLL_S)
    raise MachineError(f"{child.name} does not answer after {START_S:.0f} s: {child.told()}", hint=f"see {child.log}")


def _is_ready(url: str) -> bool:
    host = url.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def at_url(config: EvalConfig) -> Served:
    """The server at --eval_url, which must answer, and its model that is meant."""
    endpoint, name = served_at(config)
    return Served(endpoint.url, endpoint.key, name, None)
