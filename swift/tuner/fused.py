"""LoRA layers with less work: layers that read the same input in one product, and the update inside the weight where that is exact.

PEFT keeps the weights, their names and their files; only the forward passes of its plain linear layers are replaced.

In float32 without dropout, W + s B A is formed once per optimizer step, so that a forward pass is one product, as if there
were no adapter; the gradients of A and B come from products with r columns. In 16 bits the sum would swallow small updates,
and dropout acts on the adapter alone: there the update is added to the output, with the A of all layers of a group in
one product.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# T tokens, D input width, N output width (of all layers of a group), R ranks (of all layers of a group)


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

    Layers with DoRA, a bias of their own, quantized weights or several adapters keep PEFT's forward pass.
    """
    order = _in_order_of_use(model, probe_ids)
    fused = Fused()
    for layers in order:
        group = _Group(layers)
        fused.groups.append(group)
        for index, layer in enumerate(layers):
            layer.forward = _Forward(group, index, layer.forward)
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
        self.bases = [layer.base_layer for layer in layers]
        self.a = [layer.lora_A[name].weight for layer in layers]
        self.b = [layer.lora_B[name].weight for layer in layers]
        self.scales = [float(layer.scaling[name]) for layer in layers]
        self.dropout = layers[0].lora_dropout[name]
        self.widths = [base.out_features for base in self.bases]
        self.is_formed = False
        self.merged: Tensor | None = None
        self.versions: list[int] = []
        self.waiting: tuple[Tensor, list[Tensor | None]] | None = None

    def output(self, index: int, x: Tensor) -> Tensor:
        """What layer ``index`` makes of ``x``."""
        if self.waiting is not None and self.waiting[0] is x and (ready := self.waiting[1][index]) is not None:
            self.waiting[1][index] = None
            if not any(rest is not None for rest in self.waiting[1]):
                self.waiting = None
            return ready
        outputs = self._compute(x)
        if len(outputs) > 1:
            self.waiting = (x, [None if place == index else output for place, output in enumerate(outputs)])
        return outputs[index]

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        rate = float(getattr(self.dropout, "p", 0.0)) if self.layers[0].training else 0.0
        is_exact = rate == 0 and self.bases[0].weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        merged = self._form() if is_exact else None
        outputs: tuple[Tensor, ...] = _GroupedLora.apply(x, self, merged, rate, *self.a, *self.b)
        return outputs

    def _form(self) -> Tensor:
        """(N, D): W + s B A of all layers, formed again when A or B changed."""
        versions = [weight._version for weight in (*self.a, *self.b)]
        if self.merged is None:
            weight = self.bases[0].weight
            self.merged = torch.empty(sum(self.widths), weight.shape[1], dtype=weight.dtype, device=weight.device)
        if not self.is_formed or versions != self.versions:
            with torch.no_grad():
                parts = self.merged.split(self.widths)
                for part, base, a, b, scale in zip(parts, self.bases, self.a, self.b, self.scales, strict=True):
                    torch.addmm(base.weight, b.to(part.dtype), a.to(part.dtype), alpha=scale, out=part)
            self.is_formed, self.versions = True, versions
        return self.merged


class _Forward:
    """Takes the place of a layer's forward method; what only PEFT's own knows goes there."""

    def __init__(self, group: _Group, index: int, original: Any) -> None:
        self.group, self.index, self.original = group, index, original

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.group.layers[self.index]
        if args or kwargs or layer.disable_adapters or layer.merged:
            plain: Tensor = self.original(x, *args, **kwargs)
            return plain
        return self.group.output(self.index, x)


class _GroupedLora(torch.autograd.Function):
    """y_g = x W_g^T + bias_g + s_g dropout(x) A_g^T B_g^T for each layer g of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group, merged: Tensor | None, rate: float, *adapter: Tensor) -> tuple[Tensor, ...]:
        a, b = adapter[: len(group.layers)], adapter[len(group.layers) :]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else group.bases[0].weight.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        mask = None
        if merged is not None:
            outputs = list((flat @ merged.T).split(group.widths, dim=1))
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
        ctx.save_for_backward(flat, mask, merged, *adapter)
        ctx.group, ctx.rate, ctx.shape, ctx.dtype = group, rate, x.shape, x.dtype
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, mask, merged, *adapter = ctx.saved_tensors
        group, count = ctx.group, len(ctx.group.layers)
        a, b = adapter[:count], adapter[count:]
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
        dx = None
        if ctx.needs_input_grad[0]:
            if merged is not None:
                dx = (dy[0] if count == 1 else torch.cat(dy, dim=1)) @ merged
            else:
                dx = low_all.T @ a_all
                if mask is not None:
                    dx = dx.mul_(mask).div_(1 - ctx.rate)
                for grad, base in zip(dy, group.bases, strict=True):
                    dx.addmm_(grad, base.weight.to(grad.dtype))
            dx = dx.view(ctx.shape).to(ctx.dtype)
        gradients = [gradient.to(weight.dtype) for gradient, weight in zip([*da, *db], adapter, strict=True)]
        return (dx, None, None, None, *gradients)
