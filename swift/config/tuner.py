"""Which weights are trained."""

import re
from dataclasses import dataclass

from swift.config.options import Config, opt
from swift.errors import ConfigError

_ADAPTER_OPTIONS = "target_modules target_regex modules_to_save lora_dtype".split()
LORA_OPTIONS = [
    *"lora_rank lora_alpha lora_dropout lora_bias lorap_lr_ratio use_rslora use_dora init_weights".split(),
    *_ADAPTER_OPTIONS,
]
FULL_OPTIONS = (
    "freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters trainable_parameters_regex "
    "lisa_activated_layers lisa_step_interval use_galore"
).split()
# What each tuner reads; all others of these options are refused with it.
OPTIONS_OF: dict[str, list[str]] = {
    "lora": LORA_OPTIONS,
    "adalora": [
        *"lora_alpha lora_dropout lora_bias".split(),
        *"adalora_target_r adalora_init_r adalora_tinit adalora_tfinal adalora_deltaT adalora_beta1 adalora_beta2".split(),
        *["adalora_orth_reg_weight", *_ADAPTER_OPTIONS],
    ],
    "vera": [*"vera_rank vera_projection_prng_key vera_dropout vera_d_initial".split(), *_ADAPTER_OPTIONS],
    "boft": [*"boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout".split(), *_ADAPTER_OPTIONS],
    "fourierft": [*"fourier_n_frequency fourier_scaling".split(), *_ADAPTER_OPTIONS],
    "ia3": ["ia3_feedforward_modules", *_ADAPTER_OPTIONS],
    "llamapro": ["llamapro_num_new_blocks", "llamapro_num_groups"],
    "full": FULL_OPTIONS,
}
REFUSED_TUNERS = {
    "longlora": "its shifted attention is code for one model family; --max_length and --tuner_type lora train long rows",
    "adapter": "layers put between those of the model can be neither merged nor loaded by PEFT; lora does better at the same size",
    "reft": "it edits hidden states at positions of a prompt, which PEFT cannot load; lora is nearest to it",
    "lora_llm": "it is for models with images; lora adapts the language model",
}
REFUSED_STARTS = {
    "lora-ga": "it needs gradients of the data before training; pissa is a start of the same kind",
    "eva": "it needs activations of the data before training; pissa is a start of the same kind",
    "corda": "it needs activations of the data before training; pissa is a start of the same kind",
}
# Starts that take the update out of the frozen weights, so that the model is the same at the first step.
_TAKES_FROM_BASE = re.compile(r"pissa(_niter_\d+)?|olora")


