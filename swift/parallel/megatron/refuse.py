"""What training by Megatron-Core is not combined with: said before anything is loaded, by the option's name."""

from swift.config.commands import SftConfig
from swift.errors import ConfigError
from swift.parallel.megatron import package
from swift.parallel.mesh import Sizes

FULL_ONLY = (
    "freeze_parameters",
    "freeze_parameters_regex",
    "freeze_parameters_ratio",
    "trainable_parameters",
    "trainable_parameters_regex",
)
# Option -> what to do instead; each asks for something inside of layers that are Megatron's here.
NOT_OURS = {
    "neftune_noise_alpha": "noise is added to the embeddings of transformers",
    "use_liger_kernel": "its kernels are for the layers of transformers",
    "attn_impl": "it names an attention of transformers",
    "router_aux_loss_coef": "the loss that balances experts is not built yet for it",
    "gradient_checkpointing_kwargs": "--recompute_granularity says what is computed again",
}

# Of adapters: what is more than A and B beside frozen linear layers.
NOT_PLAIN = {
    "use_dora": "the size of a row is spread over processes",
    "lora_bias": "biases of its layers stay frozen",
    "modules_to_save": "modules of transformers are not computed",
}


def refuse(config: SftConfig, sizes: Sizes) -> None:
    """ConfigError for the first option that does not go with --strategy megatron."""
    _check_tuner(config)
    for name in FULL_ONLY:
        if config.given(name):
            raise ConfigError(f"--strategy megatron and --{name} cannot be combined: it trains all weights", hint="use --strategy fsdp2")
    for name, reason in NOT_OURS.items():
        if config.given(name):
            raise ConfigError(f"--strategy megatron and --{name} cannot be combined: {reason}", hint=f"remove --{name}")
    if config.padding_side == "left":
        raise ConfigError("--strategy megatron and --padding_side left cannot be combined", hint="say --padding_side right")
    _check_precision(config)
    _check_sizes(config, sizes)


def _check_tuner(config: SftConfig) -> None:
    """All weights are trained, or plain LoRA."""
    if config.tuner_type not in ("full", "lora"):
        raise ConfigError(
            f"--strategy megatron trains all weights or LoRA, not --tuner_type {config.tuner_type}",
            hint="say --tuner_type lora; --strategy fsdp2 and ddp train other adapters",
        )
    for name, reason in NOT_PLAIN.items():
        if config.given(name) and getattr(config, name) not in (False, "none", []):
            raise ConfigError(f"--strategy megatron and --{name} cannot be combined: {reason}", hint="use --strategy fsdp2, or remove it")
    if getattr(config, "ref_adapters", None) and not getattr(config, "precompute_ref_log_probs", False):
        raise ConfigError(
            "--strategy megatron and --ref_adapters cannot be combined: it has one adapter", hint="say --precompute_ref_log_probs true too"
        )


def _check_precision(config: SftConfig) -> None:
    """Megatron's layers compute in the precision of the weights."""
    if config.fp16 or config.torch_dtype == "float16":
        raise ConfigError("--strategy megatron and float16 cannot be combined: there is no loss scale", hint="say --torch_dtype bfloat16")
    if config.bf16 and config.torch_dtype is None:
        config.derive("torch_dtype", "bfloat16", "--bf16 true and --strategy megatron")
    if config.bf16 and config.torch_dtype != "bfloat16":
        raise ConfigError(
            f"--bf16 true and --torch_dtype {config.torch_dtype} cannot be combined: Megatron computes in the precision of the weights",
            hint="say --torch_dtype bfloat16",
        )


def _check_sizes(config: SftConfig, sizes: Sizes) -> None:
    experts, virtual = config.expert_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if sizes.dp * sizes.cp % experts:
        raise ConfigError(
            f"--expert_model_parallel_size {experts} does not divide the {sizes.dp * sizes.cp} processes that see different tokens",
            hint="change one",
        )
    if virtual > 1 and sizes.pp == 1:
        raise ConfigError("--virtual_pipeline_model_parallel_size needs --pipeline_model_parallel_size", hint="say both, or none")
    if config.sequence_parallel and sizes.tp == 1:
        raise ConfigError("--sequence_parallel needs --tensor_model_parallel_size", hint="say both, or none")
    if config.sequence_parallel and not package.has_transformer_engine():
        raise ConfigError(
            "--sequence_parallel true needs Transformer Engine, whose norms Megatron-Core uses then, and it is not installed",
            hint="remove it, or pip install 'transformer-engine[pytorch]' where there is CUDA",
        )
    if experts > 1 and sizes.tp > 1 and not config.sequence_parallel:
        said = f"--expert_model_parallel_size {experts} and --tensor_model_parallel_size {sizes.tp}"
        raise ConfigError(f"{said} need --sequence_parallel true in Megatron-Core", hint="say it, or keep one")
