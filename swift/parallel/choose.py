"""From options to a strategy, and what it cannot be combined with: said before anything is loaded."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from swift.config.commands import SftConfig
from swift.config.optim import BITSANDBYTES
from swift.errors import ConfigError
from swift.model.policy import Policy
from swift.parallel import STRATEGIES
from swift.parallel.mesh import Mesh, Sizes, sizes_of
from swift.parallel.pipeline.run import Pipeline
from swift.parallel.pipeline.split import split
from swift.parallel.world import World

NOT_SHARDED = ("galore_adamw", "muon", "adafactor", *BITSANDBYTES)  # optimizers that look at whole matrices or blocks of numbers


@dataclass(frozen=True)
class Arrangement:
    """The strategy of a run, and how its processes are arranged."""

    strategy: str
    sizes: Sizes
    experts: int = 1  # processes that share the experts of each layer

    def __str__(self) -> str:
        return ", ".join([self.strategy, str(self.sizes), *([f"ep {self.experts}"] if self.experts > 1 else [])])

    @property
    def readers(self) -> int:
        """Processes, or groups of them, that see different rows."""
        return self.sizes.dp

    def reader(self, rank: int) -> int:
        """Which reader the process ``rank`` belongs to: neighbours share a sequence and a layer."""
        return rank // (self.sizes.cp * self.sizes.tp) % self.sizes.dp

    def stream(self, rank: int) -> int:
        """The random numbers that the process ``rank`` draws: processes that share a layer drop the same activations, no others do."""
        return rank // self.sizes.tp

    def named_reader(self, rank: int) -> str | None:
        """What files call the reader of the process ``rank``: "" if there is one alone; None if another process writes for it."""
        if self.reader(rank) in map(self.reader, range(rank)):
            return None
        return f"-{self.reader(rank)}" if self.readers > 1 else ""

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all weights."""
        return self.strategy in ("fsdp2", "deepspeed", "megatron") or self.sizes.tp > 1 or self.sizes.pp > 1 or self.experts > 1


def arrange(config: SftConfig, world: World) -> Arrangement:
    """What ``config`` asks of the processes of ``world``. ConfigError for what does not go together."""
    sizes = sizes_of(
        world.size,
        pp=config.pipeline_model_parallel_size,
        cp=config.sequence_parallel_size,
        tp=config.tensor_model_parallel_size,
    )
    is_said = config.said("strategy") or config.said("fsdp") or config.said("deepspeed")
    is_fit = config.strategy is not None and (config.strategy in ("ddp", "fsdp2")) != world.is_alone
    if config.strategy is None or (not is_said and not is_fit and config.strategy in ("single", "ddp", "fsdp2")):
        # A run that goes on in another number of processes takes what its strategy is there.
        config.derive("strategy", "single" if world.is_alone else "ddp", "one process" if world.is_alone else f"{world.size} processes")
    found = Arrangement(str(config.strategy), sizes, config.expert_model_parallel_size)
    if found.strategy == "single" and not world.is_alone:
        raise ConfigError(f"--strategy single is for one process, and there are {world.size}", hint="leave --strategy away")
    if found.strategy in ("ddp", "fsdp2") and world.is_alone:
        raise ConfigError(
            f"--strategy {found.strategy} needs several processes, and this is one",
            hint="NPROC_PER_NODE=2 swift sft ..., torchrun, or swift launch start them",
        )
    if found.experts > 1 and found.strategy == "deepspeed":
        raise ConfigError(
            f"--expert_model_parallel_size {found.experts} and --strategy deepspeed cannot be combined yet",
            hint="use --strategy ddp or fsdp2",
        )
    if sizes.pp > 1 and config.router_aux_loss_coef and found.strategy in ("ddp", "fsdp2"):
        raise ConfigError(
            f"--router_aux_loss_coef and --pipeline_model_parallel_size {sizes.pp} cannot be combined: no process has all blocks",
            hint="--router_aux_loss_coef 0",
        )
    if sizes.cp > 1 and config.torch_compile:
        raise ConfigError(f"--torch_compile and --sequence_parallel_size {sizes.cp} cannot be combined", hint="remove --torch_compile")
    if found.is_sharded:
        _refuse(config, found)
    if (check := getattr(STRATEGIES.get(found.strategy), "check", None)) is not None:
        check(config, sizes)
    return found


