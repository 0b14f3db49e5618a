"""What becomes of each layer: the model's own plan read, its sizes checked, before anything is changed."""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard

from swift.errors import ConfigError

# Styles of transformers, by what we call them. Those that gather compute attention whole in each process, since the model
# mixes or slices what a layer gives.
LINEAR = {
    "colwise": ("columns", False),
    "colwise_gather_output": ("columns", True),
    "colwise_rep": ("columns", True),
    "rowwise": ("rows", False),
    "rowwise_split_input": ("rows", True),
    "rowwise_rep": ("rows", True),
}
PARAMETER = {"colwise": -2, "rowwise": -1, "packed_colwise": -2, "packed_rowwise": -1}
KEPT = ("replicate", "local_params")
OPTION = "--tensor_model_parallel_size"


@dataclass
class Linear:
    """A linear layer, or LoRA around one, of which each process computes some outputs ("columns") or adds up some inputs ("rows")."""

    name: str
    module: Any
    kind: str
    is_whole_outside: bool  # its outputs are gathered, or its inputs are split
    is_head: bool = False


@dataclass
class Plan:
    """What each module is. ``placements`` of parameters by their id; those that are not in it are replicated."""

    linears: list[Linear] = field(default_factory=list)
    embeddings: list[nn.Embedding] = field(default_factory=list)
    experts: list[Any] = field(default_factory=list)
    partial: list[Any] = field(default_factory=list)
    """Modules that are replicated, and see this process's heads alone: their gradients are parts of a sum."""
    rotary: list[tuple[Any, int]] = field(default_factory=list)
    """Layers of latent attention whose last outputs, so many, are a key of all heads."""
    placements: dict[int, Shard] = field(default_factory=dict)
    packed: dict[int, int] = field(default_factory=dict)
    """Parameters, by their id, in which gate and up lie one after the other along a dimension: each of the two is split."""


def read_plan(model: Any, size: int) -> Plan:
    """The plan of ``model``, bare, for ``size`` processes; ConfigError where it cannot be followed."""
    styles = _styles(model)
    for name, module in model.named_modules():
        if is_adapter_layer(module):
            check_lora(name, module)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    plan, problems = Plan(), _Problems(size)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        style = styles.get(_pattern(name))
        if style is None or style in KEPT:
            continue
        if style in LINEAR:
            for each in _inner_modules(module):
                _add_linear(plan, problems, model, Linear(name, each, *LINEAR[style], is_head=module is head))
        elif style == "embedding_rowwise":
            _add_embedding(plan, name, module, size)
        elif style == "moe_tp_experts":
            plan.experts.append(module)
        elif style == "replicated_with_grad_allreduce":
            plan.partial.append(module)
        elif style == "mla_kv_a_proj":
            plan.rotary.append((module, int(model.config.get_text_config().qk_rope_head_dim)))
        else:
            raise ConfigError(f"{OPTION} {size}: the plan of this model has {name} as {style}, which is not built", hint=_without)
    for name, parameter in parameters.items():
        if (style := styles.get(_pattern(name))) in PARAMETER:
            _add_parameter(plan, problems, name, parameter, str(style))
    problems.tell()
    if not plan.linears and not plan.experts:
        raise ConfigError(f"{OPTION} {size}: the plan of {type(model).__name__} names none of its layers", hint=_without)
    _follow_ties(plan, head, embedding, size)
    return plan


_without = "leave it away: --fsdp fsdp2 spreads the weights of any model"


def _styles(model: Any) -> dict[str, str]:
    """The style of each pattern of names. The model's own plan; ConfigError if it has none."""
    styles = dict(getattr(model, "tp_plan", None) or {})
    if not styles:
        raise ConfigError(f"{OPTION}: {type(model).__name__} of transformers has no plan for it", hint=_without)
    return styles


