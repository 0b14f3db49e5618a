"""Training by preferences: what answers are compared, with which loss, and with what reference."""

from dataclasses import dataclass

from swift.config.options import Config, opt
from swift.errors import ConfigError

NOT_BUILT = "of training by preferences or rewards, dpo alone is built"
REFUSED_TYPES = {name: NOT_BUILT for name in ("orpo", "simpo", "kto", "cpo", "rm", "ppo", "grpo", "gkd")}
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft")
_SORTS = "it sorts the pairs of a forward pass, so that the loss would depend on how a step is cut"
REFUSED_LOSSES = {
    "bco_pair": "it subtracts a mean reward of the steps before, which no checkpoint would hold",
    "aot": _SORTS,
    "aot_pair": _SORTS,
    "aot_unpaired": _SORTS,
    "kto_pair": "pairs have no loss of this kind any more",
}
SMOOTHED = ("sigmoid", "robust", "exo_pair")


@dataclass(kw_only=True)
class PreferenceConfig(Config):
    """Preferences."""

    rlhf_type: str = opt("dpo", "how a model is trained by preferences or rewards", choices=("dpo",), refused=REFUSED_TYPES)
    beta: float | None = opt(None, "how close the policy stays to the reference; by default 0.1", minimum=1e-6)
    loss_type: list[str] | None = opt(
        None,
        f"loss of a pair, or several that are added: {', '.join(LOSS_TYPES)}; by default sigmoid",
        choices=LOSS_TYPES,
        refused=REFUSED_LOSSES,
    )
    loss_weights: list[float] | None = opt(None, "weight of each loss of --loss_type; by default 1")
    label_smoothing: float = opt(0.0, "share of the pairs that may be the wrong way round, less than 0.5", minimum=0)
    discopop_tau: float = opt(0.05, "temperature of the loss discopop", minimum=1e-6)
    rpo_alpha: float | None = opt(None, "weight of the mean cross-entropy of the chosen answer, which is added", minimum=0)
    reference_free: bool = opt(False, "no reference: all answers are thought equally likely before training")
    ref_model: str | None = opt(None, "the reference, written as --model is; by default the model before training")
    ref_model_revision: str | None = opt(None, "branch, tag or commit of the reference")
    ref_adapters: list[str] = opt([], "a run directory or checkpoint whose adapter the reference has; that of --adapters to go on from it")
    precompute_ref_log_probs: bool = opt(
        False, "compute what the reference says once, before training, and keep it in the cache: no second model while training"
    )

    def check(self) -> None:
        super().check()
        if self.beta is None:
            self.derive("beta", 0.1, f"rlhf_type {self.rlhf_type}")
        if getattr(self, "loss_scale", None) is None:
            self.derive("loss_scale", "last_round", f"rlhf_type {self.rlhf_type}")
        if self.loss_type is None:
            self.derive("loss_type", ["sigmoid"], f"rlhf_type {self.rlhf_type}")
        self._check_losses(self.loss_type or [])
        self._check_reference()
        if getattr(self, "packing", False):
            raise ConfigError("--packing is for single rows: pairs are computed side by side without padding anyway", hint="remove it")
        if getattr(self, "router_aux_loss_coef", 0):
            raise ConfigError(
                "--router_aux_loss_coef is not built yet for pairs: their loss has no term that balances experts", hint="remove it"
            )

    def _check_losses(self, losses: list[str]) -> None:
        smoothing = self.label_smoothing
        if not losses or len(set(losses)) < len(losses):
            raise ConfigError(f"--loss_type {' '.join(losses)}: name each loss once", hint="--loss_type sigmoid sft --loss_weights 1 0.5")
        if self.loss_weights is not None and len(self.loss_weights) != len(losses):
            raise ConfigError(
                f"--loss_weights has {len(self.loss_weights)} values for {len(losses)} losses",
                hint="give one for each value of --loss_type",
            )
        if not any(name in SMOOTHED for name in losses):
            self.refuse_without_effect(("label_smoothing",), f"with --loss_type {' '.join(losses)}")
        if smoothing >= 0.5:
            raise ConfigError(
                f"--label_smoothing {smoothing:g}: from 0.5 on the rejected answer would be preferred", hint="0.1 is a usual value"
            )
        if "exo_pair" in losses and smoothing == 0:
            raise ConfigError("--label_smoothing 0: the loss exo_pair needs more than 0", hint="say 0.001")
        if "discopop" not in losses:
            self.refuse_without_effect(("discopop_tau",), "without --loss_type discopop")

    def _check_reference(self) -> None:
        if self.reference_free:
            self.refuse_without_effect(("ref_model", "ref_adapters", "precompute_ref_log_probs"), "with --reference_free true")
        if self.ref_model is None:
            self.refuse_without_effect(("ref_model_revision",), "without --ref_model")
        if len(self.ref_adapters) > 1:
            raise ConfigError(f"--ref_adapters takes one adapter, not {len(self.ref_adapters)}", hint="keep one")
        if self.precompute_ref_log_probs and getattr(self, "streaming", False):
            raise ConfigError(
                "--precompute_ref_log_probs needs all rows, which --streaming true does not read before training", hint="remove one of them"
            )
