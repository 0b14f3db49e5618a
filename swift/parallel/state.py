"""The optimizer's state on disk: one file where a process holds all of it, a folder of parts (torch's distributed checkpoint) else.

Either is read on any number of processes: the parts are named by parameter, and cut anew.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from swift.errors import CheckpointError
from swift.files import save_torch
from swift.parallel.world import World

GROUPS = "param_groups"
SCALER = "scaler"


def folder_of(path: Path) -> Path:
    """Where the parts lie, if the state is not the one file ``path``: optimizer.pt -> optimizer."""
    return path.with_suffix("")


def exists(path: Path) -> bool:
    """Whether there is a state: one file, a folder of parts, or what DeepSpeed keeps beside it."""
    return path.is_file() or (folder_of(path) / ".metadata").is_file() or (path.parent / "latest").is_file()


def save(
    path: Path, model: Any, optimizer: Optimizer, world: World, *, is_sharded: bool, scale: Any = None, in_background: Any = None
) -> Any:
    """Write the state of ``optimizer``; every process comes here. ``path`` is on a disk that all of them see.

    With ``in_background``, a process group of its own, parts are copied now and written later: what is returned then tells
    when they are (a Future). In the group of the training the two would answer one another.
    """
    scaler = {} if scale is None else scale.state_dict()
    if not is_sharded:
        if world.is_main:
            save_torch(path, {"optimizer": optimizer.state_dict(), "scaler": scaler})
        return None
    from torch.distributed.checkpoint.state_dict_saver import async_save
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    names = names_of(model)
    tensors: dict[str, Any] = {
        f"{names[parameter]}/{key}": value for parameter, own in optimizer.state.items() for key, value in own.items()
    }
    tensors |= {GROUPS: json.dumps(_settings(optimizer)), SCALER: json.dumps(scaler)}
    writer = FileSystemWriter(folder_of(path))
    with _quiet():
        if in_background is not None:
            return async_save(tensors, storage_writer=writer, process_group=in_background)
        save_parts(tensors, storage_writer=writer, no_dist=world.is_alone)
    return None


def load(path: Path, model: Any, optimizer: Optimizer, world: World, device: torch.device, *, scale: Any = None) -> None:
    """Put what ``save`` wrote, on whatever number of processes, into ``optimizer``. CheckpointError if it does not fit."""
    try:
        scaler = _load_file(path, model, optimizer, device) if path.is_file() else _load_parts(folder_of(path), model, optimizer, world)
    except (OSError, KeyError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{path}: the optimizer state cannot be read: {str(problem).splitlines()[0]}") from None
    if scale is not None:
        scale.load_state_dict(scaler)


def names_of(model: Any) -> dict[Any, str]:
    """The name of each parameter; that of the wrappers of checkpointing and compilation left out."""
    return {
        parameter: name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "") for name, parameter in model.named_parameters()
    }


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _load_file(path: Path, model: Any, optimizer: Optimizer, device: torch.device) -> dict[str, Any]:
    """The state of the loss scale; that of the optimizer is put in."""
    saved = torch.load(path, map_location=device, weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        optimizer.load_state_dict(saved["optimizer"])
        return dict(saved["scaler"])
    for saved_group in saved["optimizer"]["param_groups"]:
        alike = {parameter for group in optimizer.param_groups if group["kind"] == saved_group["kind"] for parameter in group["params"]}
        ordered = [parameter for parameter in model.parameters() if parameter in alike]  # as in a group of one process
        for number, parameter in zip(saved_group["params"], ordered, strict=True):
            own = saved["optimizer"]["state"].get(number)
            if own is not None:
                optimizer.state[parameter] = {key: _like(value, parameter) for key, value in own.items()}
    _put_settings(optimizer, saved["optimizer"]["param_groups"])
    return dict(saved["scaler"])


def _put_settings(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Each group gets what was saved of those of its kind; how many there are of a kind depends on how parameters are spread."""
    kinds = {saved["kind"]: saved for saved in groups}
    for group in optimizer.param_groups:
        group |= {name: value for name, value in kinds[group["kind"]].items() if name != "params"}


def _like(value: Any, parameter: Tensor) -> Any:
    """``value`` of the state, cut as ``parameter`` is if it has its shape."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device)


def _load_parts(folder: Path, model: Any, optimizer: Optimizer, world: World) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    reader = FileSystemReader(folder)
    known: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    parameters = {name: parameter for parameter, name in names_of(model).items()}
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wanted: dict[str, Any] = {GROUPS: None, SCALER: None}
    for entry, about in known.items():
        name, _, _ = entry.rpartition("/")
        if entry in wanted:
            continue
        if name not in parameters or id(parameters[name]) not in trained:
            raise CheckpointError(f"{folder}: it is of a parameter that is not trained here: {name}")
        wanted[entry] = _room(about, parameters[name]) if hasattr(about, "size") else None
    with _quiet():
        load_parts(wanted, storage_reader=reader, no_dist=world.is_alone)
    for entry, value in wanted.items():
        name, _, key = entry.rpartition("/")
        if name:
            optimizer.state[parameters[name]][key] = value
    _put_settings(optimizer, json.loads(wanted[GROUPS]))
    return dict(json.loads(wanted[SCALER]))


def _room(about: Any, parameter: Tensor) -> Tensor:
    """An empty tensor for a saved one, cut as ``parameter`` is if it has its shape."""
    dtype = about.properties.dtype
    if about.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(about.size, dtype=dtype)


def _quiet() -> Any:
    """torch.distributed.checkpoint warns of uses that are meant here."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
