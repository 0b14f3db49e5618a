"""What Megatron-Core is told of a transformers model."""

from collections.abc import Iterable, Sequence
from typing import Any

from swift.parallel.megatron.names import Entry, plan
from swift.parallel.megatron.settings import Settings, read_settings


def describe(model: Any, names: Iterable[str], *, tp: int = 1) -> tuple[Settings, Sequence[Entry]]:
    """(Megatron's settings, what each of its tensors is made of) for the transformers ``model``, whose tensors ``names`` are."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    entries = plan(names, num_experts=experts, is_tied=bool(config.tie_word_embeddings))
    return read_settings(config.to_dict(), entries, tp=tp), entries
