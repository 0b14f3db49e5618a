"""LoRA layers with less work: layers that read the same input in one product, and the update inside the weight where that is exact.

PEFT keeps the weights, their names and their files; only the forward passes of its plain linear layers are replaced.

In float32 without dropout, W + s B A is formed once per optimizer step, so that a forward pass is one product, as if there
were no adapter; the gradients of A and B come from products with r columns. In 16 bits the sum would swallow small updates,
and dropout acts on the adapter alone: there the update is added to the output, with the A of all layers of a group in
one product.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swift.model.norms import recipe

# T tokens, R ranks of all layers of a group

Activation = Callable[[Tensor], Tensor]


@dataclass
class Fused:
    """The replaced layers of a model, by groups that read the same input."""

    groups: list["_Group"] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    def changed(self) -> None:
        """The adapter has new weights: what was formed from the old ones is formed again when it is needed.

        To be said after each optimizer step: fused AdamW and bitsandbytes' optimizers do not count the version of what they
        write. Weights that are loaded count it, and are seen without.
        """
        for group in self.groups:
            group.is_formed = False


def fuse(model: Any, probe_ids: Tensor) -> Fused:
    """Replace the forward passes of ``model``'s plain LoRA layers; which ones share their input is seen on ``probe_ids`` (1, T).

    Layers with DoRA, a bias of their own, quantized weights, weights that processes share, or several adapters keep PEFT's
    forward pass.
    """
    order = _in_order_of_use(model, probe_ids)
    fused = Fused()
    for layers in order:
        group = _Group(layers)
        fused.groups.append(group)
        for index, layer in enumerate(layers):
            layer.forward = _Forward(group, index, layer.forward)
    _fuse_gated(model, fused.groups)
    return fused


def _in_order_of_use(model: Any, probe_ids: Tensor) -> list[list[Any]]:
    """The plain LoRA layers, those together that were given the same tensor one after the other."""
    seen: list[tuple[Any, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0]))) for layer in model.modules() if _is_plain(layer)
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=probe_ids, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    times = {id(layer): sum(other is layer for other, _ in seen) for layer, _ in seen}
    groups: list[list[Any]] = []
    previous: Tensor | None = None
    for layer, given in seen:
        if times[id(layer)] > 1:  # shared between places, so that no order of use is fixed
            previous = None
            continue
        if given is previous:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        previous = given
    return groups


def _is_plain(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or len(layer.active_adapters) != 1:
        return False
    if hasattr(layer.base_layer.weight, "to_local"):  # a DTensor
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or getattr(layer, "lora_variant", {}).get(name) is not None:
        return False
    has_bias = layer.lora_B[name].bias is not None
    return not (layer.use_dora.get(name, False) or has_bias or layer.fan_in_fan_out or layer.base_layer.weight.requires_grad)


class _Group:
    """Layers that read the same input. The first one that is called computes for all."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        name = layers[0].active_adapters[0]
        self.active = name, [name]  # PEFT has one or the other
        self.bases = [layer.base_layer for layer in layers]
        self.a = [layer.lora_A[name].weight for layer in layers]
        self.b = [layer.lora_B[name].weight for layer in layers]
        self.scales = [float(layer.scaling[name]) for layer in layers]
        self.dropout = layers[0].lora_dropout[name]
        self.is_formed = False
        self.merged: list[Tensor] = []
        self.versions: list[int] = []
        self.waiting: tuple[Tensor, list[Tensor | None]] | None = None

    @property
    def uses_adapter(self) -> bool:
        """Whether these layers compute what is replaced here; a merged, switched-off or other adapter is PEFT's matter."""
        return not any(layer.disable_adapters or layer.merged or layer.active_adapter not in self.active for layer in self.layers)

    def output(self, index: int, x: Tensor) -> Tensor:
        """What layer ``index`` makes of ``x``."""
        if self.waiting is not None and self.waiting[0] is x and (ready := self.waiting[1][index]) is not None:
            self.waiting[1][index] = None
            if not any(rest is not None for rest in self.waiting[1]):
                self.waiting = None
            return ready
        outputs = self.compute(x)
        if len(outputs) > 1:
            self.waiting = (x, [None if place == index else output for place, output in enumerate(outputs)])
        return outputs[index]

    def compute(self, x: Tensor, gate: Tensor | None = None, activation: Activation | None = None) -> tuple[Tensor, ...]:
        """The output of each layer for ``x``, or for activation(gate) * x."""
        rate = float(getattr(self.dropout, "p", 0.0)) if self.layers[0].training else 0.0
        is_exact = rate == 0 and self.bases[0].weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        merged = self.form() if is_exact else []
        of = recipe(x) if is_exact and activation is None else None
        outputs: tuple[Tensor, ...] = _GroupedLora.apply(x, gate, activation, of, self, merged, rate, *self.a, *self.b)
        return outputs

    def form(self) -> list[Tensor]:
        """W + s B A of each layer, formed again when A or B changed."""
        versions = [weight._version for weight in (*self.a, *self.b)]
        if not self.merged:
            self.merged = [torch.empty_like(base.weight) for base in self.bases]
        if not self.is_formed or versions != self.versions:
            with torch.no_grad():
                for weight, base, a, b, scale in zip(self.merged, self.bases, self.a, self.b, self.scales, strict=True):
                    torch.addmm(base.weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scale, out=weight)
            self.is_formed, self.versions = True, versions
        return self.merged


