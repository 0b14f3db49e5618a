"""swift launch: start a command in several processes here, or write what starts it elsewhere."""

import contextlib
import io
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift import console
from swift.config import commands, flags
from swift.config.launch import MEGATRON, LaunchConfig
from swift.config.saved import saved_options
from swift.errors import ConfigError, MachineError, first_line


def run_launch(config: LaunchConfig) -> Any:
    """Start ``config.command``, or hand it to Slurm, Ray or Kubernetes. Wrong options of the command are found before."""
    if "--json" in config.command:
        console.use_json(True)
    training = read_command(config)
    if config.way == "slurm":
        from swift.launch.slurm import launch_slurm

        return launch_slurm(config, log_dir=log_dir(config, training))
    if config.way == "k8s":
        from swift.launch.kubernetes import launch_kubernetes

        return launch_kubernetes(config)
    if config.way == "ray":
        from swift.launch.ray_train import launch_ray

        return launch_ray(config, log_dir=log_dir(config, training))
    return launch_here(config, log_dir=log_dir(config, training))


def read_command(config: LaunchConfig) -> Any:
    """The config of what is launched; the error that every rank would raise. Its notices come from rank 0 later."""
    command = [word for word in config.command if word not in ("--json", "--debug")]
    with contextlib.redirect_stderr(io.StringIO()):
        if command[0] == MEGATRON:
            from swift.parallel.megatron.arguments import words_for_swift

            command = words_for_swift(command[1:], world_size=config.world_size or _processes_here() * config.nnodes)
    name, *words = command
    cls = getattr(commands, f"{name.capitalize()}Config", None)
    if cls is None:
        raise ConfigError(f"swift {name} is not available", hint="swift --help lists the commands")
    with contextlib.redirect_stderr(io.StringIO()):
        return flags.parse(cls, name, "", words, checkpoint=saved_options)


def log_dir(config: LaunchConfig, training: Any) -> Path:
    return Path(config.log_dir or Path(training.output_dir or "output") / "launch")


def launch_here(config: LaunchConfig, *, log_dir: Path, program: Sequence[str] = ("-m", "swift.cli")) -> None:
    """Run the ranks of this machine to their end. Raises RankFailed, which carries the exit code of the rank that failed.

    ``program`` is what Python runs with the words of the command; it has to begin with swift.launch.rank.enter.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from swift.launch.agent import Agent
    from swift.launch.failure import RankFailed
    from swift.launch.logs import Logs, new_folder_of_launch, take_up_job

    count = config.nproc_per_node or _processes_here()
    quiet_torch()
    # Two threads for each core slow all of them down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    # torch 2.13 gives the ranks of every attempt the same store (dynamic_rendezvous.py), where they find the addresses that
    # those of the attempt before left, and wait for the dead. So rank 0 of each attempt keeps a store of its own.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Machines may share a disk.
    folder = new_folder_of_launch(log_dir if config.nnodes == 1 else log_dir / socket.gethostname())
    take_up_job(folder, log_dir)
    where = "" if config.nnodes == 1 else f" on {socket.gethostname()}, one of {config.nnodes} machines"
    console.notice(f"{count} {'process' if count == 1 else 'processes'}{where}; what each prints is in {folder}")
    try:
        handler = registry.get_rendezvous_handler(RendezvousParameters(**meeting_place(config)))
        spec = WorkerSpec(
            role="swift",
            local_world_size=count,
            entrypoint=sys.executable,
            # torch puts the local rank in the place of ${local_rank}, and one dollar in that of two
            args=tuple(word.replace("$", "$$") for word in (*program, *config.command)),
            rdzv_handler=handler,
            max_restarts=config.max_restarts,
            monitor_interval=0.1,
            local_addr="127.0.0.1" if config.nnodes == 1 else None,
        )
        agent = Agent(spec, Logs(folder), hang_timeout=config.hang_timeout)
        try:
            agent.start()
        finally:
            handler.shutdown()
    except (RendezvousError, TimeoutError, DistError) as problem:
        where = config.rdzv_endpoint or f"{config.master_addr}:{config.master_port}"
        if "EADDRINUSE" in str(problem):
            raise MachineError(f"the port of {where} is in use on this machine", hint="say another --master_port on all machines") from None
        # Not wrong input (exit code 2), after which Kubernetes would not try again: the first machine may have been replaced.
        raise RankFailed(
            f"the machines did not meet at {where}: {first_line(problem)}", hint="is swift launch started on each, and the port reachable?"
        ) from None


def meeting_place(config: LaunchConfig) -> dict[str, Any]:
    """What torch's rendezvous takes.

    One machine meets itself on a free port. Several of known rank meet at the first (static); those that are told an
    endpoint, or may have to meet again after a restart, number themselves (c10d).
    """
    fields: dict[str, Any] = {"min_nodes": config.nnodes, "max_nodes": config.nnodes, "timeout": 900}
    if config.nnodes == 1:
        # is_host: torch would ask the name service whether this is the machine of that name
        return {
            **fields,
            "backend": "c10d",
            "endpoint": "127.0.0.1:0",
            "run_id": str(uuid.uuid4()),
            "local_addr": "127.0.0.1",
            "is_host": True,
        }
    fields |= {"run_id": config.rdzv_id, "endpoint": config.rdzv_endpoint or f"{config.master_addr}:{config.master_port}"}
    if config.rdzv_endpoint is not None:
        return {**fields, "backend": "c10d"}
    if config.max_restarts:
        return {**fields, "backend": "c10d", "is_host": config.node_rank == 0}
    return {**fields, "backend": "static", "rank": config.node_rank}


def quiet_torch() -> None:
    """Keep off the terminal what the agent logs: we say what happened ourselves."""
    import logging

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


def _cores() -> int:
    """Cores that this process may use: of a batch system often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes_here() -> int:
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count == 0:
        raise ConfigError("this machine has no accelerator, so the number of processes is open", hint="say --nproc_per_node")
    return count
