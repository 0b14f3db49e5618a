"""How the rows of a step are put into forward passes. Nothing here changes the loss of a step, except what packs make of it."""

from dataclasses import dataclass

from swift.config.options import Config, opt
from swift.errors import ConfigError


@dataclass(kw_only=True)
class BatchingConfig(Config):
    """Batching."""

    padding_free: bool | None = opt(None, "compute rows side by side without padding; by default wherever the model keeps them apart")
    share_prefixes: bool = opt(True, "compute once what rows of a pass or step begin with in common (dropout then draws once for it)")
    max_tokens_per_batch: int | None = opt(
        None, "tokens of one forward pass without padding; by default 1024 on a CPU, else batch size x longest row", minimum=1
    )
    packing: bool = opt(False, "a row of a step is a pack of rows, filled up to packing_length tokens")
    packing_length: int | None = opt(None, "tokens that a pack computes at most; by default max_length", minimum=2)
    packing_strategy: str = opt(
        "binpack",
        "binpack fills packs well and puts rows that begin alike together, sequential keeps the order of the rows",
        choices=("binpack", "sequential"),
    )
    group_by_length: bool = opt(False, "put rows of similar length into one step")
    dataloader_num_workers: int = opt(1, "steps that a background thread prepares ahead; 0 prepares them in line", minimum=0)

    def check(self) -> None:
        super().check()
        if self.padding_free is False:
            if self.packing:
                raise ConfigError("--packing needs rows without padding, --padding_free false pads them", hint="remove one of them")
            self.refuse_without_effect(("share_prefixes", "max_tokens_per_batch"), "with --padding_free false")
        if not self.packing:
            self.refuse_without_effect(("packing_length", "packing_strategy"), "without --packing true")
        elif self.group_by_length:
            raise ConfigError("--group_by_length has no effect with --packing: packs have one length", hint="remove one of them")
        if self.group_by_length and not self.train_dataloader_shuffle:  # type: ignore[attr-defined]
            raise ConfigError(
                "--group_by_length reorders rows, --train_dataloader_shuffle false keeps their order", hint="remove one of them"
            )
        if self.router_aux_loss_coef:  # type: ignore[attr-defined]
            self.derive("share_prefixes", False, "experts are balanced over all tokens of all rows")
