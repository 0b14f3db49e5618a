"""What training by Megatron-Core takes beside the sizes of the mesh; the names are Megatron's and ms-swift's."""

from dataclasses import dataclass
from typing import Any

from swift.config.options import Config, opt
from swift.errors import ConfigError

OWN = (
    "sequence_parallel",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "megatron_extra_kwargs",
)


@dataclass(kw_only=True)
class MegatronConfig(Config):
    """Megatron-Core."""

    sequence_parallel: bool = opt(False, "megatron: processes that share a layer share the tokens too, where each token is by itself")
    recompute_granularity: str | None = opt(
        None,
        "megatron: what is computed again in the backward pass: whole layers, or of each the parts that --recompute_modules names; "
        "by default none, and full with --gradient_checkpointing true",
        choices=("none", "selective", "full"),
    )
    recompute_method: str | None = opt(
        None, "megatron: layers in groups of one size, or the first ones of each stage, with full", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = opt(None, "megatron: layers of a group, or number of the first ones, with full", minimum=1)
    recompute_modules: list[str] = opt([], "megatron: parts of a layer, such as core_attn, mlp, moe, layernorm, with selective")
    megatron_extra_kwargs: dict[str, Any] | None = opt(None, "megatron: JSON object of further fields of its TransformerConfig")

    def check_megatron(self, strategy: str | None) -> None:
        """ConfigError for options of Megatron-Core that have no effect with ``strategy``, or none together."""
        if strategy != "megatron":
            self.refuse_without_effect(OWN, "without --strategy megatron")
            return
        kind = self.recompute_granularity
        if kind != "full":
            self.refuse_without_effect(("recompute_method", "recompute_num_layers"), "without --recompute_granularity full")
        elif self.recompute_method is None and self.recompute_num_layers is not None:
            raise ConfigError("--recompute_num_layers needs --recompute_method", hint="say uniform or block")
        if kind != "selective":
            self.refuse_without_effect(("recompute_modules",), "without --recompute_granularity selective")

    def transformer_fields(self, *, recompute_all: bool) -> dict[str, Any]:
        """Fields of TransformerConfig. ``recompute_all`` is what --gradient_checkpointing says, where no option here does."""
        kind = self.recompute_granularity or ("full" if recompute_all else "none")
        fields: dict[str, Any] = dict(self.megatron_extra_kwargs or {})
        if kind == "full":
            fields |= {
                "recompute_granularity": "full",
                "recompute_method": self.recompute_method or "uniform",
                "recompute_num_layers": self.recompute_num_layers or 1,
            }
        elif kind == "selective":
            fields |= {"recompute_granularity": "selective"}
            if self.recompute_modules:
                fields["recompute_modules"] = list(self.recompute_modules)
        return fields
