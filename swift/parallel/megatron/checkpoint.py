"""The optimizer's state in parts, by torch's distributed checkpoint: read in another layout of processes too.

A parameter is named by what Megatron-Core calls it in the whole model, and is a DTensor over the processes that share a
layer. Of gate and up, which a process has one below the other, each is a tensor by itself.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from swift.errors import CheckpointError, first_line
from swift.parallel.megatron.bridge import Bridge
from swift.parallel.megatron.layout import GateUp
from swift.parallel.megatron.names import Entry
from swift.parallel.megatron.package import quiet
from swift.parallel.state import OTHER

FOLDER = "optimizer"
SETTINGS = "settings"
# Of a parameter group, what a schedule or a run sets; the parameters of groups differ from stage to stage.
OWN = ("params", "weight_decay", "kind")


def save(path: Path, bridge: Bridge, optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Write the state into a folder beside ``path``. Every process comes here."""
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    groups = {group["kind"]: {name: value for name, value in group.items() if name not in OWN} for group in optimizer.param_groups}
    tensors: dict[str, Any] = {SETTINGS: json.dumps(groups)}
    for parameter, name, entry in bridge.trained():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors |= {f"{name}/{key}{part}": whole for part, whole in _parts(value, parameter, entry, mesh)}
    with quiet():
        save_parts(tensors, storage_writer=FileSystemWriter(path.with_name(FOLDER)))


def load(path: Path, bridge: Bridge, optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Put what ``save`` wrote into ``optimizer``. CheckpointError if it does not fit."""
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    folder = path.with_name(FOLDER)
    if path.is_file() or (path.parent / "latest").is_file():
        raise _of_another_strategy(folder)
    try:
        reader = FileSystemReader(folder)
        known: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        if SETTINGS not in known:
            raise _of_another_strategy(folder)
        keys = _keys(known)
        wanted: dict[str, Any] = {SETTINGS: None}
        for parameter, name, entry in bridge.trained():
            if name not in keys:
                raise CheckpointError(f"{folder}: it has no state of {name}", hint="it is of another model")
            for key in keys[name]:
                is_like = _is_like(known, name, key, entry)
                room = torch.empty_like(parameter, requires_grad=False) if is_like else torch.empty(())
                optimizer.state[parameter][key] = room
                for part, whole in _parts(room, parameter, entry, mesh):
                    saved = known[f"{name}/{key}{part}"].size
                    if saved != whole.shape:
                        raise CheckpointError(f"{folder}: {name} has {tuple(saved)} numbers there, and {tuple(whole.shape)} here")
                    wanted[f"{name}/{key}{part}"] = whole
        with quiet():
            load_parts(wanted, storage_reader=reader)
    except (OSError, KeyError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{folder}: the optimizer state cannot be read: {first_line(problem)}") from None
    settings = json.loads(wanted[SETTINGS])
    for group in optimizer.param_groups:
        group |= settings.get(group["kind"]) or next(iter(settings.values()))  # a stage may have no norms, and so no such group


def _of_another_strategy(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: its state is not of Megatron-Core, but of another strategy", hint=OTHER.format("ddp or fsdp2"))


def _keys(known: dict[str, Any]) -> dict[str, list[str]]:
    """What is kept of each parameter."""
    found: dict[str, list[str]] = {}
    for entry in known:
        name, slash, key = entry.rpartition("/")
        key = key.partition(".")[0]
        if slash and key not in found.setdefault(name, []):
            found[name].append(key)
    return found


def _is_like(known: dict[str, Any], name: str, key: str, entry: Entry) -> bool:
    """Whether what was saved has the shape of the parameter; a number of steps has none."""
    about = known.get(f"{name}/{key}") or known[f"{name}/{key}.gate"]
    return bool(about.size)


def _parts(value: Any, parameter: Tensor, entry: Entry, mesh: DeviceMesh) -> Iterator[tuple[str, Any]]:
    """(end of the name, whole tensor of which ``value`` is this process's part); they share memory with ``value``."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        yield "", value
    elif isinstance(entry.operation, GateUp):
        for part, half in zip((".gate", ".up"), value.chunk(2), strict=True):
            yield part, _whole(half, 0, mesh)
    elif (axis := entry.operation.axis) is not None:
        yield "", _whole(value, axis, mesh)
    else:
        yield "", value


def _whole(value: Tensor, axis: int, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(value, mesh, [Shard(axis)], run_check=False)


def bytes_of(values: Sequence[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)
