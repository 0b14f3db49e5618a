"""Which blocks keep their activations for the backward pass, and which compute them again: chosen from memory.

What a block keeps is measured on the model itself, by three short forward passes; what is needed for the largest forward
pass of the run follows from that. No more blocks are checkpointed than needed, since each costs a second forward pass.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swift import console
from swift.config.commands import SftConfig
from swift.data.encoded import Encoded
from swift.model.chunked import most_bytes
from swift.model.policy import Policy
from swift.parallel.base import Strategy
from swift.train.memory import free_bytes, used_bytes
from swift.train.probe import decode, find_blocks, training
from swift.train.steps import CPU_TOKENS, Steps

# Lengths of the forward passes that are measured: evenly spaced, so that a cost that grows with the square shows.
PROBE = 16
SHARE = 0.8  # of the free memory; the rest is for temporaries, fragmentation and neighbours

GIB = 2**30
# Numbers that an optimizer keeps for each trained one; 2 for all others. Those of 8 bits are counted as bytes.
STATE = {"sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1, "rmsprop_bnb": 1, "lion": 1, "muon": 1, "ademamix": 3}


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept for the backward pass of n tokens in rows of ``length``: constant + n (linear + quadratic length)."""

    constant: float
    linear: float
    quadratic: float

    def bytes(self, tokens: int, length: int) -> float:
        return self.constant + tokens * (self.linear + self.quadratic * length)

    @classmethod
    def through(cls, first: int, second: int, third: int) -> "Kept":
        """What one row keeps, measured with PROBE, twice and three times PROBE tokens."""
        quadratic = max(third - 2 * second + first, 0) / (2 * PROBE**2)
        linear = max((third - first) / (2 * PROBE) - quadratic * 4 * PROBE, 0.0)
        return cls(max(first - linear * PROBE - quadratic * PROBE**2, 0.0), linear, quadratic)


def measure(forward: Callable[[int], Any], blocks: Sequence[nn.Module]) -> tuple[list[Kept], Kept]:
    """(what each of ``blocks`` keeps for the backward pass, what the rest does); ``forward(n)`` runs one row of n tokens.

    Each storage counts once, where it is first kept. What several passes keep is no activation: parameters, tables,
    weights that were formed from others.
    """
    passes = [_Pass(blocks) for _ in range(3)]
    outputs = [one.run(forward, PROBE * (at + 1)) for at, one in enumerate(passes)]  # their graphs live until all are compared
    lasting = {pointer for at, one in enumerate(passes) for pointer in one.sizes if any(pointer in other.sizes for other in passes[:at])}
    sums = [one.sums(lasting) for one in passes]
    del outputs
    fits = [Kept.through(*values) for values in zip(*sums, strict=True)]
    return fits[:-1], fits[-1]