class _Forward:
    """Takes the place of a layer's forward method; what only PEFT's own knows goes there."""

    def __init__(self, group: _Group, index: int, original: Any) -> None:
        self.group, self.index, self.original = group, index, original

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.group.uses_adapter:
            plain: Tensor = self.original(x, *args, **kwargs)
            return plain
        return self.group.output(self.index, x)


class _GatedForward:
    """Takes the place of the forward method of an MLP that is down(activation(gate(x)) * up(x))."""

    def __init__(self, pair: _Group, down: _Group, activation: Activation, *, gate: int, original: Any) -> None:
        self.pair, self.down, self.activation, self.gate, self.original = pair, down, activation, gate, original

    def __call__(self, x: Tensor) -> Tensor:
        if not (self.pair.uses_adapter and self.down.uses_adapter):
            plain: Tensor = self.original(x)
            return plain
        outputs = self.pair.compute(x)
        return self.down.compute(outputs[1 - self.gate], outputs[self.gate], self.activation)[0]


def _fuse_gated(model: Any, groups: list[_Group]) -> None:
    """Replace the MLPs that are gated products, so that what lies between their layers is computed again, not kept.

    Which module that is, and which of two layers is the gate, is tried on random numbers.
    """
    of_layer = {id(layer): group for group in groups for layer in group.layers}
    for module in model.modules():
        own = {id(of_layer[id(child)]): of_layer[id(child)] for child in module.children() if id(child) in of_layer}
        activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if sorted(len(group.layers) for group in own.values()) != [1, 2] or not callable(activation):
            continue
        down, pair = sorted(own.values(), key=lambda group: len(group.layers))
        forward = module.forward
        weight = pair.bases[0].weight
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        for gate in (0, 1):
            replaced = _GatedForward(pair, down, activation, gate=gate, original=forward)
            with torch.no_grad():
                wanted, found = forward(x[None]), replaced(x[None])
            if found.shape == wanted.shape and torch.allclose(
                found.float(), wanted.float(), rtol=1e-2, atol=1e-3 * float(wanted.abs().max())
            ):
                module.forward = replaced
                break


