"""Tokenizers. Knows no torch, which the server does without."""

from pathlib import Path
from typing import Any

from swift.errors import ModelError, first_line


def load_tokenizer(path: Path, *, chat_template: str | None = None) -> Any:
    """The tokenizer in ``path``; ``chat_template`` is a Jinja text that replaces its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {first_line(problem)}") from problem
    return with_template(path, tokenizer, chat_template)


def with_template(path: Path, tokenizer: Any, chat_template: str | None) -> Any:
    """``tokenizer``, of the model in ``path``, with another chat template if one is given."""
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no end-of-sequence token", hint="set eos_token in tokenizer_config.json")
    return tokenizer


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills short rows; masked everywhere, so the end-of-sequence token serves if there is none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
