"""How much arithmetic a training run needs at least, and how much this machine can do.

Useful work is counted by one definition for all peers, from the rows and the model alone, so that what a tool computes
on top (padding, logits that no loss asks for, a second forward pass for checkpointing) is not rewarded:

* a linear layer of N weights costs 2 N a token forward, 2 N for the gradient of its input, and 2 N for that of its
  weights, the last only where they are trained: 6 N in full fine-tuning, 4 N and 6 times LoRA's own weights in LoRA;
* the head likewise, but only at supervised positions (with LoRA it is frozen);
* attention: a pair of a query and a key that it sees costs 4 H d forward in a layer (score and weighted sum; H heads of
  width d), 8 H d backward; each sequence has L (L + 1) / 2 pairs;
* DPO: both sides of a pair by themselves, and a forward pass of the reference model over both;
* embeddings, norms, softmax, activations and the optimizer count as nothing.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from rows import Counts

LORA_RANK = 8
GEMM_TOKENS = 2048  # as many rows as 4 sequences of 512 tokens have
REPEATS = 7


@dataclass(frozen=True)
class Sizes:
    """Of a model: weights of its linear layers, of LoRA on all of them, of its head; ``attention`` = layers x H x d.

    ``shapes`` are the different (in, out) of linear layers, the head's last.
    """

    linear: int
    lora: int
    head: int
    attention: int
    shapes: tuple[tuple[int, int], ...]


def useful_flops(job: str, sizes: Sizes, counts: Counts) -> float:
    """Floating-point operations of one pass over rows with ``counts``, forward and backward, by the definition above."""
    per_weight = 6 if job == "full" else 4
    linear = per_weight * sizes.linear + (0 if job == "full" else 6 * sizes.lora)
    total = linear * counts.real + per_weight * sizes.head * counts.supervised + 12 * sizes.attention * counts.pairs
    if job == "dpo":
        total += 2 * sizes.linear * counts.real + 2 * sizes.head * counts.supervised + 4 * sizes.attention * counts.pairs
    return float(total)


def model_sizes(model: Path) -> Sizes:
    """Read from the model's shapes; no weights are loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(model))
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    head = built.get_output_embeddings()
    layers = [module for module in built.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = sorted({(layer.in_features, layer.out_features) for layer in layers})
    return Sizes(
        linear=sum(layer.in_features * layer.out_features for layer in layers),
        lora=sum(LORA_RANK * (layer.in_features + layer.out_features) for layer in layers),
        head=head.in_features * head.out_features,
        attention=config.num_hidden_layers * config.num_attention_heads * width,
        shapes=(*shapes, (head.in_features, head.out_features)),
    )


def gemm_speeds(threads: int, sizes: Sizes) -> dict[str, float]:
    """FLOP/s of ``torch.mm`` in float32 at the best of some repeats: large squares, and the layers of the model."""
    import torch

    torch.set_num_threads(threads)
    named = {f"{side} x {side} x {side}": (side, side, side) for side in (1024, 2048, 3072)}
    named |= {f"{GEMM_TOKENS} x {k} x {n}": (GEMM_TOKENS, k, n) for k, n in sizes.shapes[:-1]}
    k, n = sizes.shapes[-1]
    tokens = max(64, min(GEMM_TOKENS, 2**26 // n))  # at most 256 MB of logits
    named[f"{tokens} x {k} x {n} (head)"] = (tokens, k, n)
    return {name: _gemm_speed(*shape) for name, shape in named.items()}


def _gemm_speed(m: int, k: int, n: int) -> float:
    import torch

    left, right, out = torch.randn(m, k), torch.randn(n, k).T, torch.empty(m, n)
    best_s = math.inf
    for _ in range(REPEATS):
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        best_s = min(best_s, time.perf_counter() - begin)
    return 2 * m * k * n / best_s


def definition() -> str:
    """The rules above, for the head of a table."""
    assert __doc__ is not None
    return __doc__.split("\n\n", 1)[1].strip()
