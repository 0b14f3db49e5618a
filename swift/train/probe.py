"""One short forward pass through a model's blocks, as training computes them: for what is tried or measured before a run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ConfigError
from swift.model.attention import packed_inputs
from swift.model.layout import Layout
from swift.model.policy import Policy, probe_ids
from swift.tuner.blocks import blocks_of


def decode(policy: Policy, length: int, *, is_flat: bool) -> Tensor:
    """What the model computes of one row of ``length`` tokens: hidden states, or logits if its head is not separable."""
    ids = probe_ids(policy.inner, length)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if is_flat:
        layout = Layout(lengths=(length,), parents=(-1,))
        inputs |= {"position_ids": layout.position_ids().to(ids.device), **packed_inputs(layout, ids.device)}
    else:
        inputs["attention_mask"] = torch.ones_like(ids).index_fill_(1, torch.tensor([length - 1], device=ids.device), 0)
    output = policy.call(lambda: policy.decoder(**inputs) if policy.has_own_head else policy.inner(**inputs))
    hidden: Tensor = output.last_hidden_state if policy.has_own_head else output.logits
    return hidden


def find_blocks(policy: Policy) -> list[nn.Module]:
    """The blocks of the model; none if they cannot be told by structure."""
    try:
        return list(blocks_of(policy.inner))
    except ConfigError:
        return []


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    """Within, ``model`` is in training mode; random numbers that are drawn are drawn again after it."""
    was_training, devices = model.training, [] if _device(model).type in ("cpu", "mps") else [_device(model)]
    model.train()
    try:
        with torch.random.fork_rng(devices=devices, device_type=_device(model).type if devices else "cuda"):
            yield
    finally:
        model.train(was_training)


def _device(model: Any) -> torch.device:
    found: torch.device = next(model.parameters()).device
    return found
