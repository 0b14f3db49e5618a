"""How training is spread over processes."""

import itertools
from dataclasses import dataclass

from swift.config.megatron import MegatronConfig
from swift.config.options import opt
from swift.errors import ConfigError

STRATEGIES = ("single", "ddp", "fsdp2", "deepspeed", "megatron")
SCHEDULES = ("gpipe", "1f1b", "interleaved")


@dataclass(kw_only=True)
class ParallelConfig(MegatronConfig):
    """Several processes."""

    strategy: str | None = opt(
        None,
        "what each process holds: all (single, ddp), a part of weights, gradients and optimizer (fsdp2), or as deepspeed or megatron "
        "has it; by default fsdp2 with --fsdp, deepspeed with --deepspeed, else ddp where there are several processes",
        choices=STRATEGIES,
    )
    fsdp: str | None = opt(
        None, "shard weights, gradients and optimizer over the processes: fsdp2; as Hugging Face has it also full_shard and offload"
    )
    fsdp_cpu_offload: bool = opt(False, "fsdp2: keep the shards and the optimizer in main memory")
    fsdp_reshard_after_forward: bool = opt(True, "fsdp2: let go of a block's whole weights after its forward pass, and gather them again")
    deepspeed: str | None = opt(
        None, "train by DeepSpeed: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, or a JSON file of its settings"
    )
    tensor_model_parallel_size: int = opt(1, "processes that share each layer", minimum=1)
    pipeline_model_parallel_size: int = opt(1, "groups of processes, each of which has some of the blocks", minimum=1)
    sequence_parallel_size: int = opt(1, "processes that share each sequence", minimum=1)
    expert_model_parallel_size: int = opt(1, "processes that share the experts of each layer", minimum=1)
    sequence_parallel_kind: str | None = opt(
        None,
        "how a sequence is shared: ulysses splits the heads, ring passes keys round; by default ulysses where the heads divide",
        choices=("ulysses", "ring"),
    )
    pipeline_schedule: str = opt("1f1b", "order of the micro-batches of a pipeline", choices=SCHEDULES)
    virtual_pipeline_model_parallel_size: int = opt(
        1, "runs of blocks that each pipeline stage has, with --pipeline_schedule interleaved", minimum=1
    )
    async_save: bool = opt(False, "fsdp2: write the optimizer's parts of a checkpoint while training goes on")
    ddp_backend: str | None = opt(None, "how processes speak: gloo, nccl, hccl, mpi; by default what fits the device", saved=False)
    ddp_timeout: int = opt(1800, "seconds after which a process that waits for others gives up", minimum=1, saved=False)

    def check(self) -> None:
        super().check()
        chosen: list[tuple[str, str]] = [(f"--strategy {self.strategy}", self.strategy)] if self.said("strategy") and self.strategy else []
        if self.fsdp is not None:
            chosen.append((f"--fsdp {self.fsdp}", "fsdp2"))
        if self.deepspeed is not None:
            chosen.append((f"--deepspeed {self.deepspeed}", "deepspeed"))
        for (first, one), (second, other) in itertools.pairwise(chosen):
            if one != other:
                raise ConfigError(f"{first} and {second} contradict each other", hint="keep one")
        if chosen and not self.said("strategy"):
            self.derive("strategy", chosen[0][1], chosen[0][0])
        self._read_fsdp()
        if self.strategy != "fsdp2":
            self.refuse_without_effect(("fsdp_cpu_offload", "fsdp_reshard_after_forward", "async_save"), "without --fsdp fsdp2")
        if self.sequence_parallel_size == 1:
            self.refuse_without_effect(("sequence_parallel_kind",), "without --sequence_parallel_size")
        if self.strategy == "megatron":
            self._read_megatron_schedule()
        if self.pipeline_model_parallel_size == 1:
            self.refuse_without_effect(("pipeline_schedule",), "without --pipeline_model_parallel_size")
        if self.pipeline_schedule == "interleaved" and self.virtual_pipeline_model_parallel_size == 1:
            raise ConfigError(
                "--pipeline_schedule interleaved needs several runs of blocks in each process",
                hint="--virtual_pipeline_model_parallel_size 2, or --pipeline_schedule 1f1b",
            )
        if self.pipeline_schedule != "interleaved":
            self.refuse_without_effect(("virtual_pipeline_model_parallel_size",), "without --pipeline_schedule interleaved")
        self.check_megatron(self.strategy)

    def _read_megatron_schedule(self) -> None:
        """Megatron-Core's schedule follows from the number of runs of blocks."""
        if self.pipeline_schedule == "gpipe":
            raise ConfigError("--pipeline_schedule gpipe: Megatron-Core has 1f1b and interleaved", hint="remove it")
        virtual = self.virtual_pipeline_model_parallel_size
        if virtual > 1 and self.pipeline_model_parallel_size > 1 and not self.said("pipeline_schedule"):
            self.derive("pipeline_schedule", "interleaved", f"--virtual_pipeline_model_parallel_size {virtual}")

    def _read_fsdp(self) -> None:
        """``--fsdp`` in the words of Hugging Face: full_shard, shard_grad_op, offload, auto_wrap; "fsdp2" is ms-swift's."""
        if self.fsdp is None:
            return
        words = self.fsdp.replace(",", " ").split()
        known = {"fsdp2", "full_shard", "shard_grad_op", "offload", "auto_wrap"}
        if unknown := [word for word in words if word not in known]:
            raise ConfigError(f"--fsdp does not know {unknown[0]!r}", hint=f"known: {', '.join(sorted(known))}")
        if "shard_grad_op" in words and not self.said("fsdp_reshard_after_forward"):
            self.derive("fsdp_reshard_after_forward", False, "--fsdp shard_grad_op")
        if "offload" in words and not self.said("fsdp_cpu_offload"):
            self.derive("fsdp_cpu_offload", True, "--fsdp offload")