class _GroupedLora(torch.autograd.Function):
    """y_g = h W_g^T + bias_g + s_g dropout(h) A_g^T B_g^T for each layer g of a group; h is x, or activation(gate) * x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        activation: Activation | None,
        of: tuple[Tensor, ...] | None,
        group: _Group,
        merged: list[Tensor],
        rate: float,
        *adapter: Tensor,
    ) -> tuple[Tensor, ...]:
        a, b = adapter[: len(group.layers)], adapter[len(group.layers) :]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else group.bases[0].weight.dtype
        inputs = x if activation is None or gate is None else _gated(activation, gate, x)
        flat = inputs.reshape(-1, x.shape[-1]).to(dtype)
        mask = None
        if merged:
            outputs = [flat @ weight.T for weight in merged]
        else:
            dropped = flat
            if rate > 0:
                mask = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - rate)
                dropped = flat * mask / (1 - rate)
            low = (dropped @ torch.cat(a).to(dtype).T).split([weight.shape[0] for weight in a], dim=1)
            outputs = [flat @ base.weight.to(dtype).T for base in group.bases]
            for output, part, weight, scale in zip(outputs, low, b, group.scales, strict=True):
                output.addmm_(part, weight.to(dtype).T, alpha=scale)
        for output, base in zip(outputs, group.bases, strict=True):
            if base.bias is not None:
                output += base.bias.to(dtype)
        ctx.save_for_backward(gate, mask, *adapter, *(of or [flat if activation is None else x]))
        ctx.group, ctx.merged, ctx.rate, ctx.activation = group, merged, rate, activation
        ctx.shape, ctx.dtype, ctx.compute_dtype = x.shape, x.dtype, dtype
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, count = ctx.group, len(ctx.group.layers)
        gate, mask, *rest = ctx.saved_tensors
        adapter, (kept, *factors) = rest[: 2 * count], rest[2 * count :]
        a, b = adapter[:count], adapter[count:]
        flat, activated = kept, None
        if factors:
            flat = (kept * factors[0]).mul_(factors[1]).reshape(-1, kept.shape[-1])
        if ctx.activation is not None:
            gate = gate.detach().requires_grad_()
            with torch.enable_grad():
                activated = ctx.activation(gate)
            flat = (activated.detach() * kept).reshape(-1, kept.shape[-1]).to(ctx.compute_dtype)
        dy = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        a_all = torch.cat(a).to(flat.dtype)
        dropped = flat if mask is None else flat * mask / (1 - ctx.rate)
        # Ranks first: a product with few rows is several times as fast on a CPU as one with few columns.
        low = [weight.T.to(grad.dtype).contiguous() @ grad.T for grad, weight in zip(dy, b, strict=True)]
        low_all = torch.cat([part.mul_(scale) for part, scale in zip(low, group.scales, strict=True)])  # (R, T)
        ranks = [weight.shape[0] for weight in a]
        down = (a_all @ dropped.T).split(ranks)
        da = (low_all @ dropped).split(ranks)
        db = [(part @ grad).mul_(scale).T for grad, part, scale in zip(dy, down, group.scales, strict=True)]
        gradients = [gradient.to(weight.dtype) for gradient, weight in zip([*da, *db], adapter, strict=True)]
        dx = dgate = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, low_all, a_all, mask, ctx).view(ctx.shape).to(ctx.dtype)
            if activated is not None:
                (dgate,) = torch.autograd.grad(activated, gate, dx * kept)
                dx = dx.mul_(activated.detach())
        return (dx, dgate, None, None, None, None, None, *gradients)


def _gated(activation: Activation, gate: Tensor, x: Tensor) -> Tensor:
    """activation(gate) * x, in the memory of the activation unless that is the gate's."""
    activated = activation(gate)
    return activated * x if activated.data_ptr() == gate.data_ptr() or activated.dtype != x.dtype else activated.mul_(x)


def _input_gradient(dy: list[Tensor], low_all: Tensor, a_all: Tensor, mask: Tensor | None, ctx: Any) -> Tensor:
    """The gradient by the layers' common input."""
    weights = ctx.merged or [base.weight.to(dy[0].dtype) for base in ctx.group.bases]
    dx: Tensor = dy[0] @ weights[0]
    for grad, weight in zip(dy[1:], weights[1:], strict=True):
        dx.addmm_(grad, weight)
    if not ctx.merged:
        update = low_all.T @ a_all
        dx += update if mask is None else update.mul_(mask).div_(1 - ctx.rate)
    return dx
