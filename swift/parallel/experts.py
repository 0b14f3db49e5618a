"""Expert parallelism: each process of a group has some of the experts of every layer, and tokens travel to theirs and back.

The group is a part of those that see different tokens. A process's experts get the tokens of the whole group, and so their
gradients are sums over it already: of experts' parameters (``expert_parameters``) only those are added up that processes
with the same experts have (``expert_meshes``), of all others those of every process that sees other tokens.

Where the layers are split already (``swift.parallel.tensor``), a process has a part of each of its experts. Those that share
a layer have the same tokens, and each sends them to the process of its own place; parts of outputs are summed at home.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from swift.errors import ConfigError
from swift.model.policy import evaluating, is_close, probe_ids
from swift.parallel.gradients import local

PREFIX = "swift_experts_"

# E experts, e = E / p of a process, p processes, n tokens of a process, K experts of a token, m rows that a process gets, D width


def expert_meshes(data: DeviceMesh, size: int) -> tuple[DeviceMesh, DeviceMesh]:
    """(processes with the same experts, processes that share the experts of a layer) of the 1-D mesh of all that see different
    tokens. Called in every process; neighbours share. ConfigError if ``size`` does not divide it."""
    if data.size() % size:
        raise ConfigError(
            f"--expert_model_parallel_size {size} does not divide the {data.size()} processes that see different tokens",
            hint="change it, or the number of processes",
        )
    both = data._unflatten(0, (data.size() // size, size), ("expert_data", "expert"))
    return both["expert_data"], both["expert"]


def use_expert_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Leave in ``model`` this process's experts of ``mesh`` (1-D): DTensors (E, ...) of which it holds (E / p, ...).

    Called in all processes of ``mesh`` at once, on whole weights, or on those that ``split_layers`` has left: what was cut
    over its axis is then cut over both, on a mesh of (``mesh``, its axis). Of a layer each process sends at most
    n K D elements forward and as many back, as many each way again in the backward pass, and E numbers to count them;
    what stays with its own experts, 1 / p of it if tokens spread evenly, costs nothing. ConfigError for layers of experts of
    another kind, experts that do not divide, and tuners of experts.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = list(_layers(inner))
    size = mesh.size()
    if not layers:
        raise ConfigError(
            f"--expert_model_parallel_size {size}: {type(inner).__name__} has no layers of experts in one tensor", hint="leave it away"
        )
    for name, layer in layers:
        if layer.num_experts % size:
            raise ConfigError(
                f"--expert_model_parallel_size {size} does not divide the {layer.num_experts} experts of {name}",
                hint=f"use a divisor of {layer.num_experts}",
            )
        _refuse_tuners(name, layer)
    with torch.no_grad(), evaluating(inner):
        ids = probe_ids(inner, 8).roll(mesh.get_local_rank(), dims=1)  # each process another text
        wanted = inner(input_ids=ids, use_cache=False).logits
    tensor = _tensor_mesh(layers[0][1])
    both = mesh if tensor is None else DeviceMesh._concatenate([mesh, tensor])
    for _, layer in layers:
        _cut(layer, mesh, both)
    _switch(inner)
    with torch.no_grad(), evaluating(inner):
        found = inner(input_ids=ids, use_cache=False).logits
    is_same = torch.tensor(float(is_close(found, wanted)), device=mesh.device_type)
    for axis in range(both.ndim):
        dist.all_reduce(is_same, op=dist.ReduceOp.MIN, group=both.get_group(axis))
    if not is_same:
        raise ConfigError(
            f"--expert_model_parallel_size {size} cannot be used with {type(inner).__name__}: "
            "its experts do not compute from one token at a time",
            hint="leave it away",
        )


def expert_layers(model: nn.Module) -> list[Any]:
    """The modules of whose experts ``use_expert_parallel`` has left this process some."""
    return [layer for _, layer in _layers(model) if hasattr(layer, "expert_mesh")]


def expert_parameters(model: nn.Module) -> set[str]:
    """Names, as in ``model.named_parameters()``, of what ``use_expert_parallel`` has cut."""
    cut = {id(getattr(layer, name)) for layer in expert_layers(model) for name in layer.expert_names}
    return {name for name, parameter in model.named_parameters() if id(parameter) in cut}


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules whose experts lie in one tensor each and are computed by a function that transformers lets one choose."""
    for name, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts") and _own(module):
            yield name, module