def _refuse(config: SftConfig, found: Arrangement) -> None:
    """ConfigError for what needs all weights, or whole matrices, in one process."""
    name, sizes = found.strategy, found.sizes
    shared = (("tensor", sizes.tp), ("pipeline", sizes.pp), ("expert", found.experts))
    said = next((f"--{kind}_model_parallel_size {size}" for kind, size in shared if size > 1), f"--strategy {name}")
    if config.optim in NOT_SHARDED:
        raise ConfigError(
            f"--optim {config.optim} and {said} cannot be combined: it looks at whole matrices, of which each process has a part",
            hint="use --optim adamw_torch_fused, or --strategy ddp",
        )
    if config.lisa_activated_layers:
        raise ConfigError(f"--lisa_activated_layers and {said} cannot be combined: layers are sharded once", hint="use --strategy ddp")
    is_known = config.tuner_type in ("full", "lora") or (said == "--strategy fsdp2" and config.tuner_type in ("ia3", "boft", "fourierft"))
    if not is_known:
        raise ConfigError(
            f"--tuner_type {config.tuner_type} and {said} cannot be combined",
            hint="use --tuner_type lora, or --strategy ddp",
        )
    if config.quant_method is not None and (name not in ("fsdp2", "deepspeed") or sizes.tp * sizes.pp * found.experts > 1):
        raise ConfigError(f"--quant_method {config.quant_method} and {said} cannot be combined", hint="use --strategy ddp or fsdp2")
    if config.eval_dataset:
        raise ConfigError(
            f"--eval_dataset and {said} cannot be combined: answers are written by a whole model",
            hint="swift eval RUN measures the checkpoints",
        )
    if config.torch_compile:
        raise ConfigError(f"--torch_compile and {said} cannot be combined", hint="remove --torch_compile, or use --strategy ddp")
    if config.report_samples:
        if config.given("report_samples"):
            raise ConfigError(f"--report_samples and {said} cannot be combined: answers are written by a whole model", hint="remove it")
        config.derive("report_samples", 0, said)


def make_strategy(
    config: SftConfig,
    arrangement: Arrangement,
    world: World,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    tokens: int,
    is_flat: bool,
) -> Any:
    """The strategy of this process, with ``dtype`` as the precision of the forward passes, of which the largest has ``tokens``."""
    if arrangement.strategy == "single":
        return STRATEGIES.get("single")(device, autocast_dtype=dtype)
    if arrangement.strategy in ("ddp", "fsdp2"):
        mesh = Mesh(arrangement.sizes, device.type)
        return STRATEGIES.get(arrangement.strategy)(
            world,
            mesh,
            device,
            shards=arrangement.strategy == "fsdp2",
            autocast_dtype=dtype,
            cpu_offload=config.fsdp_cpu_offload,
            reshard_after_forward=config.fsdp_reshard_after_forward,
            sequence_kind=config.sequence_parallel_kind,
            experts=arrangement.experts,
            split=_split(config, mesh, device, dtype, tokens, is_flat) if mesh.size("pp") > 1 else None,
        )
    if arrangement.strategy == "megatron":
        return STRATEGIES.get("megatron")(config, world, device, dtype, is_flat=is_flat)
    return STRATEGIES.get(arrangement.strategy)(config, world, device, dtype)


def make_policy(strategy: Any, model: Any, config: SftConfig) -> Any:
    """What objectives see of ``model``; a strategy whose model is another library's has a policy of its own."""
    if hasattr(strategy, "make_policy"):
        return strategy.make_policy(model)
    return Policy(model, router_aux_loss_coef=config.router_aux_loss_coef, call=strategy.call)


def place_second(strategy: Any, model: Any) -> Any:
    """A frozen ``model`` beside the one that is trained: whole on the device, or in stages if the strategy has any."""
    return strategy.place_second(model) if hasattr(strategy, "place_second") else model.to(strategy.device)


def _split(
    config: SftConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype | None, tokens: int, is_flat: bool
) -> Callable[[Any], Pipeline]:
    """What leaves in a model the stages of this process."""
    return functools.partial(
        split,
        group=mesh.group("pp"),
        device=device,
        tokens=-(-tokens // mesh.size("cp")),  # those that a process computes of a row
        is_flat=is_flat,
        schedule=config.pipeline_schedule,
        virtual=config.virtual_pipeline_model_parallel_size,
        autocast=contextlib.nullcontext if dtype is None else functools.partial(torch.autocast, device.type, dtype=dtype),
    )