class _Pass:
    """One forward pass under observation."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.owner = len(blocks)  # which block runs; none of them
        self.sizes: dict[int, tuple[int, int]] = {}  # storage -> (owner, bytes)

    def run(self, forward: Callable[[int], Any], length: int) -> Any:
        handles = []
        for index, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(functools.partial(self._enter, index)))
            handles.append(block.register_forward_hook(functools.partial(self._enter, len(self.blocks))))
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._keep, _same):
                return forward(length)
        finally:
            for handle in handles:
                handle.remove()

    def sums(self, lasting: set[int]) -> list[int]:
        """Bytes of each block, and last of the rest, without the storages in ``lasting``."""
        sums = [0] * (len(self.blocks) + 1)
        for pointer, (owner, size) in self.sizes.items():
            if pointer not in lasting:
                sums[owner] += size
        return sums

    def _enter(self, owner: int, *_: Any) -> None:
        self.owner = owner

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes.setdefault(storage.data_ptr(), (self.owner, storage.nbytes()))
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Need:
    """What training needs beside the model, in bytes."""

    blocks: list[float]  # kept by each block in the largest forward pass
    rest: float  # kept outside of the blocks
    hidden: float  # the hidden states of one block, all that is kept of it if it is checkpointed
    state: float  # gradients and the optimizer's state
    head: float  # logits at one time

    def bytes(self, checkpointed: int) -> float:
        """The peak with the first ``checkpointed`` blocks checkpointed.

        Blocks are computed again from the last to the first: when the first ones are, those that kept theirs are done.
        The gradients of one block's inner tensors are as large as what it keeps, at most.
        """
        largest = max(self.blocks)
        kept = checkpointed * self.hidden + sum(self.blocks[checkpointed:])
        again = checkpointed * self.hidden + 2 * largest
        return self.state + self.rest + max(kept + largest, again if checkpointed else 0, kept + self.head)


def fewest_blocks(need: Need, budget: float, *, all_or_none: bool = False) -> int:
    """The smallest number of checkpointed blocks with which ``need`` fits into ``budget`` bytes; all if none does."""
    count = len(need.blocks)
    choices = (0, count) if all_or_none else range(count + 1)
    return next((number for number in choices if need.bytes(number) <= budget), count)


def checkpoint_activations(model: Any, kwargs: dict[str, bool] | None, *, blocks: Sequence[nn.Module] = (), count: int = 0) -> None:
    """Compute the activations of each block again in the backward pass; with ``blocks``, of the first ``count`` alone."""
    kwargs = {"use_reentrant": False, **(kwargs or {})}
    if hasattr(model, "activation_checkpointing_enable"):  # the name that newer versions of transformers have for it
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)
    for block in blocks[count:]:
        block.gradient_checkpointing = False  # type: ignore[assignment]


@dataclass(frozen=True)
class Choice:
    """How many blocks are checkpointed, and the numbers behind it; sizes in GiB, None where they are unknown."""

    checkpointed: int
    blocks: int
    tokens: int  # of the largest forward pass
    bytes_per_token: float  # kept by one block
    needed: float | None
    free: float | None
    predicted_peak: float | None  # as `peak_memory_gib` measures it

    def facts(self) -> dict[str, Any]:
        return {
            "checkpointed_blocks": self.checkpointed,
            "blocks": self.blocks,
            "largest_pass_tokens": self.tokens,
            "kept_bytes_per_token_and_block": round(self.bytes_per_token),
            "needed_gib": _rounded(self.needed),
            "free_gib": _rounded(self.free),
            "predicted_peak_gib": _rounded(self.predicted_peak),
        }

    def __str__(self) -> str:
        chosen = f"{self.checkpointed} of {self.blocks} blocks" if self.checkpointed else "no block"
        if self.needed is None or self.free is None:
            return f"{chosen} computed again in the backward pass: the free memory of this device is not known"
        return (
            f"{chosen} computed again in the backward pass: {self.needed:.2f} GiB needed of {self.free:.2f} free "
            f"({self.bytes_per_token / 1024:.1f} KiB a token and block, {self.tokens:,} tokens)"
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def choose_checkpointing(
    config: SftConfig, policy: Policy, steps: Steps, optimizer: Any, strategy: Strategy, *, is_flat: bool, free: int | None = None
) -> Choice | None:
    """Checkpoint as many blocks of ``policy``'s model as memory makes necessary, and say so; None if --gradient_checkpointing decides.

    ``free`` is the number of bytes that can still be allocated, by default what the device has left.
    """
    blocks = find_blocks(policy)
    if config.gradient_checkpointing is not None or not blocks:
        return None
    device = _device(policy)
    tokens, longest = largest_pass(config, steps, is_flat=is_flat)
    need, per_token = _need(config, policy, blocks, optimizer, strategy, tokens=tokens, longest=longest, is_flat=is_flat)
    free = free_bytes(device) if free is None else free
    can_choose = all(hasattr(block, "gradient_checkpointing") for block in blocks)
    if not getattr(policy.inner, "supports_gradient_checkpointing", False):
        count = 0
    elif free is None:
        count = 0 if device.type == "cpu" else len(blocks)
    else:
        count = fewest_blocks(need, SHARE * free, all_or_none=not can_choose)
    if count:
        checkpoint_activations(policy.inner, config.gradient_checkpointing_kwargs, blocks=blocks if can_choose else (), count=count)
    needed, used = need.bytes(count), used_bytes(device)
    choice = Choice(
        count,
        len(blocks),
        tokens,
        per_token,
        needed / GIB,
        None if free is None else free / GIB,
        None if used is None else (used + needed) / GIB,
    )
    console.say(str(choice))
    if free is not None and needed > SHARE * free:
        console.warn(
            f"this run may not fit: {needed / GIB:.2f} GiB are needed and {free / GIB:.2f} GiB are free; lower "
            f"{'--max_tokens_per_batch' if is_flat else '--per_device_train_batch_size'} or --max_length"
        )
    return choice


def _device(policy: Policy) -> torch.device:
    weight: Tensor = policy.inner.get_input_embeddings().weight
    return weight.device


def largest_pass(config: SftConfig, steps: Steps, *, is_flat: bool) -> tuple[int, int]:
    """(tokens of the largest forward pass, of its longest row). What a stream will bring is bounded by max_length alone."""
    cutting = steps.cutting
    longest = int(steps.rows.lengths.max()) if isinstance(steps.rows, Encoded) else config.max_length or CPU_TOKENS
    if cutting.packing_length is not None:
        return cutting.tokens(max(cutting.packing_length, longest)), longest
    return (cutting.tokens(longest) if is_flat else cutting.rows_per_batch * longest), longest


def _need(
    config: SftConfig,
    policy: Policy,
    blocks: list[nn.Module],
    optimizer: Any,
    strategy: Strategy,
    *,
    tokens: int,
    longest: int,
    is_flat: bool,
) -> tuple[Need, float]:
    """What the largest forward pass needs, and the bytes that one block keeps of a token (the mean of the blocks)."""

    def forward(length: int) -> Tensor:
        with strategy.autocast():
            return decode(policy, length, is_flat=is_flat)

    with training(policy.model):
        kept, rest = measure(forward, blocks)
    embedding = policy.inner.get_input_embeddings().weight
    of_blocks = [each.bytes(tokens, longest) for each in kept]
    return Need(
        blocks=of_blocks,
        rest=rest.bytes(tokens, longest),
        hidden=tokens * embedding.shape[1] * embedding.element_size(),
        state=_state_bytes(config, policy.model, optimizer),
        head=_head_bytes(policy, tokens),
    ), sum(of_blocks) / len(blocks) / tokens


def _state_bytes(config: SftConfig, model: Any, optimizer: Any) -> float:
    """Gradients of what is trained now, and the optimizer's state of all that it has."""
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad)
    name = config.optim.removeprefix("paged_").removesuffix("_32bit")
    kind, a_number = (name.removesuffix("_8bit"), 1) if name.endswith("_8bit") else (name, 4)
    numbers = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return float(gradients + numbers * a_number * STATE.get(kind, 2))


def _head_bytes(policy: Policy, tokens: int) -> float:
    """Logits, their softmax and gradient of as many positions as are computed at one time, and the gradient of a trained head."""
    head = policy.inner.get_output_embeddings()
    vocabulary = policy.inner.config.get_text_config().vocab_size
    if not policy.has_own_head or head is None:
        return float(3 * 4 * tokens * vocabulary)
    trained = sum(parameter.numel() * parameter.element_size() for parameter in head.parameters() if parameter.requires_grad)
    return float(most_bytes(policy.head, tokens, vocabulary, head.weight.device) + 2 * trained)
