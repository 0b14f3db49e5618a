"""Rows to calibrate with."""

import json
from pathlib import Path

import pytest

from tests.quantize.runs import ROWS


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path
