"""How the processes are arranged: pipeline stages, copies of the data's reader, parts of a sequence, parts of a layer."""

from dataclasses import dataclass
from typing import Any

from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swift.errors import ConfigError

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Sizes:
    """Processes along each axis. Neighbours in rank share a layer, since they speak most."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis in AXES if (size := getattr(self, axis)) > 1) or "one process"


def sizes_of(world_size: int, *, pp: int = 1, cp: int = 1, tp: int = 1) -> Sizes:
    """The arrangement of ``world_size`` processes; what the other axes leave reads different rows. ConfigError if it does not divide."""
    taken = pp * cp * tp
    if world_size % taken:
        named = (
            ("pipeline_model_parallel_size", pp),
            ("sequence_parallel_size", cp),
            ("tensor_model_parallel_size", tp),
        )
        told = " x ".join(f"--{name} {size}" for name, size in named if size > 1)
        raise ConfigError(f"{told} needs a multiple of {taken} processes, and there are {world_size}", hint="change one of them")
    return Sizes(pp=pp, dp=world_size // taken, cp=cp, tp=tp)


class Mesh:
    """The device mesh of a run, and this process's place in it. Made in every process at once."""

    def __init__(self, sizes: Sizes, device_type: str) -> None:
        self.sizes = sizes
        self.mesh: DeviceMesh = init_device_mesh(device_type, tuple(getattr(sizes, axis) for axis in AXES), mesh_dim_names=AXES)
        # Processes that see different tokens: their gradients and counts are summed.
        self.data: DeviceMesh = self.mesh["dp", "cp"]._flatten("data") if sizes.cp > 1 else self.mesh["dp"]

    def size(self, axis: str) -> int:
        return int(getattr(self.sizes, axis))

    def rank(self, axis: str) -> int:
        """This process's place on ``axis``."""
        return self.mesh[axis].get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one on ``axis`` alone."""
        return self.mesh[axis].get_group()

    def __getitem__(self, axes: Any) -> DeviceMesh:
        return self.mesh[axes]
