"""LoRA on Megatron-Core's layers: a PeftModel is read, and each of its adapters stands beside the layer that has its weight.

PEFT chooses the layers, draws the start of A and B, and knows how they are saved; here are the names of both, and which part
of A and B a process has. The rest is what full training has too: shards, gradients, the optimizer's state in parts.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from swift.errors import ConfigError
from swift.parallel.megatron.branch import Branch, Part, Place
from swift.parallel.megatron.bridge import Bridge
from swift.parallel.megatron.layout import OPERATIONS, Dims, Rows
from swift.parallel.megatron.names import Entry, first_layer, global_name

ROOT = "base_model.model."  # before the names of transformers in a PeftModel
LINEAR = re.compile(r"(decoder\.layers\.\d+\.(?:self_attention|mlp)\.linear_\w+)\.weight")
TRIAL = 0.1  # size of an update while models are compared, as a share of that of the inputs
HINT = "choose linear layers of attention and of dense feed-forward blocks by --target_modules, or train it by --strategy fsdp2"


@dataclass(frozen=True)
class Adapter:
    """What PEFT has beside one linear layer."""

    module: str  # by transformers' name
    keys: tuple[str, str]  # of A and B in the PeftModel's state_dict
    rank: int
    scaling: float
    dropout: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Source:
    """A model as it comes from the tuner: ``model`` is transformers' own, also where PEFT has put adapters into it."""

    model: Any
    tensors: dict[str, Tensor]  # by transformers' names, those of adapters by PEFT's
    names: Sequence[str]  # transformers'
    dtypes: set[torch.dtype]  # of transformers' parameters
    adapters: Sequence[Adapter]


def read(model: Any) -> Source:
    """What ``model`` has, a PeftModel or a transformers model. ConfigError for an adapter that has no place beside Megatron's layers."""
    state: dict[str, Tensor] = model.state_dict()
    if not hasattr(model, "peft_config"):
        return Source(model, state, list(state), {parameter.dtype for parameter in model.parameters()}, [])
    adapters = list(_adapters(model))
    keys = {key for adapter in adapters for key in adapter.keys}
    frozen = {name.removeprefix(ROOT).replace(".base_layer.", "."): tensor for name, tensor in state.items() if name not in keys}
    tensors = frozen | {key: state[key] for key in keys}
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if name not in keys}
    return Source(model.get_base_model(), tensors, list(frozen), dtypes, adapters)


def _adapters(model: Any) -> Iterator[Adapter]:
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        module = path.removeprefix(ROOT).removesuffix(".base_layer")
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
            inner: Any = getattr(layer, "base_layer", layer)
            kind = type(inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner).__name__
            raise ConfigError(f"--strategy megatron has no adapter for {module}, a {kind}", hint=HINT)
        [name] = layer.lora_A
        if layer.lora_variant.get(name) is not None or layer.lora_B[name].bias is not None:
            raise ConfigError(f"--strategy megatron has plain LoRA alone, and {module} has more", hint="train it by --strategy fsdp2")
        weight: Any = layer.lora_A[name].weight
        rate = float(getattr(layer.lora_dropout[name], "p", 0.0))
        keys = (f"{path}.lora_A.{name}.weight", f"{path}.lora_B.{name}.weight")
        yield Adapter(module, keys, weight.shape[0], float(layer.scaling[name]), rate, weight.dtype)


def plan_adapters(adapters: Sequence[Adapter], entries: Sequence[Entry]) -> list[Entry]:
    """What Megatron's A and B are made of. ConfigError for an adapter of another weight than that of a dense linear layer."""
    homes = {name: entry for entry in entries for name in entry.hf}
    found = []
    for adapter in adapters:
        entry = homes.get(f"{adapter.module}.weight")
        match = LINEAR.fullmatch(entry.mcore[0]) if entry is not None else None
        if entry is None or match is None:
            raise ConfigError(f"--strategy megatron has no adapter for {adapter.module}", hint=HINT)
        whole, rows = OPERATIONS["whole"], entry.operation if len(entry.hf) == 1 else Rows()
        operations = (entry.operation, whole) if _is_row(entry) else (whole, rows)
        for factor, key, operation in zip("AB", adapter.keys, operations, strict=True):
            found.append(Entry((f"{match[1]}.adapter.lora_{factor}.{_leaf(adapter.module)}",), (key,), operation))
    return found


