"""Measured memory: what is in use, what was at most, what is left."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak of the accelerator's allocated memory in GiB; on a CPU the peak resident size of this process."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak * (1 if sys.platform == "darwin" else 1024) / 2**30)
    return float(torch.accelerator.max_memory_allocated(device) / 2**30)


def used_bytes(device: torch.device) -> int | None:
    """Bytes that are in use now, counted as `peak_memory_gib` counts; None where the system does not tell."""
    if device.type != "cpu":
        return int(torch.accelerator.memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def free_bytes(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on ``device``; None where the system does not tell.

    On a CPU what the kernel calls available, or what the container may still use if that is less; ``root`` holds proc
    and sys. On an accelerator what is free, with what the allocator has reserved and does not use.
    """
    if device.type != "cpu":
        try:
            free, _ = torch.accelerator.get_memory_info(device)
        except (RuntimeError, AttributeError, NotImplementedError):  # a backend that has no such query
            return None
        return int(free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device))
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*available, *_left_in_groups(root)], default=None)


def is_scarce(model: Path, processes: int) -> bool:
    """Whether main memory may become short when each of so many ``processes`` loads all of ``model``, before it is cut.

    Loading makes a number at most twice as wide as its file has it. Half of what is free is left for what follows.
    """
    free = free_bytes(torch.device("cpu"))
    loaded = 2 * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return free is not None and processes * loaded > free / 2


def _left_in_groups(root: Path) -> list[int]:
    """Bytes that each control group of this process, of either version, leaves; page cache that can go is counted as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        limit, usage, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        own = mount / name.strip("/")
        # A container sees its own group as the root of the mount, whatever its name is outside.
        for folder in [own, *own.parents][: len(own.relative_to(mount).parts) + 1]:
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                facts = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if most != "max":
                left.append(max(int(most) - used + int(facts.get(cache, 0)), 0))
    return left
