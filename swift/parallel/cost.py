"""What a process holds and sends, by formula, for each way to spread a model: before a machine is rented.

Bytes of weights, gradients, optimizer and traffic are exact for full tuning; those of an adapter follow from its share of
the parameters. Activations are those of attention kernels that keep no scores (Korthikanti et al. 2022, arXiv:2205.05198,
equation 2 without its last term), in 16 bits.
"""

import math
from dataclasses import dataclass
from typing import Any

ACTIVATION_BYTES = 2
ADAPTER_BYTES = 4  # an adapter is kept in float32

# s tokens of a micro-batch, h model width, L blocks, V vocabulary, n processes of an axis


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of equal blocks, as its config.json describes it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """From a config.json in the words of transformers."""
        heads = int(config["num_attention_heads"])
        experts = int(config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0)
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int((experts and config.get("moe_intermediate_size")) or config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            experts=experts,
            experts_per_token=int(config.get("num_experts_per_tok") or 0),
        )

    @property
    def attention(self) -> int:
        """Parameters of the attention of one block."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def feedforward(self) -> int:
        """Parameters of the gated feed-forward layers of one block, of all its experts and their router."""
        one = 3 * self.hidden * self.intermediate
        return one * self.experts + self.hidden * self.experts if self.experts else one

    @property
    def block(self) -> int:
        return self.attention + self.feedforward + 2 * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside of the blocks: embedding, last norm, head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.outside


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained, in which precision, and how many tokens one process sees at a time."""

    tokens: int
    """Tokens of a micro-batch, of all processes that share it."""
    micro_batches: int = 1
    weight_bytes: float = 2
    """As they are kept: 2 in 16 bits, 4 in float32, about 0.52 in 4 bits with their scales."""
    travel_bytes: float = 2
    """As they are gathered: those of the precision of the computation."""
    outside_bytes: float | None = None
    """Of embedding and head, kept and gathered, if they differ: bitsandbytes leaves them in 16 bits."""
    trained: float = 1.0
    """Share of the parameters that is trained: 1 for full tuning, about 0.005 for LoRA."""
    gradient_bytes: int = 4
    optimizer_bytes: int = 8
    """Of AdamW in float32; 12 with a float32 copy of 16-bit weights."""
    checkpointing: bool = True


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Processes along each axis, and what the data axis does with weights: copies (DDP) or parts (FSDP)."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    shards: bool = True
    offload: bool = False
    """Whether what is sharded lies in main memory, as with --fsdp_cpu_offload; one process may do so too."""

    @property
    def processes(self) -> int:
        return self.dp * self.cp * self.tp * self.pp


@dataclass(frozen=True)
class Memory:
    """Bytes in one process, the one that has most."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # weights and gradients that are whole for a while
    activations: float
    is_offloaded: bool = False

    @property
    def held(self) -> float:
        """What lasts from step to step, and the gradients."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """On the card."""
        return self.gathered + self.activations + (0.0 if self.is_offloaded else self.held)

    @property
    def host(self) -> float:
        """In main memory."""
        return self.held if self.is_offloaded else 0.0


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in an optimizer step, by what they are for."""

    gradients: float = 0.0
    weights: float = 0.0
    layers: float = 0.0  # tensor parallel
    sequence: float = 0.0
    stages: float = 0.0
    experts: float = 0.0
    host: float = 0.0
    """Between the card and main memory; to no other process, and not in the total."""

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.layers + self.sequence + self.stages + self.experts


def memory(shape: Shape, work: Work, spread: Spread) -> Memory:
    """What one process holds at most: one of the first pipeline stage, which has most micro-batches under way."""
    blocks, experts, outside = _own(shape, spread)
    parts = spread.dp * spread.cp if spread.shards else 1
    parts_of_experts = parts / spread.ep if spread.shards else 1
    gathered = 0.0
    if spread.shards and (parts > 1 or spread.offload):
        # Two blocks, one that computes and one that comes, and what is outside of them, which stays; the gradients of one.
        gathered = 2 * _block(shape, spread) * work.travel_bytes + outside * _or(work.outside_bytes, work.travel_bytes)
        gathered += max(_block(shape, spread), outside) * work.trained * work.gradient_bytes
    trained = work.trained * ((blocks + outside) / parts + experts / parts_of_experts)
    kept = (blocks * work.weight_bytes + outside * _or(work.outside_bytes, work.weight_bytes)) / parts
    return Memory(
        weights=kept + experts * work.weight_bytes / parts_of_experts + (trained * ADAPTER_BYTES if work.trained < 1 else 0.0),
        gradients=trained * work.gradient_bytes,
        optimizer=trained * work.optimizer_bytes,
        gathered=gathered,
        activations=_activations(shape, work, spread),
        is_offloaded=spread.shards and spread.offload,
    )


