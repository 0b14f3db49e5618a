"""Small random models of many families, for what must hold for any model of transformers."""

import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {},
    "olmo2": {},
    "cohere": {"logit_scale": 0.06},
    "granite": {"logits_scaling": 8.0},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def build(family: str, *, std: float = 0.15, **options: Any) -> Any:
    """The same random model for the same arguments; ``options`` override fields of its configuration."""
    config = CONFIG_MAPPING[family](**{**SMALL, **FAMILIES.get(family, {}), **options})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)
    return model.eval()
