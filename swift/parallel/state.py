"""The optimizer's state on disk: one file where a process holds all of it, a folder of parts (torch's distributed checkpoint) else.

Either is read in any arrangement of processes: all is named by parameter, and cut anew.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, empty
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from swift.errors import CheckpointError
from swift.files import save_torch
from swift.parallel.gradients import is_sharded
from swift.parallel.tensor.whole import packing_dim
from swift.parallel.world import World

GROUPS = "param_groups"
SCALER = "scaler"
CLASS = "class"
OTHER = "say --strategy {}; --resume_only_model true takes the weights alone, and starts at step 0"

Names = Mapping[Any, str]  # of each parameter, see names_of


def folder_of(path: Path) -> Path:
    """Where the parts lie, if the state is not the one file ``path``: optimizer.pt -> optimizer."""
    return path.with_suffix("")


def exists(path: Path) -> bool:
    """Whether there is a state: one file, a folder of parts, or what DeepSpeed keeps beside it."""
    return path.is_file() or (folder_of(path) / ".metadata").is_file() or (path.parent / "latest").is_file()


def save(
    path: Path, names: Names, optimizer: Optimizer, world: World, *, is_sharded: bool, scale: Any = None, in_background: Any = None
) -> Any:
    """Write the state of ``optimizer``, by the ``names`` of parameters; every process comes here.

    ``path`` is on a disk that all of them see.

    With ``in_background``, a process group of its own, parts are copied now and written later: what is returned then tells
    when they are (a Future). In the group of the training the two would answer one another.
    """
    scaler = {} if scale is None else scale.state_dict()
    if not is_sharded:
        if world.is_main:
            kept = {"optimizer": optimizer.state_dict(), "scaler": scaler, "names": _order(names, optimizer)}
            save_torch(path, kept | {"class": _class_of(optimizer)})
        return None
    from torch.distributed.checkpoint.state_dict_saver import async_save
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    tensors: dict[str, Any] = {
        f"{names[parameter]}/{key}": value for parameter, own in optimizer.state.items() for key, value in own.items()
    }
    tensors |= {GROUPS: json.dumps(_settings(optimizer)), SCALER: json.dumps(scaler), CLASS: _class_of(optimizer)}
    writer = FileSystemWriter(folder_of(path))
    with _quiet():
        if in_background is not None:
            return async_save(tensors, storage_writer=writer, process_group=in_background)
        save_parts(tensors, storage_writer=writer, no_dist=world.is_alone)
    return None


def load(path: Path, names: Names, optimizer: Optimizer, world: World, *, scale: Any = None) -> None:
    """Put what ``save`` wrote, in whatever arrangement of processes, into ``optimizer``. CheckpointError if it does not fit."""
    try:
        scaler = _load_file(path, names, optimizer, world) if path.is_file() else _load_parts(folder_of(path), names, optimizer, world)
    except (OSError, KeyError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{path}: the optimizer state cannot be read: {str(problem).splitlines()[0]}") from None
    if scale is not None:
        scale.load_state_dict(scaler)


def names_of(model: Any, aliases: Mapping[str, str] | None = None) -> dict[Any, str]:
    """The name of each parameter in the whole model: that of the wrappers of checkpointing and compilation left out.

    ``aliases`` are other names by which a stage of a pipeline has what another stage has too.
    """
    return {
        parameter: (aliases or {}).get(name, name).replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        for name, parameter in model.named_parameters()
    }


def _order(names: Names, optimizer: Optimizer) -> list[str]:
    """The names of the parameters of ``optimizer``, as its state_dict counts them."""
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _load_file(path: Path, names: Names, optimizer: Optimizer, world: World) -> dict[str, Any]:
    """The state of the loss scale; that of the optimizer is put in."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    own = _order(names, optimizer)
    there = saved.get("names", own)
    _check_class(saved.get("class"), optimizer)
    if own == there and not any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.load_state_dict(saved["optimizer"])
        return dict(saved["scaler"])
    _refuse_strangers(path, there, own, world)
    numbers = [number for group in saved["optimizer"]["param_groups"] for number in group["params"]]
    states = {name: saved["optimizer"]["state"].get(number, {}) for name, number in zip(there, numbers, strict=True)}
    _put(path, names, optimizer, states, saved["optimizer"]["param_groups"])
    return dict(saved["scaler"])


def _class_of(optimizer: Any) -> str:
    return " and ".join(type(part).__name__ for part in getattr(optimizer, "parts", [optimizer]))


def _check_class(saved: str | None, optimizer: Optimizer) -> None:
    """ValueError if the state is of another kind of optimizer."""
    own = _class_of(optimizer)
    if saved not in (None, own):
        raise ValueError(f"it is of {saved}, and --optim makes {own} here")