def traffic(shape: Shape, work: Work, spread: Spread) -> Traffic:
    """What one process sends in a step. Rings send a sum of b bytes in 2 b (n - 1) / n, a part of it in half of that."""
    (blocks, experts, outside), n, layers, host = _own(shape, spread), spread.dp * spread.cp, _layers(shape, spread), 0.0
    copies = n / spread.ep  # experts are copied, or cut, by the processes that have the same ones
    ring, ring_of_experts = (n - 1) / n, (copies - 1) / copies
    trained = work.trained * work.gradient_bytes * ((blocks + outside) * ring + experts * ring_of_experts)
    if spread.shards:
        # Blocks are gathered for the forward and again for the backward pass, the rest once; gradients of each micro-batch go out.
        gathered = 2 * blocks * work.travel_bytes + outside * _or(work.outside_bytes, work.travel_bytes)
        weights = (gathered * ring + 2 * experts * work.travel_bytes * ring_of_experts) * work.micro_batches
        gradients = trained * work.micro_batches
        if spread.offload:  # its part of them, as it is kept
            kept = 2 * blocks * work.weight_bytes + outside * _or(work.outside_bytes, work.weight_bytes)
            kept += (blocks + outside) * work.trained * work.gradient_bytes
            of_experts = experts * (2 * work.weight_bytes + work.trained * work.gradient_bytes)
            host = (kept / n + of_experts / copies) * work.micro_batches
    else:
        weights, gradients = 0.0, 2 * trained
    states = work.tokens / spread.cp * shape.hidden * ACTIVATION_BYTES * work.micro_batches
    # Two sums in the forward pass of a block, two in its backward pass, one more of each where it is computed again.
    sums = 2 * (3 if work.checkpointing else 2)
    # Queries and results, keys and values: of the latter each process needs a head.
    heads = (2 * shape.heads + 2 * math.lcm(shape.kv_heads, spread.cp)) * shape.head_dim / shape.hidden
    times = 3 if work.checkpointing else 2
    return Traffic(
        gradients=gradients,
        weights=weights,
        layers=layers * sums * 2 * states * (spread.tp - 1) / spread.tp,
        sequence=layers * times * states * heads / spread.tp * (spread.cp - 1) / spread.cp,
        stages=2 * states if spread.pp > 1 else 0.0,
        experts=layers * times * 2 * states * max(shape.experts_per_token, 1) * (spread.ep - 1) / spread.ep if shape.experts else 0.0,
        host=host,
    )


def _block(shape: Shape, spread: Spread) -> float:
    """Parameters of one block in one process, before they are cut by the data axis."""
    router = shape.hidden * shape.experts
    return shape.attention / spread.tp + _experts(shape, spread) + router + 2 * shape.hidden


def _experts(shape: Shape, spread: Spread) -> float:
    """Parameters of the feed-forward layers of one block in one process, without their router."""
    return (shape.feedforward - shape.hidden * shape.experts) / (spread.ep * spread.tp)


def _layers(shape: Shape, spread: Spread) -> int:
    """Blocks of the stage that has most: a block is not cut."""
    return math.ceil(shape.layers / spread.pp)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _outside(shape: Shape, spread: Spread) -> float:
    """Of the first or last stage: with several stages an embedding or a head."""
    whole = shape.outside if spread.pp == 1 else shape.vocabulary * shape.hidden
    return whole / spread.tp


def _own(shape: Shape, spread: Spread) -> tuple[float, float, float]:
    """Parameters of one process before the data axis cuts them: of its blocks, of experts that others do not have, outside of blocks."""
    experts = _layers(shape, spread) * _experts(shape, spread) if spread.ep > 1 else 0.0
    return _layers(shape, spread) * _block(shape, spread) - experts, experts, _outside(shape, spread)


def _activations(shape: Shape, work: Work, spread: Spread) -> float:
    """Of the micro-batches under way, as many as there are stages; of one block all, of the others their input, if checkpointed."""
    s, h = work.tokens / spread.cp, shape.hidden
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    active = shape.intermediate * (shape.experts_per_token or 1)
    # Inputs of both norms and of attention and feed-forward layers; q, k, v and what attention gives; three of the gated layer's.
    one = s * (8 * h + 2 * (width + shape.heads * shape.head_dim) / spread.tp + 2 * 3 * active / spread.tp)
    layers = _layers(shape, spread)
    under_way = min(spread.pp, work.micro_batches)
    return under_way * layers * s * h * 2 + one if work.checkpointing else under_way * layers * one
