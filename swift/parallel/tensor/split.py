"""A model that is whole in each process becomes one that they share, and is tried against what it was."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard

from swift.errors import ConfigError
from swift.model.collectives import Group, chunk_size
from swift.model.mapped import is_mapped
from swift.model.policy import evaluating, is_close, probe_ids
from swift.model.vocabulary import VocabularyPart, all_agree
from swift.parallel.tensor.layers import Columns, Embedding, Entrance, Experts, Local, Plain, RotaryKey, Rows, SplitInput
from swift.parallel.tensor.plan import OPTION, Linear, Plan, read_plan
from swift.parallel.tensor.whole import packed_parameters, unpacked

# Gradients of replicated weights are compared if they have no more numbers than this: norms, routers, LoRA's factors.
MOST_NUMBERS = 2**20


def split_layers(model: Any, mesh: DeviceMesh) -> None:
    """Share the layers of ``model``, a transformers model, bare or in PEFT, over the one axis of ``mesh``.

    Every process has the whole model before. After, each parameter is a DTensor on ``mesh``: split, or replicated, so that
    all live on one mesh, for optimizers, for norms of gradients, and for ``fully_shard`` over another axis of the same mesh.
    The gradients of replicated ones are the same in all processes; none is to be added up over ``mesh`` again.

    ConfigError, before anything is changed, if the model has no plan, sizes do not divide, or a layer cannot be split;
    and in all processes if logits or gradients are not what they were.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    group = mesh.get_group()
    plan = read_plan(inner, mesh.size())
    trial = _Trial(inner, plan)
    wanted = trial.run()
    _distribute(model, plan, mesh)
    _replace(inner, plan, group)
    trial.compare(wanted, group)


def _distribute(model: Any, plan: Plan, mesh: DeviceMesh) -> None:
    """Each parameter as a DTensor, in memory of its own, or that of a file; the whole one is let go."""
    made: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # while they are looked up by id
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                tensor = unpacked(parameter.detach(), plan.packed.get(id(parameter)))
                shared = _as_dtensor(tensor, mesh, plan.placements.get(id(parameter), Replicate()))
                made[id(parameter)] = nn.Parameter(shared, requires_grad=parameter.requires_grad)
                kept.append(parameter)
            if id(parameter) in plan.packed:
                module.packed_parameters = {**packed_parameters(module), name: plan.packed[id(parameter)]}
            module._parameters[name] = made[id(parameter)]


def _as_dtensor(tensor: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    own = tensor
    if isinstance(placement, Shard):
        length = chunk_size(tensor.shape[placement.dim], mesh.size())
        first = min(mesh.get_local_rank() * length, tensor.shape[placement.dim])
        own = tensor.narrow(placement.dim, first, min(length, tensor.shape[placement.dim] - first))
        if not (is_mapped(tensor) and own.is_contiguous()):  # rows of a file need no memory: they may be cut once more
            own = own.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride())


def _replace(model: Any, plan: Plan, group: Group) -> None:
    """The forward passes of all modules that have parameters."""
    entrance = Entrance(group)
    done: set[int] = set()

    def put(module: Any, forward: Local) -> None:
        module.forward = forward
        done.add(id(module))

    for linear in plan.linears:
        _replace_linear(linear, entrance, put)
    for embedding in plan.embeddings:
        put(embedding, Embedding(embedding, group))
    for experts in plan.experts:
        put(experts, Experts(experts, group))
    for module in plan.partial:
        put(module, Local(module, group, is_partial=True))
    for module, width in plan.rotary:
        put(module, RotaryKey(module, group, width))
    for module in model.modules():
        if id(module) not in done and any(parameter is not None for parameter in module._parameters.values()):
            put(module, Local(module, group))


def _replace_linear(linear: Linear, entrance: Entrance, put: Any) -> None:
    layer, group = linear.module, entrance.group
    is_lora = not isinstance(layer, nn.Linear)
    if linear.kind == "columns":
        vocabulary = None
        if linear.is_head:
            vocabulary = layer.vocabulary_part = VocabularyPart(layer.out_features, group)
        if is_lora:
            put(layer.base_layer, Plain(layer.base_layer, group))
            for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                put(down, Plain(down, group, is_partial=True))
                put(up, Plain(up, group))
        put(layer, Columns(layer, entrance, gathers=linear.is_whole_outside, vocabulary=vocabulary))
        return
    base = layer.base_layer if is_lora else layer
    put(base, Rows(base, entrance))
    if is_lora:
        for down in layer.lora_A.values():
            put(down, Rows(down, entrance))
    if linear.is_whole_outside:
        put(layer, SplitInput(layer, group))


class _Trial:
    """Logits of a few tokens, and gradients of what is replicated: a sum over processes that is missing shows in one of the two."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self.model = model
        self.ids = probe_ids(model, 8)
        self.names = [
            name
            for name, parameter in model.named_parameters()
            if id(parameter) not in plan.placements and parameter.is_floating_point() and parameter.numel() <= MOST_NUMBERS
        ]

    def run(self) -> tuple[Tensor, list[Tensor | None]]:
        """(logits (T, V), gradients of a random product with them)."""
        named = dict(self.model.named_parameters())
        parameters = [named[name] for name in self.names]
        were_trained = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with evaluating(self.model), torch.enable_grad():
                logits = self.model(input_ids=self.ids, use_cache=False).logits[0]  # in their precision, of which is_close judges
                direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
                found = torch.autograd.grad((logits.float() * direction).sum(), parameters, allow_unused=True)
        finally:
            for parameter, was_trained in zip(parameters, were_trained, strict=True):
                parameter.requires_grad_(was_trained)
        return logits.detach(), [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found]

    def compare(self, wanted: tuple[Tensor, list[Tensor | None]], group: Group) -> None:
        """ConfigError in all processes if one of them finds something else than ``wanted``."""
        try:
            fault = self._fault(wanted, self.run())
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as problem:
            fault = f"its forward pass does not take it: {str(problem).strip().splitlines()[0]}"
        if not all_agree(fault is None, group, self.ids.device):
            raise ConfigError(
                f"{OPTION}: the plan of {type(self.model).__name__} does not fit this model: {fault or 'another process says so'}",
                hint="leave it away: --fsdp fsdp2 spreads the weights of any model",
            )

    def _fault(self, wanted: tuple[Tensor, list[Tensor | None]], found: tuple[Tensor, list[Tensor | None]]) -> str | None:
        if found[0].shape != wanted[0].shape or not is_close(found[0], wanted[0]):
            return "split, it gives other logits"
        is_exact = next(self.model.parameters()).dtype == torch.float32
        sizes = [float(gradient.norm()) for gradient in wanted[1] if gradient is not None]
        least = 1e-4 * max(sizes, default=0.0)
        for name, one, other in zip(self.names, wanted[1], found[1], strict=True):
            if (one is None) != (other is None):
                return f"split, {name} gets no gradient, or gets one that it had not"
            if one is None or other is None:
                continue
            if float((other - one).norm()) > (1e-2 if is_exact else 0.25) * max(float(one.norm()), least):
                return f"split, {name} gets another gradient"
        return None
