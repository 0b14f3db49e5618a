"""Megatron-Core on a CPU, for trying out and for tests: it asks CUDA for the device, and here it is told another one."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from swift.parallel.megatron import package


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within, what Megatron-Core makes "on CUDA" is made on the CPU.

    Its schedules name the device "cuda", its layers ask torch.cuda for the current one, and dropout draws from a state of
    CUDA's generator: that becomes the CPU's generator, the same in all processes. Nothing is changed where there is CUDA.
    """
    if torch.cuda.is_available():
        yield
        return
    megatron_random, moe_utils = package.part("tensor_parallel.random"), package.part("transformer.moe.moe_utils")

    def here(make: Any) -> Any:
        return lambda *sizes, **options: make(*sizes, **(options | {"device": "cpu"} if options.get("device") == "cuda" else options))

    changes: list[tuple[Any, str, Any]] = [
        (torch, "zeros", here(torch.zeros)),
        (torch, "ones", here(torch.ones)),
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (megatron_random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
        # What is computed again draws from the CPU's generator, whose state Megatron-Core puts back beside that of CUDA.
        (megatron_random, "_get_cuda_rng_state", lambda **_: None),
        (megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
    ]
    if not hasattr(moe_utils, "te_general_gemm"):  # megatron-core 0.16 reads it without Transformer Engine too
        changes.append((moe_utils, "te_general_gemm", None))
    missing = object()
    kept = [(owner, name, getattr(owner, name, missing)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        with package.quiet():  # of speed on CUDA
            yield
    finally:
        for owner, name, value in kept:
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
