"""Megatron-Core's settings of a model, each with where it comes from: config.json, or the tensors that the checkpoint has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.errors import ModelError
from swift.parallel.megatron.layout import Dims, padded_vocabulary
from swift.parallel.megatron.names import Entry, by_name

# Factors and caps of other families, with the value that means nothing is done.
OTHERS = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "attention_chunk_size": None,
    "num_shared_experts": 0,
    "n_shared_experts": 0,
    "router_jitter_noise": 0,
}
# Megatron's RotaryEmbedding has these three of Llama 3's numbers in its code.
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@dataclass
class Settings:
    """Arguments of TransformerConfig and GPTModel, and what each was read from."""

    transformer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dims: Dims = field(default_factory=lambda: Dims(1, 1, 1, 1, 1))

    def add(self, name: str, value: Any, source: str, *, of_model: bool = False) -> None:
        (self.model if of_model else self.transformer)[name] = value
        self.sources[name] = source


def read_settings(config: dict[str, Any], entries: Sequence[Entry], *, tp: int = 1, divisible_by: int = 128) -> Settings:
    """Settings for the text model of ``config`` (a config.json), whose tensors ``entries`` describe.

    Raises ModelError, by name, for what Megatron's GPTModel does not compute. What a name does not show (a norm that adds 1
    to its weight, scaled embeddings) is found by comparing logits, once weights are there.
    """
    _refuse_others(config)
    found, names = Settings(), by_name(entries)
    heads = _need(config, "num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or _need(config, "hidden_size") // heads
    for name, value, source in (
        ("num_layers", _need(config, "num_hidden_layers"), "num_hidden_layers"),
        ("hidden_size", _need(config, "hidden_size"), "hidden_size"),
        ("num_attention_heads", heads, "num_attention_heads"),
        ("num_query_groups", groups, "num_key_value_heads"),
        ("kv_channels", head_dim, "head_dim" if config.get("head_dim") else "hidden_size / num_attention_heads"),
        ("ffn_hidden_size", _need(config, "intermediate_size"), "intermediate_size"),
        ("attention_dropout", config.get("attention_dropout", 0.0), "attention_dropout"),
    ):
        found.add(name, value, source)
    _read_norm_and_activation(found, config)
    _read_presence(found, names)
    _read_window(found, config)
    _read_experts(found, config, names)
    _read_rotary(found, config, head_dim)
    vocabulary = _need(config, "vocab_size")
    padded = padded_vocabulary(vocabulary, multiple=divisible_by, tp=tp)
    found.add("vocab_size", padded, f"vocab_size {vocabulary}, to a multiple of {divisible_by} and {tp}", of_model=True)
    found.add("max_sequence_length", config.get("max_position_embeddings", 2048), "max_position_embeddings", of_model=True)
    tied = "output_layer.weight" not in names
    found.add("share_embeddings_and_output_weights", tied, "no tensor lm_head.weight" if tied else "tensor lm_head.weight", of_model=True)
    found.dims = Dims(heads, groups, head_dim, vocabulary, padded)
    return found


def _need(config: dict[str, Any], name: str) -> int:
    if config.get(name) is None:
        raise ModelError(f"config.json has no {name}, which Megatron-Core needs", hint="train it by --strategy fsdp2")
    return int(config[name])


def _refuse(what: str) -> ModelError:
    return ModelError(f"Megatron-Core's GPTModel does not compute {what}", hint="train it by --strategy fsdp2")


def _refuse_others(config: dict[str, Any]) -> None:
    for name, neutral in OTHERS.items():
        if (value := config.get(name)) not in (None, neutral):
            raise _refuse(f"{name} = {value}")


def _read_norm_and_activation(found: Settings, config: dict[str, Any]) -> None:
    if config.get("rms_norm_eps") is None:
        raise _refuse("this model's norms: config.json has no rms_norm_eps")
    found.add("normalization", "RMSNorm", "rms_norm_eps")
    found.add("layernorm_epsilon", config["rms_norm_eps"], "rms_norm_eps")
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation not in ("silu", "gelu_pytorch_tanh"):
        raise _refuse(f"hidden_act = {activation}")
    found.add("activation_func", activation, "hidden_act")
    found.add("gated_linear_unit", True, "tensors of gate and up")


def _read_presence(found: Settings, names: dict[str, Entry]) -> None:
    """What the tensors show. Megatron has biases in all linear layers or none, but for those of q, k and v."""
    layer = "decoder.layers.0."
    qkv, proj, fc1, fc2 = (
        f"{layer}{name}.bias" in names
        for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    )
    if len({proj, fc1, fc2}) > 1 or (proj and not qkv):
        raise _refuse("a bias of some linear layers only (o_proj, gate_proj, up_proj, down_proj)")
    found.add("add_bias_linear", proj, "tensors o_proj.bias and others" if proj else "no tensor o_proj.bias")
    found.add("add_qkv_bias", qkv, "tensor q_proj.bias" if qkv else "no tensor q_proj.bias")
    norms = f"{layer}self_attention.q_layernorm.weight" in names
    found.add("qk_layernorm", norms, "tensor q_norm.weight" if norms else "no tensor q_norm.weight")


def _read_window(found: Settings, config: dict[str, Any]) -> None:
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or (["sliding_attention"] if window else ["full_attention"]) * config["num_hidden_layers"]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise _refuse(f"layers of kind {sorted(unknown)[0]}")
    if not window or "sliding_attention" not in kinds:
        return
    # Hugging Face's window counts the token itself, Megatron's counts those before it.
    found.add("window_size", (window - 1, 0), "sliding_window")
    if "full_attention" in kinds:
        found.add("window_attn_skip_freq", [int(kind == "sliding_attention") for kind in kinds], "layer_types")


def _read_experts(found: Settings, config: dict[str, Any], names: dict[str, Entry]) -> None:
    experts = config.get("num_local_experts") or config.get("num_experts")
    layers = [f"decoder.layers.{layer}.mlp.router.weight" in names for layer in range(config["num_hidden_layers"])]
    if not any(layers):
        return
    if not experts:
        raise _refuse("a router without num_experts in config.json")
    found.add("num_moe_experts", experts, "num_local_experts or num_experts")
    found.add("moe_router_topk", _need(config, "num_experts_per_tok"), "num_experts_per_tok")
    width = config.get("moe_intermediate_size")
    found.add("moe_ffn_hidden_size", width or config["intermediate_size"], "moe_intermediate_size" if width else "intermediate_size")
    found.add("moe_layer_freq", 1 if all(layers) else [int(layer) for layer in layers], "tensors of routers")
    # A softmax over all experts, then the largest, divided by their sum, is the softmax over the largest.
    normalised = config.get("norm_topk_prob", True)
    found.add("moe_router_pre_softmax", not normalised, "norm_topk_prob" if "norm_topk_prob" in config else "no norm_topk_prob")


def _read_rotary(found: Settings, config: dict[str, Any], head_dim: int) -> None:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = rope.get("rope_theta") or config.get("rope_theta")
    if base is None:
        raise _refuse("positions without rope_theta in config.json")
    found.add("position_embedding_type", "rope", "rope_theta", of_model=True)
    found.add("rotary_base", base, "rope_theta", of_model=True)
    percent = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    found.add("rotary_percent", percent, "partial_rotary_factor", of_model=True)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        found.add("seq_len_interpolation_factor", rope["factor"], "rope_parameters.factor", of_model=True)
    elif kind == "llama3":
        if other := [f"{name} = {rope.get(name)}" for name, value in LLAMA3.items() if rope.get(name) != value]:
            raise _refuse(f"rope_type llama3 with {other[0]}")
        found.add("rope_scaling", True, "rope_parameters.rope_type", of_model=True)
        found.add("rope_scaling_factor", rope["factor"], "rope_parameters.factor", of_model=True)
    elif kind != "default":
        raise _refuse(f"rope_type {kind}")
