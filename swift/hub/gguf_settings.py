"""What a GGUF file says of a model beyond what transformers reads: windows, caps, experts, rotary scaling.

Names of the keys: gguf.constants.Keys; what llama.cpp makes of them: its src/llama-model.cpp.
"""

from typing import Any

# Of these transformers reads none, or only in files of some architectures.
FIELDS = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.key_length": ("head_dim",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def complete(config: Any, arch: str, reader: Any) -> None:
    """Set in ``config``, which transformers made of the file that ``reader`` has open, what it left out."""
    said = {key.removeprefix(f"{arch}."): field for key, field in reader.fields.items() if key.startswith(f"{arch}.")}
    for key, names in FIELDS.items():
        for name in names:
            if key in said and hasattr(config, name):
                setattr(config, name, said[key].contents())
    present = {tensor.name for tensor in reader.tensors}
    for name, tensor in (("attention_bias", "blk.0.attn_output.bias"), ("mlp_bias", "blk.0.ffn_down.bias")):
        if hasattr(config, name):
            setattr(config, name, tensor in present)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = _gemma_scale(config)
    _complete_rope(config, {key: field.contents() for key, field in said.items() if key.startswith("rope.")}, reader)


def _gemma_scale(config: Any) -> int:
    """llama.cpp knows the scale of queries by the number of layers: those of 27 B have width / heads, others the head's width."""
    is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}.get(config.model_type)
    return int(config.hidden_size // config.num_attention_heads if is_27b else config.head_dim)


def _complete_rope(config: Any, said: dict[str, Any], reader: Any) -> None:
    """Rotary frequencies: a factor for each of them is what transformers calls longrope."""
    tensors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name in ROPE_TENSORS}
    nested = getattr(config, "rope_parameters", None) or {}
    rope = nested.get("full_attention", nested)
    if "rope.freq_base" in said:
        rope["rope_theta"] = said["rope.freq_base"]
    if "rope.freq_base_swa" in said and "sliding_attention" in nested:
        nested["sliding_attention"]["rope_theta"] = said["rope.freq_base_swa"]
    length = int(said.get("rope.scaling.original_context_length") or config.max_position_embeddings) if rope else 0
    kind = said.get("rope.scaling.type", "none")
    if width := said.get("rope.dimension_count"):
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if "partial_rotary_factor" in rope or width != head:
            rope["partial_rotary_factor"] = width / head
    if ROPE_FACTORS in tensors:
        factors = tensors[ROPE_FACTORS].tolist()
        rope.update(
            rope_type="longrope",
            short_factor=factors,
            long_factor=factors,
            attention_factor=1.0,
            factor=1.0,
            original_max_position_embeddings=length,
        )
    elif LONG_FACTORS in tensors:
        rope.update(
            rope_type="longrope",
            short_factor=tensors[SHORT_FACTORS].tolist(),
            long_factor=tensors[LONG_FACTORS].tolist(),
            attention_factor=float(said.get("rope.scaling.attn_factor", 1.0)),
            factor=1.0,
            original_max_position_embeddings=length,
        )
        config.original_max_position_embeddings = length
    elif kind == "linear":
        rope.update(rope_type="linear", factor=said["rope.scaling.factor"])
    elif kind == "yarn":
        rope.update(rope_type="yarn", factor=said["rope.scaling.factor"], original_max_position_embeddings=length)
