"""What a model is, told from its files alone: config.json, the headers of its weights, its tokenizer's files."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.hub import cache
from swift.hub.safetensors_header import read_header
from swift.hub.snapshot import Snapshot


@dataclass(frozen=True)
class ModelFacts:
    """``parameters`` counts the stored weights (tied ones once); ``dtypes`` maps types to parameters; None is unknown."""

    architecture: str | None
    parameters: int
    dtypes: dict[str, int]
    context_length: int | None
    vocabulary: int | None
    licence: str | None
    has_chat_template: bool
    quantized: list[str]


def model_facts(snapshot: Snapshot) -> ModelFacts:
    """The facts of ``snapshot``; ModelError if a file of weights is not whole."""
    config = _json(snapshot.path / "config.json")
    text_config = config.get("text_config")
    inner: dict[str, Any] = text_config if isinstance(text_config, dict) else config
    dtypes: Counter[str] = Counter()
    for file in snapshot.files:
        if file.endswith(".safetensors"):
            for dtype, shape in read_header(snapshot.path / file).values():
                dtypes[dtype] += math.prod(shape)
    tokenizer = _json(snapshot.path / "tokenizer_config.json")
    return ModelFacts(
        architecture=next(iter(config.get("architectures") or []), config.get("model_type")),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        context_length=inner.get("max_position_embeddings"),
        vocabulary=inner.get("vocab_size"),
        licence=licence_of(snapshot.path),
        has_chat_template=bool(tokenizer.get("chat_template")) or "chat_template.jinja" in snapshot.files,
        quantized=list((cache.manifest(snapshot.path) or {}).get("quantized") or []),
    )


def size_text(num_bytes: float) -> str:
    """1536 -> "1.5 kB": three digits, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count_text(count: int) -> str:
    """134515008 -> "134.5 M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def licence_of(path: Path) -> str | None:
    """The licence of the model in ``path``, as its package or its card states it; None if neither does."""
    about = cache.manifest(path) or {}
    return about.get("licence") or _card_licence(path / "README.md")


def _card_licence(card: Path) -> str | None:
    """The ``license:`` line in the front matter of a model card."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not text.startswith("---"):
        return None
    for line in text.split("\n---", 1)[0].splitlines():
        if line.startswith("license:"):
            return line.partition(":")[2].strip().strip("'\"") or None
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
