"""How a user names a model: ``hf::ID``, ``ms::ID``, ``pkg::NAME``, a path, or a bare ``ORG/NAME``; ``@REVISION`` may follow."""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from swift.errors import ConfigError, HubError

LOCAL = "local"
_PREFIXED = re.compile(r"([A-Za-z]\w*)::(.*)", re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[\w][\w.+/-]*", re.ASCII)
_HOW = "name a folder, pkg::NAME, hf::ORG/NAME or ms::ORG/NAME"


@dataclass(frozen=True)
class Reference:
    """``kind`` is a member of the hub registry, ``name`` an id in it (or a path), ``revision`` what was asked for."""

    kind: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        head = self.name if self.kind == LOCAL else f"{self.kind}::{self.name}"
        return f"{head}@{self.revision}" if self.revision else head


def parse(reference: str, *, use_hf: bool | None = None) -> Reference:
    """Read ``reference``; a bare ``ORG/NAME`` goes where ``use_hf`` says, see ``default_hub``.

    An existing path always means that path, whatever it looks like. Raises HubError if the text can name nothing.
    """
    text = reference.strip()
    if not text:
        raise HubError("the model's name is empty", hint=_HOW)
    if _exists(text) or _looks_like_path(text):
        return Reference(LOCAL, text)
    match = _PREFIXED.fullmatch(text)
    kind, rest = (match[1].lower(), match[2]) if match else (None, text)
    if kind == LOCAL:
        return Reference(LOCAL, rest)
    name, at, revision = rest.partition("@")
    if at and not (_REVISION.fullmatch(revision) and ".." not in revision):
        raise HubError(f"{reference}: {revision!r} is no revision", hint="write NAME@BRANCH, NAME@COMMIT or NAME@VERSION")
    if not _ID.fullmatch(name) or ".." in name:
        raise HubError(f"{reference}: no such path, and {name!r} is no id of a hub", hint=_HOW)
    if kind is None and "/" not in name:
        raise HubError(f"{reference}: there is no such path", hint=f"{_HOW}; did you mean pkg::{name} or hf::{name}?")
    return Reference(kind or default_hub(use_hf), name, revision or None)


def with_revision(reference: Reference, revision: str | None) -> Reference:
    """``reference`` at ``revision`` if one is given; ConfigError if the reference says another one."""
    if revision is None or revision == reference.revision:
        return reference
    if reference.revision is not None:
        raise ConfigError(
            f"two revisions of {reference.name}: {reference.revision!r} after the @, and {revision!r}", hint="give only one of them"
        )
    if reference.kind == LOCAL:
        raise ConfigError(f"{reference.name} is a local path: it has no revision {revision!r}", hint="leave the revision out")
    if not (_REVISION.fullmatch(revision) and ".." not in revision):
        raise HubError(f"{revision!r} is no revision", hint="give a branch, a tag, a commit or a version")
    return Reference(reference.kind, reference.name, revision)


def default_hub(use_hf: bool | None = None) -> str:
    """``hf`` or ``ms``: what ``use_hf`` says, else the environment variable USE_HF, else ModelScope if its client is there.

    This is the one place that reads USE_HF.
    """
    if use_hf is None and (said := os.environ.get("USE_HF", "").strip().lower()):
        use_hf = said in ("1", "true", "yes", "on")
    if use_hf is not None:
        return "hf" if use_hf else "ms"
    return "ms" if importlib.util.find_spec("modelscope_hub") is not None or importlib.util.find_spec("huggingface_hub") is None else "hf"


def _looks_like_path(text: str) -> bool:
    return text in (".", "..", "~") or text.startswith(("./", "../", "/", "~"))


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # a name too long for the file system, or an unknown ~user
        return False