@dataclass(kw_only=True)
class TunerConfig(Config):
    """Tuner."""

    tuner_type: str = opt(
        "lora",
        "lora, adalora, vera, boft, fourierft and ia3 train an adapter of the frozen model, llamapro new layers, full its weights",
        choices=tuple(OPTIONS_OF),
        refused=REFUSED_TUNERS,
    )
    tuner_backend: str = opt("peft", "library that applies adapters", choices=("peft",))
    lora_rank: int = opt(8, "rank r of the update B A; memory grows with it", minimum=1)
    lora_alpha: float = opt(
        32.0, "the update is scaled by lora_alpha / lora_rank; adalora: by lora_alpha over the rank that is left", minimum=0
    )
    lora_dropout: float = opt(0.05, "dropout on the input of the update", minimum=0, maximum=0.99)
    lora_bias: str = opt("none", "which biases are trained", choices=("none", "all", "lora_only"))
    lora_dtype: str | None = opt(None, "precision of the adapter; by default float32", choices=("float32", "bfloat16", "float16"))
    lorap_lr_ratio: float | None = opt(None, "LoRA+: learning rate of B divided by that of A; 16 is a common choice", minimum=0)
    use_rslora: bool = opt(False, "scale by lora_alpha / sqrt(lora_rank)")
    use_dora: bool = opt(False, "train magnitude and direction apart (DoRA)")
    init_weights: str = opt(
        "true", "start of A and B: true, false, gaussian, pissa, pissa_niter_N, olora, loftq; true is an update of zero"
    )
    target_modules: list[str] = opt(["all-linear"], "names or endings of the adapted modules; all-linear finds them by structure")
    target_regex: str | None = opt(None, "regular expression over module names, in place of target_modules")
    modules_to_save: list[str] = opt([], "modules that are trained and saved whole beside the adapter")
    adalora_target_r: int = opt(8, "adalora: mean rank at the end", minimum=1)
    adalora_init_r: int = opt(12, "adalora: rank of each update at the start", minimum=2)
    adalora_tinit: int = opt(0, "adalora: steps before ranks fall", minimum=0)
    adalora_tfinal: int = opt(0, "adalora: last steps, in which ranks stay as they are", minimum=0)
    adalora_deltaT: int = opt(1, "adalora: steps between two distributions of the ranks", minimum=1)
    adalora_beta1: float = opt(0.85, "adalora: decay of the mean importance", minimum=0.001, maximum=0.999)
    adalora_beta2: float = opt(0.85, "adalora: decay of the importance's spread", minimum=0.001, maximum=0.999)
    adalora_orth_reg_weight: float = opt(0.5, "adalora: weight of the penalty that keeps A and B orthogonal", minimum=0)
    vera_rank: int = opt(256, "vera: rank of the random matrices that all layers share", minimum=1)
    vera_projection_prng_key: int = opt(0, "vera: seed of these matrices", minimum=0)
    vera_dropout: float = opt(0.0, "vera: dropout on the input of the update", minimum=0, maximum=0.99)
    vera_d_initial: float = opt(0.1, "vera: start of the trained vector d")
    boft_block_size: int = opt(4, "boft: size of a rotated block; 0 takes it from boft_block_num", minimum=0)
    boft_block_num: int = opt(0, "boft: rotated blocks of a layer; 0 takes it from boft_block_size", minimum=0)
    boft_n_butterfly_factor: int = opt(1, "boft: butterfly factors; 1 is plain OFT, more need a CUDA GPU", minimum=1)
    boft_dropout: float = opt(0.0, "boft: share of the blocks that do not rotate in a step", minimum=0, maximum=0.99)
    fourier_n_frequency: int = opt(2000, "fourierft: trained coefficients of a layer's update", minimum=1)
    fourier_scaling: float = opt(300.0, "fourierft: the update is scaled by it", minimum=0)
    ia3_feedforward_modules: list[str] = opt([], "ia3: modules whose input is scaled, not their output; by default found by structure")
    llamapro_num_new_blocks: int = opt(4, "llamapro: layers that are added and trained", minimum=1)
    llamapro_num_groups: int | None = opt(None, "llamapro: places where they are added; by default one for each", minimum=1)
    freeze_parameters: list[str] = opt([], "full: prefixes of parameters that stay frozen")
    freeze_parameters_regex: str | None = opt(None, "full: regular expression of parameters that stay frozen")
    freeze_parameters_ratio: float = opt(
        0.0, "full: share of the parameters, from the embedding up, that stays frozen", minimum=0, maximum=1
    )
    trainable_parameters: list[str] = opt([], "full: prefixes of parameters that are trained even if frozen by another option")
    trainable_parameters_regex: str | None = opt(None, "full: regular expression of parameters that are trained even so")
    lisa_activated_layers: int = opt(0, "full: layers that are trained at a time (LISA); 0 trains all", minimum=0)
    lisa_step_interval: int = opt(20, "full: steps after which LISA draws other layers", minimum=1)

    @property
    def trains_adapter(self) -> bool:
        """Whether checkpoints hold an adapter, and not a whole model."""
        return self.tuner_type not in ("full", "llamapro")

    @property
    def changes_base(self) -> bool:
        """Whether the model without its adapter is no longer the one that was loaded."""
        return not self.trains_adapter or self.lora_bias != "none" or self.takes_from_base

    @property
    def takes_from_base(self) -> bool:
        """Whether the start of the adapter is taken out of the frozen weights."""
        return self.tuner_type == "lora" and _TAKES_FROM_BASE.fullmatch(self.init_weights) is not None

    def check(self) -> None:
        super().check()
        mine = OPTIONS_OF[self.tuner_type]
        others = [name for names in OPTIONS_OF.values() for name in names if name not in mine and name in self.__dataclass_fields__]
        self.refuse_without_effect(others, f"with --tuner_type {self.tuner_type}")
        quantized, adapters = getattr(self, "quant_method", None), getattr(self, "adapters", [])
        if quantized and not self.trains_adapter:
            raise ConfigError(
                f"--tuner_type {self.tuner_type} cannot train quantized weights", hint="use --tuner_type lora, or drop --quant_method"
            )
        if self.use_dora and getattr(self, "quant_bits", None) == 8:
            raise ConfigError("--use_dora fails on 8-bit weights of bitsandbytes 0.50", hint="use --quant_bits 4")
        if self.tuner_type != "lora" and adapters and getattr(self, "dataset", None):
            self.refuse_without_effect(
                ("adapters",), f"when training with --tuner_type {self.tuner_type}: only a lora adapter is trained on"
            )
        if self.target_regex is not None:
            self.refuse_without_effect(("target_modules",), "when --target_regex is given")
        if not self.lisa_activated_layers:
            self.refuse_without_effect(("lisa_step_interval",), "without --lisa_activated_layers")
        self._check_start(quantized, adapters)
        self._check_ranks()

    def _check_start(self, quantized: str | None, adapters: list[str]) -> None:
        start = self.init_weights
        if start in REFUSED_STARTS:
            raise ConfigError(f"--init_weights {start} is not available: {REFUSED_STARTS[start]}", hint="use --init_weights pissa")
        if start not in ("true", "false", "gaussian", "loftq") and not _TAKES_FROM_BASE.fullmatch(start):
            raise ConfigError(
                f"--init_weights does not know {start!r}", hint="choose from: true, false, gaussian, pissa, pissa_niter_16, olora, loftq"
            )
        if self.takes_from_base and quantized:
            raise ConfigError(
                f"--init_weights {start} changes the frozen weights, which quantized ones cannot follow", hint="use --init_weights loftq"
            )
        if start == "loftq" and (quantized != "bnb" or getattr(self, "quant_bits", None) != 4):
            raise ConfigError("--init_weights loftq makes up for the loss of 4-bit weights", hint="say --quant_method bnb --quant_bits 4")
        if adapters and (self.takes_from_base or start == "loftq"):
            raise ConfigError(f"--init_weights {start} has no effect with --adapters, which bring their weights", hint="remove one of them")

    def _check_ranks(self) -> None:
        if self.tuner_type == "adalora" and self.adalora_init_r <= self.adalora_target_r:
            raise ConfigError(
                f"--adalora_init_r {self.adalora_init_r} leaves nothing to take away for --adalora_target_r {self.adalora_target_r}",
                hint="start with one and a half times the target",
            )
        if self.tuner_type == "boft" and (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError("one of --boft_block_size and --boft_block_num is given, the other is 0", hint="--boft_block_size 4 is usual")
        groups = self.llamapro_num_groups
        if groups is not None and self.llamapro_num_new_blocks % groups:
            raise ConfigError(
                f"--llamapro_num_new_blocks {self.llamapro_num_new_blocks} is no multiple of --llamapro_num_groups {groups}",
                hint="each group gets as many new layers",
            )
