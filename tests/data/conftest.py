"""Fixtures of the data tests: a tiny tokenizer, and a way to write rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift.data.render import Rendered
from tests.tiny import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """ChatML without generation markers; no BOS token, EOS is <|im_end|>."""
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON lines, or a text as it is; returns the path."""

    def write(rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def trained(tokenizer: Any) -> Callable[[Rendered], list[str]]:
    """The trained stretches of a rendered example as texts."""

    def trained(rendered: Rendered) -> list[str]:
        runs: list[list[int]] = []
        was_trained = False
        for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
            assert label in (token, -100)
            if label != -100:
                if not was_trained:
                    runs.append([])
                runs[-1].append(token)
            was_trained = label != -100
        return [tokenizer.decode(run) for run in runs]

    return trained


def chat(*texts: str) -> dict[str, Any]:
    """A row of user and assistant messages in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]}