def _pattern(name: str) -> str:
    """``name`` with * in place of the numbers of layers, as plans have it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _inner_modules(module: Any) -> list[Any]:
    """The layer itself, or those that PEFT keeps of one that is trained whole (modules_to_save)."""
    if type(module).__name__ == "ModulesToSaveWrapper":
        return [module.original_module, *module.modules_to_save.values()]
    return [module]


def _add_linear(plan: Plan, problems: "_Problems", model: Any, linear: Linear) -> None:
    layer = linear.module
    base = layer
    if is_adapter_layer(layer):
        base = layer.base_layer
    if type(base) is not nn.Linear:
        raise ConfigError(
            f"{OPTION}: {linear.name} is a {type(base).__name__}, and plain linear layers alone can be split", hint=_hint_of(base)
        )
    dim = 0 if linear.kind == "columns" else 1
    count = base.weight.shape[dim]
    if not linear.is_head:
        width = None if linear.is_whole_outside else _head_width(model, linear.name)
        if width and count % width == 0:
            problems.add(linear.name, count // width, "heads")
        else:
            problems.add(linear.name, count, "outputs" if dim == 0 else "inputs")
    plan.linears.append(linear)
    plan.placements[id(base.weight)] = Shard(dim)
    if base.bias is not None and dim == 0:
        plan.placements[id(base.bias)] = Shard(0)
    if base is not layer:
        for factor in (layer.lora_B if dim == 0 else layer.lora_A).values():
            plan.placements[id(factor.weight)] = Shard(dim)
            if factor.bias is not None and dim == 0:
                plan.placements[id(factor.bias)] = Shard(0)


def is_adapter_layer(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def check_lora(name: str, layer: Any) -> None:
    """ConfigError unless ``layer`` is plain LoRA of a linear layer."""
    from peft.tuners.lora import Linear as LoraLinear

    if type(layer) is not LoraLinear:
        kind = f"{type(layer).__module__.rpartition('.')[0].rpartition('.')[2]}.{type(layer).__name__}"
        raise ConfigError(
            f"{OPTION} splits LoRA of linear layers alone, and {name} has {kind}",
            hint="use --tuner_type lora, with --target_modules that are linear layers",
        )
    if layer.lora_variant or any(layer.use_dora.values()):
        raise ConfigError(f"{OPTION} cannot split the LoRA of {name}: DoRA and other variants need its whole weight", hint="use plain LoRA")
    if layer.fan_in_fan_out or layer.merged:
        raise ConfigError(f"{OPTION} cannot split the LoRA of {name}: its weight is transposed or merged")


def _hint_of(base: Any) -> str:
    return "remove --quant_method" if "bit" in type(base).__name__.lower() or hasattr(base, "quant_state") else _without


def _head_width(model: Any, name: str) -> int | None:
    """Width of a head in the attention that owns the layer ``name``; None if its owner has no heads."""
    owner = model.get_submodule(name.rpartition(".")[0])
    width = getattr(owner, "head_dim", None)
    return width if isinstance(width, int) and width > 0 else None


def _add_embedding(plan: Plan, name: str, module: Any, size: int) -> None:
    for each in _inner_modules(module):
        if not isinstance(each, nn.Embedding):
            raise ConfigError(f"{OPTION} {size}: {name} is a {type(each).__name__}, which cannot be split", hint="leave embeddings untuned")
        plan.embeddings.append(each)
        plan.placements[id(each.weight)] = Shard(0)


def _add_parameter(plan: Plan, problems: "_Problems", name: str, parameter: nn.Parameter, style: str) -> None:
    """Experts, and numbers that a module has for each head (attention sinks)."""
    dim = max(parameter.dim() + PARAMETER[style], 0)
    is_packed = style.startswith("packed") and parameter.dim() > 1
    if parameter.dim() == 1 and style in ("rowwise", "packed_rowwise"):  # a bias: added after the sum
        return
    problems.add(name, parameter.shape[dim] // (2 if is_packed else 1), "rows" if dim == parameter.dim() - 2 else "columns")
    plan.placements[id(parameter)] = Shard(dim)
    if is_packed:
        plan.placements[id(parameter)] = Shard(dim + 1)
        plan.packed[id(parameter)] = dim


def _follow_ties(plan: Plan, head: Any, embedding: Any, size: int) -> None:
    """A weight that is embedding and head is split for both."""
    if isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and head.weight is embedding.weight:
        linear, looked_up = any(each.module is head for each in plan.linears), embedding in plan.embeddings
        if looked_up and not linear:
            plan.linears.append(Linear("the head", head, "columns", is_whole_outside=True, is_head=True))
        if linear and not looked_up:
            plan.embeddings.append(embedding)
    parts: list[Any] = [*plan.embeddings, *(each.module for each in plan.linears if each.is_head)]
    for part in parts:
        count = int(getattr(part, "base_layer", part).weight.shape[0])
        if -(-count // size) * (size - 1) >= count:
            raise ConfigError(f"{OPTION} {size} leaves a process without a row of a vocabulary of {count}", hint="use fewer processes")


class _Problems:
    """What does not divide, told in one line with the sizes that would."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts: list[tuple[str, int, str]] = []

    def add(self, name: str, count: int, what: str) -> None:
        self.counts.append((name, count, what))

    def tell(self) -> None:
        bad = next((each for each in self.counts if each[1] % self.size), None)
        if bad is None:
            return
        name, count, what = bad
        fitting = [size for size in range(1, count + 1) if all(other % size == 0 for _, other, _ in self.counts)]
        raise ConfigError(
            f"{OPTION} {self.size} does not divide the {count} {what} of {name}",
            hint=f"this model can be split over {', '.join(str(size) for size in fitting)}",
        )
