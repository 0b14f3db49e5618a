"""Optimizers: their names, and which options each reads."""

TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor", "muon", "galore_adamw")
BITSANDBYTES = (
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)
OPTIMIZERS = (*TORCH, *BITSANDBYTES)

_SCHEDULE_FREE = "it replaces the learning-rate schedule and wants modes of its own, which the loop does not have"
_LAYERWISE = "updating in the backward pass rules out clipping and accumulation; galore_adamw does without"
REFUSED_OPTIMIZERS = {
    "adamw_torch_xla": "it is for TPUs",
    "adamw_torch_npu_fused": "it needs torch_npu; adamw_torch does the same",
    "adamw_anyprecision": "adamw_torch is the same where weights are float32",
    "adamw_torch_4bit": "torchao is not used; adamw_8bit keeps its state in 8 bits",
    "adamw_torch_8bit": "torchao is not used; adamw_8bit keeps its state in 8 bits",
    "galore_adamw_8bit": "GaLore keeps its small state whole",
    "galore_adafactor": "of GaLore, AdamW alone is built",
    "galore_adamw_layerwise": _LAYERWISE,
    "galore_adamw_8bit_layerwise": _LAYERWISE,
    "galore_adafactor_layerwise": _LAYERWISE,
    "lomo": "updating in the backward pass rules out clipping and accumulation",
    "adalomo": "updating in the backward pass rules out clipping and accumulation",
    "grokadamw": "its package is not used",
    "schedule_free_radam": _SCHEDULE_FREE,
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_sgd": _SCHEDULE_FREE,
    "apollo_adamw": "its package is not used; galore_adamw saves the same memory",
    "apollo_adamw_layerwise": "its package is not used; galore_adamw saves the same memory",
    "stable_adamw": "its package is not used",
}


def reads_betas(optim: str) -> bool:
    """Whether --adam_beta1 and --adam_beta2 mean something to ``optim``."""
    return any(word in optim for word in ("adamw", "lion", "ademamix", "muon"))


def reads_epsilon(optim: str) -> bool:
    """Whether --adam_epsilon means something to ``optim``."""
    return reads_betas(optim) and "lion" not in optim
