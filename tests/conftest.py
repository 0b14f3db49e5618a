"""One thread, one cache below a temporary folder, no hub: the same for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

from tests.tiny import make_model


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SWIFT_CACHE of the whole session, unless one is given (slow tests then reuse converted models)."""
    root = tmp_path_factory.mktemp("cache")
    os.environ.setdefault("SWIFT_CACHE", str(root))
    return Path(os.environ["SWIFT_CACHE"])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with its tokenizer and a ChatML template."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")
