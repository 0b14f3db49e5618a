"""swift doctor: what this machine has."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from swift import __version__, console
from swift.config.options import Config

PACKAGES = "torch transformers peft safetensors tokenizers huggingface_hub modelscope-hub gguf bitsandbytes tensorboard".split()


def run_doctor(config: Config) -> None:
    """Print versions, devices, the cache and free space."""
    from swift.hub.cache import cache_root

    rows: list[tuple[str, str]] = [("swift-llm", __version__), ("python", platform.python_version()), ("machine", platform.platform())]
    rows += [(name, _version(name)) for name in PACKAGES]
    if importlib.util.find_spec("torch") is not None:
        from swift.model.device import choose_device, has_fast_bf16

        device = choose_device(None)
        rows.append(("device", str(device)))
        if device.type == "cpu":
            rows.append(("bfloat16", "fast on this CPU" if has_fast_bf16() else "slow on this CPU: float32 is used"))
    root = cache_root()
    rows += [("cores", str(os.cpu_count())), ("cache", str(root))]
    place = next(path for path in (root, *root.parents) if path.exists())
    rows.append(("free disk", f"{shutil.disk_usage(place).free / 2**30:.1f} GiB"))
    console.table(("what", "found"), rows)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
