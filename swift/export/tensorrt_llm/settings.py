"""config.json of a TensorRT-LLM checkpoint, from the configuration of the model."""

import math
from collections.abc import Collection
from typing import Any

from swift.errors import ModelError
from swift.export.tensorrt_llm.cuts import Heads
from swift.export.tensorrt_llm.layouts import Layout

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")


def heads_of(config: Any) -> Heads:
    query = config.num_attention_heads
    key_value = getattr(config, "num_key_value_heads", None) or query
    return Heads(query, key_value, getattr(config, "head_dim", None) or config.hidden_size // query)


def settings(
    config: Any, layout: Layout, names: Collection[str], *, dtype: str, ranks: tuple[int, int], quant_algo: str | None
) -> dict[str, Any]:
    """The fields that TensorRT-LLM's configuration class of the architecture takes.

    ``config`` is that of transformers, ``names`` are the tensors of the checkpoint, ``ranks`` the sizes of tensor and of pipeline
    parallelism. ModelError for what TensorRT-LLM's model does not compute.
    """
    tensor, pipeline = ranks
    heads = heads_of(config)
    made: dict[str, Any] = {
        "architecture": config.architectures[0],
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.key_value,
        "head_size": heads.width,
        "intermediate_size": config.intermediate_size,
        "hidden_act": _activation(config),
        "norm_epsilon": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "attn_bias": any(".q_proj.bias" in name for name in names),
        "mlp_bias": any(".up_proj.bias" in name for name in names),
        "mapping": {"world_size": tensor * pipeline, "tp_size": tensor, "pp_size": pipeline},
        "quantization": {"quant_algo": quant_algo, "kv_cache_quant_algo": None},
        "use_parallel_embedding": tensor > 1,
        "embedding_sharding_dim": 0,
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
    }
    made |= _rotary(config, layout, heads)
    windows = _windows(config)
    if windows is not None:
        made["runtime_defaults"] = {"max_attention_window": windows}
    made |= {name: getattr(config, name) for name in layout.copied if getattr(config, name, None) is not None}
    if getattr(config, "attention_multiplier", None) is not None:  # of the scores; TensorRT-LLM divides by the root of the width too
        made["attention_multiplier"] = config.attention_multiplier * math.sqrt(heads.width)
    if getattr(config, "logits_scaling", None) is not None:
        made["output_multiplier_scale"] = 1.0 / config.logits_scaling
    return made | layout.constants


def _activation(config: Any) -> str:
    name = str(getattr(config, "hidden_activation", None) or config.hidden_act)
    if name not in ACTIVATIONS:
        raise ModelError(f"TensorRT-LLM's gated MLP does not compute the activation {name}")
    return name


def _rotary(config: Any, layout: Layout, heads: Heads) -> dict[str, Any]:
    """Fields of the rotary embedding; two bases where layers with a window have their own."""
    given = config.rope_parameters
    made: dict[str, Any] = {"position_embedding_type": "rope_gpt_neox"}
    if "full_attention" in given:
        local = given["sliding_attention"]
        _refuse_rope(local, ("default",), config)
        made["rope_local_base_freq"] = local["rope_theta"]
        made |= _pattern(config)
        given = given["full_attention"]
    _refuse_rope(given, layout.rope, config)
    made["rotary_base"] = given["rope_theta"]
    made["rotary_pct"] = given.get("partial_rotary_factor") or 1.0
    kind = given["rope_type"]
    if kind == "longrope":
        original = given.get("original_max_position_embeddings") or config.original_max_position_embeddings
        made |= {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": original,
            "longrope_scaling_short_factors": given["short_factor"],
            "longrope_scaling_long_factors": given["long_factor"],
        }
    elif kind != "default":
        made["rotary_scaling"] = {"type": kind, **{name: value for name, value in given.items() if name != "rope_theta"}}
    if made["rotary_pct"] != 1.0 and layout.name != "phi3":
        raise ModelError(f"TensorRT-LLM turns whole heads of {config.architectures[0]}, this model {made['rotary_pct']:g} of each")
    if layout.name == "phi3" and heads.width * heads.query != config.hidden_size:
        raise ModelError("TensorRT-LLM knows no width of heads for Phi3ForCausalLM but hidden_size / num_attention_heads")
    return made


def _refuse_rope(given: dict[str, Any], known: tuple[str, ...], config: Any) -> None:
    if given["rope_type"] not in known:
        raise ModelError(
            f"TensorRT-LLM does not compute the rotary scaling {given['rope_type']} for {config.architectures[0]}",
            hint=f"it does {', '.join(known)}",
        )


def _pattern(config: Any) -> dict[str, int]:
    """How often a layer sees everything: the last of every N. TensorRT-LLM's versions spell the field in two ways."""
    kinds = config.layer_types
    every = next((index + 1 for index, kind in enumerate(kinds) if kind == "full_attention"), len(kinds) + 1)
    if any((kind == "full_attention") != ((index + 1) % every == 0) for index, kind in enumerate(kinds)):
        raise ModelError("TensorRT-LLM takes layers with a window in a fixed rhythm, and those of this model have none")
    return {"sliding_window_pattern": every, "_sliding_window_pattern": every}


def _windows(config: Any) -> list[int] | None:
    """Tokens that each layer sees, or None if none has a window."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if "sliding_attention" not in kinds:
        return None
    return [window if kind == "sliding_attention" else config.max_position_embeddings for kind in kinds]
