"""Which device computes, and in which precision."""

import torch

from swift.errors import MachineError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``, or the best that is there; MachineError if it is not."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MachineError(f"--device {name!r} is no device", hint="cpu, cuda, cuda:1, mps, npu") from None
    if device.type == "cpu":
        return device
    if accelerator is None or accelerator.type != device.type:
        have = accelerator.type if accelerator else "only the CPU"
        raise MachineError(f"--device {name} is not available: this machine has {have}", hint="leave --device away")
    return device


def choose_dtype(name: str | None, checkpoint: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of the weights and the reason for it.

    16-bit products are 10 times slower than 32-bit ones on a CPU without the instructions for them.
    """
    if name is not None:
        return DTYPES[name], "--torch_dtype"
    if device.type == "cpu" and checkpoint != torch.float32 and not has_fast_bf16():
        return torch.float32, "this CPU has no fast 16-bit arithmetic"
    return checkpoint, "the checkpoint's own"


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512_BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("amx_tile") or capabilities.get("avx512_bf16"))
