"""What TensorRT-LLM's model definitions compute, in plain torch on a CPU, from config.json and the rank files alone.

It stands for the real engine where no GPU is: cuts, joins, names, norms and scales that TensorRT-LLM would read otherwise than the
writer meant show as another model. Follows Attention, MLP, GatedMLP, Embedding and the decoder layers of LLaMA, QWen, Phi3 and
Gemma in tensorrt_llm 1.2 (tensorrt_llm/layers and tensorrt_llm/models). Kernels, rounding and the cache are not those of an engine.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.model.files import read_config
from swift.quantize.tensors import Checkpoint

# T tokens, D model width, H width of a head; a rank holds its share of the heads and of the MLP

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SCALED_EMBEDDING = "Gemma"


class Interpreter:
    """The checkpoint in ``folder``, computed layer by layer over all ``texts`` (token ids) at once."""

    def __init__(self, folder: Path, texts: list[list[int]]) -> None:
        self.config: dict[str, Any] = read_config(folder)
        mapping = self.config["mapping"]
        self.tensor = mapping["tp_size"]
        self.ranks = [Checkpoint([folder / f"rank{rank}.safetensors"]) for rank in range(mapping["world_size"])]
        self._last = [self._states(text) for text in texts]
        self._places = {tuple(text): index for index, text in enumerate(texts)}
        self._run()
        final = self._whole(self._stages()[-1], "transformer.ln_f.weight")
        self._last = [rms_norm(state, final, self.config["norm_epsilon"]) for state in self._last]
        self._head = torch.cat([rank.read("lm_head.weight") for rank in self._stages()[-1]])[: self.config["vocab_size"]].float()

    def logits(self, text: list[int]) -> Tensor:
        """(T, V) of one of the texts."""
        scores: Tensor = F.linear(self._last[self._places[tuple(text)]], self._head) * self.config.get("output_multiplier_scale", 1.0)
        cap = self.config.get("final_logit_softcapping")
        return (scores / cap).tanh() * cap if cap else scores

    def _stages(self) -> list[list[Checkpoint]]:
        return [self.ranks[begin : begin + self.tensor] for begin in range(0, len(self.ranks), self.tensor)]

    def _whole(self, ranks: list[Checkpoint], name: str) -> Tensor:
        """A tensor that all ranks have alike."""
        first, *others = [rank.read(name) for rank in ranks]
        assert all(torch.equal(first, other) for other in others), f"the ranks differ in {name}"
        return first.float()

    def _states(self, text: list[int]) -> Tensor:
        """(T, D): each rank looks up the ids that it has, and gives zeros for others."""
        ids, scale = torch.tensor(text), self.config.get("embedding_multiplier", 1.0)
        if self.config["architecture"].startswith(SCALED_EMBEDDING):
            scale = math.sqrt(self.config["hidden_size"])
        name = "transformer.vocab_embedding.weight"
        first = self._stages()[0]
        if not self.config["use_parallel_embedding"]:
            looked_up: Tensor = first[0].read(name, ids).float() * scale
            return looked_up
        rows = first[0].shape(name)[0]
        found: Tensor = torch.zeros(len(text), self.config["hidden_size"])
        for number, rank in enumerate(first):
            own = (ids >= number * rows) & (ids < (number + 1) * rows)
            found[own] = rank.read(name, ids[own] - number * rows).float() * scale
        return found

    def _run(self) -> None:
        layer = 0
        for ranks in self._stages():
            count = len({name.split(".")[2] for name in ranks[0].sources if name.startswith("transformer.layers.")})
            for local in range(count):
                weights = [_Weights(rank, f"transformer.layers.{local}.") for rank in ranks]
                self._last = [self._layer(state, weights, layer) for state in self._last]
                layer += 1
        assert layer == self.config["num_hidden_layers"], f"the ranks hold {layer} layers"

    def _layer(self, states: Tensor, ranks: "list[_Weights]", layer: int) -> Tensor:
        def norm(name: str, x: Tensor) -> Tensor:
            return rms_norm(x, ranks[0][name], self.config["norm_epsilon"])

        residual: float = self.config.get("residual_multiplier", 1.0)
        inner = norm("input_layernorm.weight", states)
        made = _reduced([self._attention(inner, rank, layer) for rank in ranks], ranks[0].get("attention.dense.bias"))
        if self.config.get("inter_layernorms"):
            states = states + norm("post_layernorm.weight", made)
            inner = norm("pre_feedforward_layernorm.weight", states)
        else:
            states = states + made * residual
            inner = norm("post_layernorm.weight", states)
        made = _reduced([self._mlp(inner, rank) for rank in ranks], ranks[0].get("mlp.proj.bias"))
        return states + (norm("post_feedforward_layernorm.weight", made) if self.config.get("inter_layernorms") else made * residual)

    def _mlp(self, x: Tensor, weights: "_Weights") -> Tensor:
        inner = F.linear(x, weights["mlp.fc.weight"], weights.get("mlp.fc.bias"))
        if self.config["hidden_act"] == "swiglu":
            value, gate = inner.chunk(2, -1)
            inner = F.silu(gate) * value
        else:
            inner = ACTIVATIONS[self.config["hidden_act"]](inner)
            inner = inner * F.linear(x, weights["mlp.gate.weight"], weights.get("mlp.gate.bias"))
        return F.linear(inner, weights["mlp.proj.weight"])

    def _attention(self, x: Tensor, weights: "_Weights", layer: int) -> Tensor:
        config, width = self.config, self.config["head_size"]
        count = config["num_attention_heads"] // self.tensor
        shared = math.ceil(config["num_key_value_heads"] / self.tensor)
        joined = F.linear(x, weights["attention.qkv.weight"], weights.get("attention.qkv.bias"))
        query, key, value = joined.unflatten(-1, (-1, width)).transpose(0, 1).split([count, shared, shared])  # (heads, T, H)
        if config.get("qk_layernorm"):
            query = rms_norm(query, weights["attention.q_layernorm.weight"], config["norm_epsilon"])
            key = rms_norm(key, weights["attention.k_layernorm.weight"], config["norm_epsilon"])
        cosine, sine = self._turns(len(x), layer)
        query, key = turn(query, cosine, sine), turn(key, cosine, sine)
        key, value = key.repeat_interleave(count // shared, 0), value.repeat_interleave(count // shared, 0)
        scaling = 1.0 / config.get("attention_multiplier", 1.0)
        if config.get("query_pre_attn_scalar"):
            scaling = math.sqrt(config["query_pre_attn_scalar"]) / math.sqrt(width)
        scores = query @ key.transpose(-1, -2) / (math.sqrt(width) * scaling)
        cap = config.get("attn_logit_softcapping")
        scores = (scores / cap).tanh() * cap if cap else scores
        windows = (config.get("runtime_defaults") or {}).get("max_attention_window") or [config["max_position_embeddings"]]
        window = windows[layer % len(windows)]
        ago = torch.arange(len(x))[:, None] - torch.arange(len(x))
        unseen = (ago < 0) | (ago >= (window if window < config["max_position_embeddings"] else len(x)))
        scores = scores.masked_fill(unseen, -math.inf)
        return F.linear((scores.softmax(-1) @ value).transpose(0, 1).flatten(1), weights["attention.dense.weight"])

    def _turns(self, tokens: int, layer: int) -> tuple[Tensor, Tensor]:
        """(T, R / 2) cosines and sines of the R turned numbers of a head."""
        config = self.config
        every = config.get("sliding_window_pattern")
        base = config["rope_local_base_freq"] if every and (layer + 1) % every else config["rotary_base"]
        turned = int(config["head_size"] * config["rotary_pct"])
        frequencies = 1.0 / base ** (torch.arange(0, turned, 2).float() / turned)
        scaling, size = config.get("rotary_scaling"), 1.0
        if config["position_embedding_type"] == "long_rope":
            original = config["original_max_position_embeddings"]
            kind = "long" if tokens > original else "short"
            frequencies = frequencies / torch.tensor(config[f"longrope_scaling_{kind}_factors"])
            ratio = config["max_position_embeddings"] / original
            size = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        elif scaling and scaling["type"] == "linear":
            frequencies = frequencies / scaling["factor"]
        elif scaling and scaling["type"] == "llama3":
            frequencies = llama3_frequencies(frequencies, scaling)
        angles = torch.arange(tokens).float()[:, None] * frequencies
        return angles.cos() * size, angles.sin() * size


class _Weights:
    """Tensors of a layer on a rank, in float32, read once."""

    def __init__(self, rank: Checkpoint, prefix: str) -> None:
        self._read = {name.removeprefix(prefix): rank.read(name).float() for name in rank.sources if name.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        return self._read[name]

    def get(self, name: str) -> Tensor | None:
        return self._read.get(name)


def _reduced(partial: list[Tensor], bias: Tensor | None) -> Tensor:
    """The sum over the ranks, and the bias once."""
    total = torch.stack(partial).sum(0)
    return total if bias is None else total + bias


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of (heads, T, H): number i of the turned ones goes with number i + R / 2 (rope_gpt_neox)."""
    half = cosine.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


def llama3_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Slow waves are slowed by ``factor``, fast ones kept, those between blended. Source: Llama 3.1, apply_scaling."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * frequencies / (2 * math.pi)  # full turns within the original length
    share: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    slowed: Tensor = frequencies * (share + (1 - share) / scaling["factor"])
    return slowed
