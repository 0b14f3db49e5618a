"""The package deepspeed: imported for the right device, without compiling what is not needed, and quiet."""

import logging
import os
import sys
import warnings
from typing import Any

from swift import deps
from swift.hub.cache import cache_root

EXTRA = "deepspeed"


def load(device_type: str) -> Any:
    """The package, for devices of ``device_type``. DependencyError if it is not installed.

    What it compiles at run time (its Adam for a CPU, its reader of disks) is kept in our own cache: another program's
    build that was interrupted leaves a lock, on which the next one waits for ever.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_root() / "torch_extensions"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = part("deepspeed")
    # Collectives through shared memory between the processes of a CPU: a build of minutes, for what gloo does too.
    part("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # stdout is for what the command prints
    # DeepSpeed 0.19.8 asks torch 2.13 by the old names.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    return package


def part(module: str) -> Any:
    """A module of the package. DependencyError if the package is not installed."""
    return deps.require(module, extra=EXTRA)


def has(operation: str) -> bool:
    """Whether ``operation`` can be compiled here."""
    return bool(part("deepspeed.ops").__compatible_ops__.get(operation))
