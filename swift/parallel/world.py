"""The processes of a run: who this one is, and what they tell one another. One process alone needs no torch.distributed."""

import datetime
import itertools
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from swift.errors import ConfigError

# By which the accelerators are chosen that a process sees: of NVIDIA, AMD, Ascend and Intel.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them; ``local_rank`` counts those of one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def broadcast(self, value: Any) -> Any:
        """What the main process has as ``value``, in every process."""
        if self.is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, by rank, in every process."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def of_machine(self, value: Any) -> Any:
        """What the first process of this machine has as ``value``, in every process of the machine."""
        host = socket.gethostname()
        found = self.gather((host, self.local_rank, value))
        return value if self.local_rank == 0 else next(other for name, local, other in found if (name, local) == (host, 0))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is true in some process; the same answer in all of them."""
        return flag if self.is_alone else add([float(flag)], device)[0] > 0

    def barrier(self) -> None:
        """Return when every process has come here."""
        if not self.is_alone:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block first, the others when it has: they find what it has cached.

        If it fails, the others fail with it: none waits for ever.
        """
        if self.is_alone or self.is_main:
            try:
                yield
            except BaseException as problem:
                self.broadcast(f"{type(problem).__name__}: {problem}")
                raise
            self.broadcast(None)
            return
        if self.broadcast(None) is not None:
            raise SystemExit(1)  # rank 0 says what happened
        yield


def add(values: Sequence[float], device: torch.device, group: Any = None) -> list[float]:
    """The sums of ``values`` over the processes of ``group`` (all, if None), in float64 where the device has it."""
    dtype = torch.float32 if device.type in ("mps", "npu") else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor, group=group)
    return [float(value) for value in tensor.tolist()]


def read_world(environment: dict[str, str] | None = None) -> World:
    """The world that a launcher has set in the environment; ConfigError if it is half set or contradicts itself."""
    env = dict(os.environ if environment is None else environment)
    values: dict[str, int] = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", None), ("LOCAL_WORLD_SIZE", None)):
        text = env.get(name, "")
        try:
            values[name] = int(text) if text else (default if default is not None else -1)
        except ValueError:
            raise ConfigError(f"{name}={text!r} is not a number", hint="torchrun and swift launch set it") from None
    rank, size = values["RANK"], values["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} does not fit WORLD_SIZE={size}", hint="torchrun and swift launch set both")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if size > 1 and missing:
        raise ConfigError(f"WORLD_SIZE={size} is set, but {missing[0]} is not", hint="start it by torchrun or swift launch, which set both")
    local = values["LOCAL_RANK"] if values["LOCAL_RANK"] >= 0 else rank
    return World(rank, size, local, values["LOCAL_WORLD_SIZE"] if values["LOCAL_WORLD_SIZE"] > 0 else size)


def device_of(world: World, count: int, environment: Mapping[str, str] | None = None) -> int:
    """Which of ``count`` accelerators is this process's: that of its number, or the only one that its launcher lets it see.

    ConfigError if there are more processes than accelerators.
    """
    if world.local_rank < count:
        return world.local_rank
    env = os.environ if environment is None else environment
    if count == 1 and any(env.get(name) for name in VISIBLE):  # srun --gpus-per-task shows each task its own
        return 0
    raise ConfigError(
        f"{world.local_size} processes are started on a machine with {count} {'accelerator' if count == 1 else 'accelerators'}",
        hint=f"start {count} at most: NPROC_PER_NODE={count}, or --nproc_per_node {count}",
    )


# Where the processes meet, kept as long as this process lives, and how often they have met. A second store at the same port would
# find, or be, the first one, with the addresses of groups that are gone.
_stores: dict[tuple[Any, ...], Any] = {}
_meetings = itertools.count()


@contextmanager
def join(device: torch.device, *, backend: str | None = None, timeout_s: int = 1800) -> Iterator[World]:
    """The world of this process, joined; left when the block ends. Nothing is set up for a single process.

    ``backend`` is by default what torch has for ``device``: gloo for a CPU, NCCL for CUDA, HCCL for an NPU. Whatever it is,
    tensors in main memory travel by gloo.
    """
    if dist.is_initialized():  # a caller has joined already
        world = read_world()
        yield World(dist.get_rank(), dist.get_world_size(), world.local_rank, world.local_size)
        return
    world = read_world()
    if world.is_alone:
        yield world
        return
    if device.type != "cpu":
        if device.index is not None and world.local_size > 1:
            raise ConfigError(
                f"--device {device} is one device, and {world.local_size} processes of this machine need one each",
                hint=f"--device {device.type}: each takes that of its number",
            )
        count = torch.accelerator.device_count()
        torch.accelerator.set_device_index(device_of(world, count) if device.index is None else device.index)
    chosen, timeout = backend or dist.get_default_backend_for_device(device), datetime.timedelta(seconds=timeout_s)
    if device.type != "cpu" and chosen not in ("gloo", "mpi"):
        chosen = f"cpu:gloo,{device.type}:{chosen}"
    try:
        met = dist.PrefixStore(f"swift-{next(_meetings)}", _store(world, timeout))  # type: ignore[attr-defined]
        dist.init_process_group(chosen, store=met, rank=world.rank, world_size=world.size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as problem:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(f"rank {world.rank} cannot join the others at {where} by {chosen}: {str(problem).splitlines()[0]}") from None
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _store(world: World, timeout: datetime.timedelta) -> Any:
    key = (os.getpid(), os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), world.rank, world.size)
    if key not in _stores:
        _stores[key], _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
    _stores[key].set_timeout(timeout)
    return _stores[key]
