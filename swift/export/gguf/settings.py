"""What a GGUF file says of a model besides its weights and tokenizer: the keys that runtimes of llama.cpp's kind read."""

import math
from typing import Any

import numpy as np
import torch

from swift.errors import ModelError
from swift.export.gguf.layout import Target
from swift.hub.gguf_settings import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

# {key after the architecture: names in config.json, of which the first that is there counts}
NUMBERS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "rope.dimension_sections": ("mrope_section",),
}
FACTORS: dict[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "attention.scale": ("attention_multiplier",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "attention.clamp_kqv": ("clip_qkv",),
}
FLAGS: dict[str, tuple[str, ...]] = {
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_weights_norm": ("norm_topk_prob",),
}
# Widths that config.json may give in several ways, and of which the weights are sure: the last dimension of these.
WIDTHS = {
    "feed_forward_length": ".ffn_down.weight",
    "expert_feed_forward_length": ".ffn_down_exps.weight",
    "expert_shared_feed_forward_length": ".ffn_down_shexp.weight",
}


def settings(config: Any, targets: list[Target], *, window: bool = True) -> dict[str, Any]:
    """{key after the architecture: int, float, bool, str or list}. Without ``window`` the context ends where attention does."""
    found: dict[str, Any] = {}
    for table, kind in ((NUMBERS, int), (FACTORS, float), (FLAGS, bool)):
        for key, names in table.items():
            value = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
            if value is not None:
                found[key] = [kind(item) for item in value] if isinstance(value, (list, tuple)) else kind(value)
    for key, ending in WIDTHS.items():
        width = next((target.shape[-1] for target in targets if target.name.endswith(ending)), None)
        if width is not None:
            found[key] = width
    if "feed_forward_length" not in found:
        found["feed_forward_length"] = int(getattr(config, "intermediate_size", 0) or found.get("expert_feed_forward_length", 0))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found["attention.key_length"] = found["attention.value_length"] = int(head)
    if size := window_of(config):
        if window:
            found["attention.sliding_window"] = size
        else:
            found["context_length"] = min(found["context_length"], size)
    found |= rope_settings(config, int(head))
    return found


def window_of(config: Any) -> int | None:
    """Tokens that layers with a sliding window see; None where no layer has one."""
    size = getattr(config, "sliding_window", None)
    if not size or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    return int(size) if kinds is None or "sliding_attention" in kinds else None


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary parameters of layers that attend to everything; empty for a model that has none."""
    nested: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return dict(nested.get("full_attention", nested))


def rope_settings(config: Any, head: int) -> dict[str, Any]:
    """Keys below rope. for the rotary parameters of ``config``, whose heads are ``head`` wide."""
    rope = rope_of(config)
    if not rope:
        return {}
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotary_width(config, head)}
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
        if local.get("rope_type", "default") != "default":
            raise ModelError("rotary scaling of layers with a sliding window has no place in GGUF files")
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    elif kind == "longrope":
        found |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": _attention_factor(config, rope, original)}
    elif kind not in ("default", "llama3"):
        raise ModelError(f"rotary scaling of type {kind} has no place in GGUF files")
    if kind in ("yarn", "longrope") and original:
        found["rope.scaling.original_context_length"] = int(original)
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"), ("yarn_attn_factor", "attention_factor")):
        if kind == "yarn" and rope.get(name) is not None:
            found[f"rope.scaling.{key}"] = float(rope[name])
    return found


def rotary_width(config: Any, head: int) -> int:
    """Dimensions of a head that are rotated."""
    share = rope_of(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head * share)


def rope_tensors(config: Any, head: int) -> dict[str, Any]:
    """Further tensors of the file: what rotary frequencies are divided by, (rotary width / 2,) in float32."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        width = rotary_width(config, head)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        return {ROPE_FACTORS: (plain / scaled).numpy().astype(np.float32)}
    if kind == "longrope":
        return {
            LONG_FACTORS: np.array(rope["long_factor"], dtype=np.float32),
            SHORT_FACTORS: np.array(rope["short_factor"], dtype=np.float32),
        }
    return {}


def _attention_factor(config: Any, rope: dict[str, Any], original: int | None) -> float:
    """What cosines and sines are multiplied with, as transformers computes it (LongRoPE, arXiv:2402.13753)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if not original:
        raise ModelError("config.json gives no original_max_position_embeddings, which its longrope scaling needs")
    factor = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
