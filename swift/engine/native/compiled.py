"""The kernels in ``kernels/``: built by the machine's C++ compiler when they are first needed, and kept in the cache."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from swift.errors import MachineError
from swift.hub.cache import cache_root

SOURCES = Path(__file__).parent / "kernels"
# Nothing that changes what numbers mean: no -ffast-math, which would also change the rounding of the whole process.
FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
TIMEOUT_S = 120

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_LINEAR = (_POINTER, _LONG, _INT, _POINTER, _POINTER, _POINTER, _LONG)
_ATTENTION = (_POINTER, _LONG, _LONG, *[_POINTER] * 3, _LONG, _POINTER, _POINTER, _LONG, *[_INT] * 5, _FLOAT, _FLOAT, _POINTER, _POINTER)
SIGNATURES = {
    "panel_width": (),
    "rms_norm": (_POINTER, _LONG, _INT, _POINTER, _FLOAT, _POINTER),
    "paged_attention": _ATTENTION,
    "run_program": (_POINTER, _LONG, _LONG, _POINTER),
    **{f"linear_{format}": _LINEAR for format in ("float32", "float16", "bfloat16", "int8", "int4", "int4_g32", "int4_g64", "int4_g128")},
}


@cache
def kernels() -> Any:
    """The built library, a ctypes one whose functions are those of SIGNATURES. MachineError if it cannot be built or loaded."""
    compiler = _compiler()
    sources = sorted(SOURCES.glob("*.cpp"))
    texts = [path.read_bytes() for path in [*sources, *sorted(SOURCES.glob("*.h"))]]
    version = _run([compiler, "--version"])
    # A cache that machines share must not give one the instructions of another.
    target = _run([compiler, "-march=native", "-Q", "--help=target"], check=False) + _processor() + platform.machine()
    name = hashlib.sha256(b"\0".join([*texts, " ".join([compiler, *FLAGS]).encode(), version.encode(), target.encode()])).hexdigest()[:24]
    built = cache_root() / "kernels" / f"{name}.so"
    if not built.is_file():
        try:
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".building-", dir=built.parent) as folder:
                partial = Path(folder) / "kernels.so"
                _run([compiler, *FLAGS, *map(str, sources), "-o", str(partial)])
                partial.replace(built)
        except OSError as problem:
            message = f"the kernels cannot be kept in {built.parent}: {problem.strerror or problem}"
            raise MachineError(message, hint="SWIFT_CACHE names another place for the cache") from None
    try:
        library = ctypes.CDLL(str(built))
        for function, types in SIGNATURES.items():
            getattr(library, function).argtypes = types
            getattr(library, function).restype = _INT if function == "panel_width" else None
    except (OSError, AttributeError) as problem:
        raise MachineError(f"the kernels cannot be loaded: {problem}", hint=f"remove {built}; they are built anew") from None
    return library


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if (path := shutil.which(name)) is not None:
            return path
    raise MachineError(f"no C++ compiler {wanted or ''}".rstrip() + " is there", hint="apt-get install g++, or name one in CXX")


def _processor() -> str:
    """What the processor can do, as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _run(command: list[str], *, check: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise MachineError(f"{Path(command[0]).name} does not run: {problem}") from None
    if check and done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no reason given"]
        raise MachineError(f"{Path(command[0]).name} cannot build the kernels: {lines[0].strip()}")
    return done.stdout