def _own(layer: Any) -> dict[str, Any]:
    """Parameters of a layer that have one part for each expert."""
    count = layer.num_experts
    return {name: each for name, each in layer.named_parameters(recurse=False) if each.dim() > 1 and each.shape[0] == count}


def _refuse_tuners(name: str, layer: nn.Module) -> None:
    """ConfigError if a tuner has put itself before ``layer``, or parameters into it."""
    if name.endswith(".base_layer") or len(_own(layer)) < len(list(layer.parameters())):
        raise ConfigError(
            f"--expert_model_parallel_size cannot be combined with a tuner of experts, which {name.removesuffix('.base_layer')} has",
            hint="leave the experts to themselves, or --expert_model_parallel_size away",
        )


def _tensor_mesh(layer: Any) -> DeviceMesh | None:
    """The axis of the processes that have parts of each expert of ``layer``; None if experts are whole."""
    return next((each.device_mesh for each in _own(layer).values() if isinstance(each, DTensor)), None)


def _cut(layer: Any, mesh: DeviceMesh, both: DeviceMesh) -> None:
    """Experts in parts over ``mesh``; what ``split_layers`` has left of each is a DTensor, and is one of two axes then, ``both``."""
    count = layer.num_experts // mesh.size()
    first = mesh.get_local_rank() * count
    own = _own(layer)
    for name, parameter in own.items():
        inside = parameter.placements if isinstance(parameter, DTensor) else ()
        part = local(parameter.detach())[first : first + count].clone()
        whole = DTensor.from_local(part, both, [Shard(0), *inside], run_check=False, shape=parameter.shape, stride=parameter.stride())
        setattr(layer, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    layer.expert_mesh, layer.expert_names = mesh, tuple(own)


def _switch(model: Any) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    base = model.config._experts_implementation
    if base.startswith(PREFIX):
        return
    name = PREFIX + base
    if name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, _spread(base))
    for module in model.modules():
        if hasattr(module, "expert_mesh"):
            module.config._experts_implementation_internal = name


class _Local:
    """A layer of experts as its function sees it: with this process's experts alone."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.num_experts = layer.num_experts // layer.expert_mesh.size()
        self.parts = {name: local(getattr(layer, name)) for name in layer.expert_names}  # split layers put plain tensors there

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__["parts"]
        return parts[name] if name in parts else getattr(self._layer, name)


def _spread(base: str) -> Any:
    """The function of a layer of experts that sends each token to where its experts are, and lets ``base`` compute there."""

    def experts(layer: Any, hidden_nD: Tensor, index_nK: Tensor, weight_nK: Tensor) -> Tensor:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        function: Any = type(layer).forward.__wrapped__ if base == "eager" else ALL_EXPERTS_FUNCTIONS[base]
        here = _Local(layer)
        group, size = layer.expert_mesh.get_group(), layer.expert_mesh.size()
        chosen = index_nK.flatten()
        order = chosen.argsort(stable=True)
        count_E = torch.bincount(chosen, minlength=layer.num_experts)
        count_pe = torch.empty_like(count_E)  # of each process: how many of its tokens go to each expert here
        dist.all_to_all_single(count_pe, count_E, group=group)
        sent, received = (count.view(size, -1).sum(dim=1).tolist() for count in (count_E, count_pe))
        rows = _Exchange.apply(hidden_nD[order // index_nK.shape[1]], sent, received, group)
        own = torch.arange(here.num_experts, device=chosen.device).repeat(size).repeat_interleave(count_pe)
        out = function(here, rows, own[:, None], weight_nK.new_ones(len(rows), 1)) if len(rows) else rows
        # Experts that no token has chosen get a gradient of zeros, and the way back is taken, in every process.
        out = out + sum(part[:0].sum() for part in here.parts.values())
        back = _Exchange.apply(out, received, sent, group)
        weighted = back * weight_nK.flatten()[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        summed: Tensor = weighted[inverse].view(*index_nK.shape, -1).sum(dim=1)
        return summed.to(hidden_nD.dtype)

    return experts


class _Exchange(torch.autograd.Function):
    """Rows (m, D) to other processes: the first ``sent[0]`` to the first one, and so on; what arrives, by sender."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
