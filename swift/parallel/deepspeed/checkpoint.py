"""Checkpoints as DeepSpeed has them: checkpoint-N/global_stepM, the file "latest", zero_to_fp32.py.

They are read on as many processes as wrote them, and on another number through DeepSpeed's universal checkpoint. So are
stage 1 and 2 of ZeRO, which have the same files.
"""

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from swift.errors import CheckpointError, first_line
from swift.files import write_json
from swift.parallel.deepspeed import package
from swift.parallel.world import World

LATEST = "latest"
ABOUT = "deepspeed.json"


def exists(folder: Path) -> bool:
    return (folder / LATEST).is_file()


def save(folder: Path, engine: Any, model: Any, world: World) -> None:
    """Write the state of ``engine`` into ``folder``; every process comes here. Frozen weights are not written."""
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    with _seen_as(engine, model):
        engine.save_checkpoint(str(folder), tag=f"global_step{engine.global_steps}", exclude_frozen_parameters=has_frozen)
    if world.is_main:
        about = {
            "zero_stage": int(engine.zero_optimization_stage()),
            "processes": world.size,
            "param_groups": groups(engine.basic_optimizer),
        }
        write_json(folder / ABOUT, about)
    world.barrier()


def load(folder: Path, engine: Any, model: Any, world: World) -> None:
    """Put what ``save`` wrote, on whatever number of processes, into ``engine``. CheckpointError if it does not fit.

    Stages 1 and 2 read each other's; stage 0 writes no parts, and stage 3 those of weights as well.
    """
    tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    about = _read_about(folder)
    stage = int(engine.zero_optimization_stage())
    if about["zero_stage"] != stage and {about["zero_stage"], stage} != {1, 2}:
        raise CheckpointError(
            f"{folder}: it was written by ZeRO stage {about['zero_stage']}, and this is stage {stage}: their parts differ",
            hint=f"say --deepspeed zero{about['zero_stage']}; --resume_only_model true takes its weights alone, and starts at step 0",
        )
    with contextlib.ExitStack() as stack:
        if stage and (about["processes"], about["zero_stage"]) != (world.size, stage):
            tag = stack.enter_context(_universal(folder, tag, engine, world))
        stack.enter_context(_seen_as(engine, model))
        try:
            found, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as problem:
            raise CheckpointError(f"{folder}: DeepSpeed cannot read its state: {first_line(problem)}") from None
    if found is None:
        raise CheckpointError(f"{folder}: DeepSpeed finds no state in {tag}")
    # DeepSpeed 0.19.8 gives all groups of a universal checkpoint the settings of the first, and ZeRO-3 one tensor that counts
    # their steps, which then runs ahead.
    for own in engine.basic_optimizer.state.values():
        own |= {key: value.clone() for key, value in own.items() if key == "step" and isinstance(value, torch.Tensor)}
    for group, saved in zip(engine.basic_optimizer.param_groups, about["param_groups"], strict=True):
        group |= {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}


def groups(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each group of parameters: rates, decay, and the optimizer's own."""
    return [{key: value for key, value in group.items() if _is_plain(value)} for group in optimizer.param_groups]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float) for item in value) and len(value) > 0
    return value is None or isinstance(value, bool | int | float | str)


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return {key: found[key] for key in ("zero_stage", "processes", "param_groups")}
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{folder / ABOUT} cannot be read: {first_line(problem)}") from None


@contextlib.contextmanager
def _seen_as(engine: Any, model: Any) -> Iterator[None]:
    """Within, the engine's module is ``model``: what is written has the model's own names."""
    entry = engine.module
    engine.module = model
    try:
        yield
    finally:
        engine.module = entry


@contextlib.contextmanager
def _universal(folder: Path, tag: str, engine: Any, world: World) -> Iterator[str]:
    """The tag of a copy that any number of processes can read; it is removed again."""
    name = f".{tag}.universal.tmp"
    with world.main_first():
        if world.is_main:
            shutil.rmtree(folder / name, ignore_errors=True)
            _convert(folder / tag, folder / name)
    engine._config.load_universal_checkpoint = True
    try:
        yield name
    finally:
        engine._config.load_universal_checkpoint = False
        world.barrier()
        if world.is_main:
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "latest_universal").unlink(missing_ok=True)


def _convert(source: Path, target: Path) -> None:
    """In this process: a forked one would inherit the locks of its threads."""
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            package.part("deepspeed.checkpoint.ds_to_universal").main(arguments)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, NotImplementedError) as problem:
        # DeepSpeed's converter has no error of its own: it asserts what it does not support, and reads files as they are.
        raise CheckpointError(f"{source} cannot be read on another number of processes: {first_line(problem)}") from problem
