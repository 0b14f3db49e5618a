"""The processes as workers of Ray Train: Ray places them, joins them by torch.distributed, and starts all again after a failure."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from swift import console, deps, progress
from swift.config.launch import LaunchConfig
from swift.errors import SwiftError, first_line
from swift.launch import rank
from swift.launch.failure import RankFailed
from swift.launch.logs import new_folder_of_launch


def launch_ray(config: LaunchConfig, *, log_dir: Path) -> None:
    """Run the command in --num_workers workers. Raises RankFailed with what the worker that failed last has said."""
    ray = deps.require("ray", extra="ray")
    train, train_torch = deps.require("ray.train", extra="ray"), deps.require("ray.train.torch", extra="ray")
    # Ray would print what a worker prints to its own log as well, and that on the terminal too. It reads this before a worker does.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    folder = new_folder_of_launch(log_dir)
    use_gpu = _has_gpu() if config.use_gpu is None else config.use_gpu
    if not ray.is_initialized():
        ray.init(address=config.ray_address, log_to_driver=True, logging_level="ERROR")
    # Workers import torch and transformers first, which Ray gives a minute: too little for a busy disk.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    console.notice(f"{config.num_workers} workers of Ray; it keeps what they print in {folder}")
    trainer = train_torch.TorchTrainer(
        work,
        train_loop_config={"words": config.command, "run_file": str(folder / "run"), "folder": os.getcwd(), "path": sys.path},
        # gloo where there is no GPU, as torch itself would choose
        torch_config=train_torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=train.ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu),
        run_config=train.RunConfig(
            name="ray", storage_path=str(folder), failure_config=train.FailureConfig(max_failures=config.max_restarts)
        ),
    )
    try:
        trainer.fit()
    except Exception as problem:  # Ray wraps what a worker raised in errors of its own, which differ between its versions
        raise _explain(problem, folder) from problem


def work(settings: dict[str, Any]) -> None:
    """One worker: the command, in the world that Ray has joined."""
    from torch import distributed

    os.chdir(settings["folder"])
    os.environ[progress.RUN_VARIABLE] = settings["run_file"]
    words = [word for word in settings["words"] if word not in ("--json", "--debug")]
    console.use_json("--json" in settings["words"])
    console.quiet_libraries()
    # What rank 0 sees, all do: the file may be there for one and not yet for another.
    known = [rank.run_to_resume(Path(settings["run_file"])) if distributed.get_rank() == 0 else None]
    if distributed.get_world_size() > 1:
        distributed.broadcast_object_list(known, src=0)
    if known[0]:
        words = rank.resumed(words, known[0])
    import_module("swift.cli").run(words)  # by name: the command line stands above this room


def _explain(problem: BaseException, folder: Path) -> RankFailed:
    """The error of ours that a worker raised, or the last lines of what Ray says of it."""
    below: BaseException | None = problem
    while below is not None:
        for each in (below, *getattr(below, "worker_failures", {}).values(), getattr(below, "training_failed_error", None)):
            cause = getattr(each, "cause", None) or each
            if isinstance(cause, SwiftError):
                return RankFailed(cause.message, hint=cause.hint, exit_code=cause.exit_code)
        below = below.__cause__
    lines = [line for line in str(problem).splitlines() if line.strip()][-20:]
    told = "\n".join(f"  | {line}" for line in lines)
    return RankFailed(f"a worker of Ray failed: {first_line(problem)}\n{told}", hint=f"Ray keeps its records in {folder}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