def _refuse_strangers(path: Path, saved: Iterable[str], own: Sequence[str], world: World) -> None:
    """CheckpointError, in every process, if no process trains a parameter that is ``saved``."""
    trained = {name for names in world.gather(list(own)) for name in names}
    if stranger := next((name for name in saved if name not in trained), None):
        raise CheckpointError(f"{path}: it is of a parameter that is not trained here: {stranger}")


def _put(path: Path, names: Names, optimizer: Optimizer, states: dict[str, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """``states`` by name and the settings of the saved ``groups``, whose parameters may be grouped otherwise, into ``optimizer``."""
    own = [(number, parameter) for number, parameter in enumerate(each for group in optimizer.param_groups for each in group["params"])]
    state = {
        number: {key: _like(value, parameter) for key, value in states[names[parameter]].items()}
        for number, parameter in own
        if states.get(names[parameter])
    }
    described, first = [], 0
    for index, group in enumerate(optimizer.param_groups):
        numbers = list(range(first, first + len(group["params"])))
        described.append({**_settings_of(path, optimizer, index, groups), "params": numbers})
        first += len(numbers)
    optimizer.load_state_dict({"state": state, "param_groups": described})


def _settings_of(path: Path, optimizer: Optimizer, index: int, saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of the ``saved`` group that decays and learns as the ``index``-th of ``optimizer`` was made to, or that has its place."""

    def role(group: dict[str, Any]) -> Any:
        return group.get("kind", (group.get("weight_decay"), group.get("initial_lr", group["lr"])))

    own = optimizer.param_groups[index]
    if (found := next((group for group in saved if role(group) == role(own)), None)) is not None:
        return found
    if len(saved) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{path}: it has {len(saved)} groups of parameters, none of which decays and learns as one here does",
            hint="keep --learning_rate and --weight_decay when a run goes on in another arrangement of processes",
        )
    return saved[index]


def _like(value: Any, parameter: Tensor) -> Any:
    """``value`` of the state, cut as ``parameter`` is if it has its shape, or that with two parts in one dimension or two."""
    if isinstance(value, Tensor) and (dim := packing_dim(value.shape, parameter.shape)) is not None:
        if isinstance(value, DTensor):
            return _cut_behind(value, parameter, dim)
        value = value.reshape(parameter.shape)
    if isinstance(value, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value  # the optimizer itself takes numbers to the device where it wants them
    if isinstance(parameter, DTensor):
        cut = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return cut.to(parameter.device)  # of the mesh's devices, or main memory
    return value


def _cut_behind(value: DTensor, parameter: Any, dim: int) -> DTensor:
    """``value`` of ``_room``, which is whole from ``dim`` on, in the shape of ``parameter`` and cut as it is."""
    mesh, placements = parameter.device_mesh, parameter.placements
    own = value.to_local()
    own = own.reshape(*own.shape[:dim], *parameter.shape[dim:])
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    for at in range(dim, parameter.dim()):
        own = own.narrow(at, offset[at], shape[at])
    own = own.to(parameter.device).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _load_parts(folder: Path, names: Names, optimizer: Optimizer, world: World) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    reader = FileSystemReader(folder)
    known: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    if GROUPS not in known:
        raise CheckpointError(f"{folder}: its state is not of this strategy, but of Megatron-Core", hint=OTHER.format("megatron"))
    parameters = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    entries = {entry: entry.rpartition("/") for entry in known if entry not in (GROUPS, SCALER, CLASS)}
    _refuse_strangers(folder, (name for name, _, _ in entries.values()), list(parameters), world)
    wanted: dict[str, Any] = dict.fromkeys({GROUPS, SCALER, CLASS} & known.keys())
    for entry, (name, _, _) in entries.items():
        if name in parameters:  # else it is another stage's
            wanted[entry] = _room(known[entry], parameters[name]) if hasattr(known[entry], "size") else None
    with _quiet():
        load_parts(wanted, storage_reader=reader, no_dist=world.is_alone)
    _check_class(wanted.get(CLASS), optimizer)
    states: dict[str, dict[str, Any]] = {}
    for entry, (name, _, key) in entries.items():
        if entry in wanted:
            states.setdefault(name, {})[key] = wanted[entry]
    _put(folder, names, optimizer, states, json.loads(wanted[GROUPS]))
    return dict(json.loads(wanted[SCALER]))


def _room(about: Any, parameter: Tensor) -> Tensor:
    """An empty tensor for a saved one, cut as ``parameter`` is if it has its shape.

    If one of the two has its parts in a dimension of their own, it is cut before that alone.
    """
    dtype = about.properties.dtype
    if about.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    dim = packing_dim(about.size, parameter.shape)
    if dim is None or not isinstance(parameter, DTensor):
        return torch.empty(about.size, dtype=dtype)
    placements: Any = parameter.placements
    before = [each if is_sharded(each) and each.dim < dim else Replicate() for each in placements]
    return empty(about.size, dtype=dtype, device_mesh=parameter.device_mesh, placements=before)


def _quiet() -> Any:
    """torch.distributed.checkpoint warns of uses that are meant here."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
