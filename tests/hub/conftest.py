"""An own cache and a loopback hub for each test; both clients are pointed at it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.loopback import Loopback, serve


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("USE_HF", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Loopback]:
    with serve() as hub:
        point_at(hub.url, monkeypatch, tmp_path)
        yield hub


def point_at(url: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Both clients read their endpoint from the environment; huggingface_hub did so already when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(home / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "modelscope-cache"))
