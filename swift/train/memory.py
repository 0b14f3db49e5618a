"""Measured memory."""

import resource
import sys

import torch


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak of the accelerator's allocated memory in GiB; on a CPU the peak resident size of this process."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak * (1 if sys.platform == "darwin" else 1024) / 2**30)
    return float(torch.accelerator.max_memory_allocated(device) / 2**30)
