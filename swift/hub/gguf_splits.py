"""llama.cpp's ways to split text before byte-level BPE, by the names that GGUF files call them."""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def splits() -> list[dict[str, Any]]:
    """{"pre": name, "splits": regular expressions one after the other, "ignore_merges": bool}, the usual ones first.

    From llama.cpp's src/llama-vocab.cpp, in the syntax that tokenizer.json has; of names that split alike one stands for all.
    """
    rows: list[dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return rows


def pre_tokenizer(way: dict[str, Any]) -> Any:
    """What splits text in this ``way`` in the tokenizers library."""
    from tokenizers import Regex, pre_tokenizers

    parts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in way["splits"]]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
