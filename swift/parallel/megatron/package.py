"""Megatron-Core itself: imported once, with what it says of packages for CUDA kept off the terminal."""

import contextlib
import logging
import warnings
from typing import Any

from swift.deps import require
from swift.errors import DependencyError, first_line

_LOGGERS = ("megatron.core", "megatron")


def part(name: str) -> Any:
    """The module ``name`` of megatron.core. DependencyError if the package, or another one that it needs, is not installed."""
    try:
        with quiet():
            return require(f"megatron.core.{name}", extra="megatron")
    except ImportError as problem:
        raise DependencyError(
            f"Megatron-Core cannot be imported: {first_line(problem)}", hint="pip install 'swift-llm[megatron]'"
        ) from None


@contextlib.contextmanager
def quiet() -> Any:
    """Within, warnings of its own deprecated parts, of its defaults, and of packages that it looks for are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quiet_logs() -> None:
    """What it logs while it sets up is for its authors."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def has_transformer_engine() -> bool:
    """Whether Megatron-Core has found the package whose layers for CUDA it puts in the place of its own."""
    return bool(part("models.gpt.gpt_layer_specs").HAVE_TE)
