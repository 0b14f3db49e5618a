"""Liger kernels: norms, rotary embeddings and feed-forward layers in fewer passes over memory, on a GPU."""

from typing import Any

import torch

from swift import deps
from swift.errors import ConfigError, MachineError


def check_device(device: torch.device) -> None:
    """MachineError where Triton has no kernels for ``device``."""
    if device.type not in ("cuda", "xpu", "npu"):
        raise MachineError(f"--use_liger_kernel needs a GPU, and this run computes on {device}", hint="remove --use_liger_kernel")


def use_liger_kernels(model: Any) -> None:
    """Replace modules of ``model`` by Liger's; ConfigError if it has none for the model.

    Its cross-entropy is left out: the loss is computed from hidden states at trained positions, which is less work.
    """
    kernels = deps.require("liger_kernel.transformers.monkey_patch", extra="liger")
    kind = model.config.model_type
    if kind not in kernels.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"the installed Liger has no kernels for {kind}", hint="remove --use_liger_kernel, or update liger-kernel")
    kernels._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
