"""The package deepspeed: imported for the right device, and without compiling what is not needed."""

import os
import traceback
import warnings
from typing import Any

from swift import deps
from swift.hub.cache import cache_root


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
    # What can be compiled is found out by trying, loudly, at the first look; only collectives through shared memory between
    # the processes of a CPU look, to be built for minutes, and gloo does the same.
    part("deepspeed.ops").__dict__.setdefault("__compatible_ops__", {})
    # DeepSpeed 0.19.8 asks torch 2.13 by the old names.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    return package


def part(module: str) -> Any:
    """A module of the package. DependencyError if the package is not installed."""
    return deps.require(module, extra="deepspeed")


def reads_disks() -> bool:
    """Whether the reader and writer of disks can be compiled here: it needs libaio."""
    builder = part("deepspeed.ops.op_builder").AsyncIOBuilder
    return bool(builder().is_compatible(verbose=False))


def has_raised(problem: BaseException) -> bool:
    """Whether it is the package's own code that raised ``problem``."""
    *_, (frame, _) = traceback.walk_tb(problem.__traceback__)
    return str(frame.f_globals.get("__name__", "")).split(".")[0] == "deepspeed"
