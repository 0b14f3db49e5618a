"""One tool for the whole life of a large language model; the names below load on first use (PEP 562)."""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "get_model": "swift.api",
    "load_dataset": "swift.api",
    "sft": "swift.api",
    "pt": "swift.api",
    "rlhf": "swift.api",
    "infer": "swift.api",
    "merge_lora": "swift.api",
    "export_model": "swift.api",
    "quantize_model": "swift.api",
    "export_awq_model": "swift.api",
    "evaluate_model": "swift.api",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'swift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