def put(chunks: Sequence[Any], source: Source, entries: Sequence[Entry], dims: Dims, groups: Any, *, shares_tokens: bool) -> None:
    """Freeze ``chunks`` and put branches beside their layers. ConfigError, in every process, if a stage has none."""
    known = {adapter.module: adapter for adapter in source.adapters}
    homes = {match[1]: entry for entry in entries for name in entry.mcore if (match := LINEAR.fullmatch(name))}
    group = groups.get_tensor_model_parallel_group()
    size, count = group.size(), 0
    here = replace(dims, heads=dims.heads // size, groups=dims.groups // size)
    for chunk in chunks:
        chunk.requires_grad_(False)
        for name, layer in list(chunk.named_modules()):
            entry = homes.get(global_name(name, first_layer=first_layer(chunk), first_expert=0))
            if entry is None or not (own := [known.get(text.removesuffix(".weight")) for text in entry.hf]) or not any(own):
                continue
            is_row, outputs = _is_row(entry), [source.tensors[text].shape[0] for text in entry.hf]
            parts = [
                Part(_leaf(text.removesuffix(".weight")), rows if is_row else rows // size, **_numbers(adapter))
                for text, rows, adapter in zip(entry.hf, outputs, own, strict=True)
            ]
            place = Place(group, layer.weight.shape[1], is_row, shares_tokens)
            rate = next(adapter.dropout for adapter in own if adapter is not None)
            branch = Branch(parts, place, dropout=rate, order=entry.operation, dims=here).to(layer.weight.device)
            branch.attach(layer)
            count += 1
        if hasattr(chunk, "embedding"):  # what is computed again has gradients only if its input asks for one
            chunk.embedding.register_forward_hook(_ask_for_gradient)
    if not _is_everywhere(count, next(chunks[0].parameters()).device):
        raise ConfigError("a stage of the pipeline has no adapter: its layers are none of --target_modules", hint="take fewer stages")


@contextlib.contextmanager
def trial_values(source: Source, bridge: Bridge) -> Iterator[None]:
    """Within, each B is random, the same in all processes, in the PeftModel and beside Megatron's layers: zeros would show nothing."""
    keys = [adapter.keys[1] for adapter in source.adapters]
    own = {key: source.tensors[key].clone() for key in keys}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in source.adapters:
            a, b = (source.tensors[key] for key in adapter.keys)
            b.normal_(std=TRIAL / max(adapter.scaling * float(a.float().norm()), 1e-6), generator=generator)
        bridge.load(source.tensors.__getitem__, only=set(keys))
        yield
        for key in keys:
            source.tensors[key].copy_(own[key])
        bridge.load(source.tensors.__getitem__, only=set(keys))


def branches(model: nn.Module) -> list[Branch]:
    return [module for module in model.modules() if isinstance(module, Branch)]


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within, ``model`` computes what it did before there was an adapter."""
    found = branches(model)
    for branch in found:
        branch.is_on = False
    try:
        yield
    finally:
        for branch in found:
            branch.is_on = True


def _is_row(entry: Entry) -> bool:
    """Whether the inputs of the weight are spread over processes, not its outputs."""
    return entry.operation.axis == 1


def _leaf(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _numbers(adapter: Adapter | None) -> dict[str, Any]:
    return {} if adapter is None else {"rank": adapter.rank, "scaling": adapter.scaling, "dtype": adapter.dtype}


def _ask_for_gradient(module: Any, given: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if output.is_leaf else output


def _is_everywhere(count: int, device: torch.device) -> bool:
    fewest = torch.tensor(count, device=device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return bool(fewest > 0)
