"""What the parts of a model cost, measured: the embedding side, each kind of block, and the head with the loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swift.model.batch import Batch
from swift.model.layout import Layout
from swift.model.policy import Policy, probe_ids
from swift.parallel.pipeline.stages import Cut
from swift.parallel.pipeline.structure import Structure

# Parts of a block: small enough to balance stages, and so large that two measurements of one model give the same stages.
GRAIN = 0.25


@dataclass(frozen=True)
class Costs:
    """Forward and backward pass of each part, in multiples of the cheapest block."""

    blocks: list[float]
    first: float
    last: float


def in_blocks(blocks: Sequence[float], first: float, last: float) -> Costs:
    """Times in any unit as multiples of the cheapest block, rounded to GRAIN of it."""
    unit = max(min(blocks), 1e-9)
    rounded = [round(value / unit / GRAIN) * GRAIN for value in (*blocks, first, last)]
    return Costs(rounded[:-2], rounded[-2], rounded[-1])


def measure(
    policy: Policy, structure: Structure, tokens: int, *, is_flat: bool, autocast: Callable[[], Any], call: Callable[..., Any]
) -> Costs:
    """Costs of a forward and backward pass of one row of ``tokens``, timed with one block in place at a time.

    Blocks whose parameters have the same shapes cost the same. Gradients are as they were.
    """
    kinds: dict[Any, int] = {}
    kind_of = [kinds.setdefault(_kind(block), at) for at, block in enumerate(structure.blocks)]
    batch = row(policy, tokens, is_flat=is_flat)
    cut = Cut(structure)
    model, was_training = policy.model, policy.model.training
    model.train()
    times: dict[int, tuple[float, float, float]] = {}
    with torch.random.fork_rng(devices=[batch.input_ids.device] if batch.input_ids.device.type == "cuda" else []):
        for at in kinds.values():
            run = range(at, at + 1)
            with cut.running(run, cut.swaps(run, is_first=True, is_last=True), None):
                passes = [_time(policy, structure.blocks[at], batch, autocast, call) for _ in range(3)]
            times[at] = tuple(min(values) for values in zip(*passes, strict=True))
    model.train(was_training)
    firsts, _, lasts = zip(*times.values(), strict=True)
    return in_blocks([times[kind][1] for kind in kind_of], min(firsts), min(lasts))


def _kind(block: nn.Module) -> Any:
    return tuple((name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in block.named_parameters())


def row(policy: Policy, tokens: int, *, is_flat: bool) -> Batch:
    """One row of ``tokens`` tokens, each of which predicts the next."""
    ids = probe_ids(policy.inner, tokens)
    layout = Layout.of_documents([tokens]) if is_flat else None
    places = torch.arange(tokens, device=ids.device)
    return Batch(
        input_ids=ids,
        position_ids=layout.position_ids().to(ids.device) if layout is not None else None,
        attention_mask=None if is_flat else torch.ones_like(ids),
        layout=layout,
        kept_K=places,
        row_S=places,
        target_S=ids[0].roll(-1),
        weight_S=torch.ones(tokens, device=ids.device),
        document_S=torch.zeros_like(places),
        num_documents=1,
        num_tokens=tokens,
    )


def _time(
    policy: Policy, block: nn.Module, batch: Batch, autocast: Callable[[], Any], call: Callable[..., Any]
) -> tuple[float, float, float]:
    """Seconds (before ``block``, in it, after it), forward and backward."""
    device = batch.input_ids.device
    kept = [parameter.grad for parameter in policy.model.parameters()]
    at: dict[str, float] = {}

    def stamp(name: str) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        at[name] = time.perf_counter()

    def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if hidden.requires_grad:
            hidden.register_hook(lambda _: stamp("through"))
        stamp("begun")

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: stamp("reached"))
        stamp("ended")

    handles = [block.register_forward_pre_hook(begins, with_kwargs=True), block.register_forward_hook(ends)]
    try:
        stamp("start")
        with torch.enable_grad(), autocast():
            loss, _ = call(policy.cross_entropy, batch)
        stamp("turn")
        if loss.requires_grad:
            loss.backward()
        stamp("finish")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in zip(policy.model.parameters(), kept, strict=True):
            parameter.grad = gradient
    reached = at.get("reached", at["finish"])
    through = at.get("through", at["finish"])
    return (
        at["begun"] - at["start"] + at["finish"] - through,
        at["ended"] - at["begun"] + through - reached,
        at["turn"] - at["ended"] + reached - at["turn"],
    )
