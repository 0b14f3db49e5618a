"""torch.compile, block by block: the blocks of a model are equal, so that one is compiled for all, for any length of rows.

Attention over documents and layers whose forward pass was replaced stay outside of the compiled code. Generation does
too: a growing cache would be compiled again and again.
"""

import time
import warnings
from typing import Any

import torch
from torch import nn

from swift import console
from swift.config.train import PrecisionConfig
from swift.errors import ConfigError, near
from swift.model.attention import PREFIX
from swift.model.policy import Policy
from swift.train.probe import decode, find_blocks, training

PROBE_LENGTHS = (24, 40)  # two, so that what depends on the length shows


class Compiled:
    """The compiled blocks of a model. After a failure all of them are computed as they were."""

    def __init__(self) -> None:
        self.is_on = True

    def give_up(self, problem: Exception) -> None:
        if self.is_on:
            lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
            reason = " ".join(lines[:2])[:300]  # the second one says what a backend raised
            console.notice(f"--torch_compile is without effect here, the run goes on without it: {reason or type(problem).__name__}")
        self.is_on = False


class _Forward:
    """Takes the place of a block's forward method."""

    def __init__(self, state: Compiled, original: Any, compiled: Any) -> None:
        self.state, self.original, self.compiled = state, original, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        if not self.state.is_on or kwargs.get("past_key_values") is not None:
            return self.original(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except TorchDynamoException as problem:
            self.state.give_up(problem)
            return self.original(*args, **kwargs)


def check_backend(name: str) -> None:
    """ConfigError if torch knows no backend called ``name``."""
    from torch._dynamo import list_backends

    known = [each for each in list_backends(()) if "TESTING" not in each]
    if name not in list_backends(None):
        raise ConfigError(f"--torch_compile_backend {name} is no backend of torch", hint=near(name, known) or ", ".join(known))


def compile_blocks(policy: Policy, config: PrecisionConfig, *, is_flat: bool) -> Compiled:
    """Compile the blocks and try them; where that fails, say so in one line and leave the model as it was."""
    state, begin = Compiled(), time.monotonic()
    # What torch 2.13 says of itself when it traces a function whose inputs are no leaves.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    blocks = find_blocks(policy)
    if not blocks:
        state.give_up(ConfigError("the blocks of this model cannot be told"))
        return state
    _keep_outside(policy, blocks)
    backend = config.torch_compile_backend or "inductor"
    for block in blocks:
        compiled = torch.compile(block.forward, backend=backend, mode=config.torch_compile_mode, dynamic=True)
        block.forward = _Forward(state, block.forward, compiled)
    try:
        _try(policy, is_flat=is_flat)
    except RuntimeError as problem:
        state.give_up(problem)
    if state.is_on:
        console.say(f"{len(blocks)} blocks compiled by {backend} in {time.monotonic() - begin:.0f} s{_place(backend)}")
    return state


def _place(backend: str) -> str:
    if backend != "inductor":
        return ""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return f"; compiled code is kept in {cache_dir()} (TORCHINDUCTOR_CACHE_DIR)"


def _keep_outside(policy: Policy, blocks: list[nn.Module]) -> None:
    """Attention with a layout runs Python over documents; replaced forward passes have a state of their own."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = policy.inner.config._attn_implementation
    if name.startswith(PREFIX):
        AttentionInterface.register(name, _disabled(ALL_ATTENTION_FUNCTIONS[name]))
    for block in blocks:
        for module in block.modules():
            if "forward" in vars(module) and module is not block:
                module.forward = _disabled(module.forward)


def _disabled(function: Any) -> Any:
    return function if getattr(function, "_torchdynamo_disable", False) else torch.compiler.disable(function)


def _try(policy: Policy, *, is_flat: bool) -> None:
    """Forward and backward passes, so that what cannot be compiled shows before the first step."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    with training(policy.model):
        for length in PROBE_LENGTHS:
            hidden = decode(policy, length, is_flat=is_flat)
            torch.autograd.grad(hidden.float().square().mean(), trained, allow_unused=True)
