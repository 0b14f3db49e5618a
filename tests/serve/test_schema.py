"""The description of the API against the server, tried by schemathesis with what it makes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEY = "key"


@pytest.mark.slow
def test_the_server_does_what_its_description_says(start, tiny_model, tmp_path):
    """All checks of schemathesis, but that it has to be told what a refusal for the meaning of a request is."""
    server = start(tiny_model, "--served_model_name", "tiny", "--api_key", KEY, "--max_model_len", "256").wait()
    checks = "--checks all --exclude-checks positive_data_acceptance --phases examples,coverage,fuzzing --seed 1 -n 40"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.serve.schema_checks"}
    options = [*checks.split(), "--continue-on-failure", "--no-color"]
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Tested: 11" in done.stdout
    assert server.get("/health")[1]["restarts"] == 0
