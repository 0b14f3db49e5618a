"""Which weights are trained."""

from dataclasses import dataclass

from swift.config.options import Config, opt
from swift.errors import ConfigError

LORA_OPTIONS = (
    "lora_rank lora_alpha lora_dropout lora_bias lora_dtype lorap_lr_ratio use_rslora use_dora init_weights "
    "target_modules target_regex modules_to_save"
).split()
FULL_OPTIONS = "freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters trainable_parameters_regex".split()


@dataclass(kw_only=True)
class TunerConfig(Config):
    """Tuner."""

    tuner_type: str = opt("lora", "lora trains a low-rank update of the frozen model, full trains its weights", choices=("lora", "full"))
    tuner_backend: str = opt("peft", "library that applies adapters", choices=("peft",))
    lora_rank: int = opt(8, "rank r of the update B A; memory grows with it", minimum=1)
    lora_alpha: float = opt(32.0, "the update is scaled by lora_alpha / lora_rank", minimum=0)
    lora_dropout: float = opt(0.05, "dropout on the input of the update", minimum=0, maximum=0.99)
    lora_bias: str = opt("none", "which biases are trained", choices=("none", "all", "lora_only"))
    lora_dtype: str | None = opt(None, "precision of the adapter; by default float32", choices=("float32", "bfloat16", "float16"))
    lorap_lr_ratio: float | None = opt(None, "LoRA+: learning rate of B divided by that of A; 16 is a common choice", minimum=0)
    use_rslora: bool = opt(False, "scale by lora_alpha / sqrt(lora_rank)")
    use_dora: bool = opt(False, "train magnitude and direction apart (DoRA)")
    init_weights: str = opt("true", "start of A and B; true starts at an update of zero", choices=("true", "false", "gaussian"))
    target_modules: list[str] = opt(["all-linear"], "names or endings of the adapted modules; all-linear finds them by structure")
    target_regex: str | None = opt(None, "regular expression over module names, in place of target_modules")
    modules_to_save: list[str] = opt([], "modules that are trained and saved whole beside the adapter")
    freeze_parameters: list[str] = opt([], "full: prefixes of parameters that stay frozen")
    freeze_parameters_regex: str | None = opt(None, "full: regular expression of parameters that stay frozen")
    freeze_parameters_ratio: float = opt(
        0.0, "full: share of the parameters, from the embedding up, that stays frozen", minimum=0, maximum=1
    )
    trainable_parameters: list[str] = opt([], "full: prefixes of parameters that are trained even if frozen by another option")
    trainable_parameters_regex: str | None = opt(None, "full: regular expression of parameters that are trained even so")

    def check(self) -> None:
        super().check()
        if self.tuner_type == "full":
            self.refuse_without_effect(LORA_OPTIONS, "with --tuner_type full")
            if getattr(self, "quant_method", None):
                raise ConfigError("--tuner_type full cannot train quantized weights", hint="use --tuner_type lora, or drop --quant_method")
        else:
            self.refuse_without_effect(FULL_OPTIONS, "with --tuner_type lora")
        if self.target_regex is not None:
            self.refuse_without_effect(("target_modules",), "when --target_regex is given")
