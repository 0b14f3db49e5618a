"""Attention of a flattened batch by torch's CPU kernel, one segment after the other, with as little kept as may be.

Left to autograd, each segment would keep a copy of its keys and values for each query head, and its output a second time;
its mask would be made into numbers in each layer. Here the whole row's query, key, value and output are kept once.
"""

from typing import Any

import torch
from torch import Tensor

from swift.model.layout import Layout

# H query heads, G key heads, T tokens of the flat row, Q queries of a segment, K keys that they see, d width of a head


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's CPU kernel takes these."""
    return (
        query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and hasattr(torch.ops.aten, _FORWARD) and query.dtype in _DTYPES
    )


def segment_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, sliding_window: int | None) -> Tensor:
    """(1, T, H, d) from query (1, H, T, d) and key and value (1, G, root + T, d), in autocast's precision if there is one."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    output: Tensor = _SegmentAttention.apply(query, key, value, layout, scaling, sliding_window)
    return output


_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, sliding_window: int | None) -> Tensor:
        _, heads, tokens, width = query.shape
        groups = key.shape[1]
        output = query.new_empty(tokens, groups, heads // groups, width)
        sums = []
        for place, q, k, v, mask in _segments(query, key, value, layout, sliding_window):
            part, sum_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling
            )
            output[place] = part.permute(2, 0, 1, 3)
            sums.append(sum_)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.layout, ctx.scaling, ctx.sliding_window = layout, scaling, sliding_window
        return output.view(1, tokens, heads, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors
        grad = grad.view(output.shape)
        dquery = torch.empty_like(output)
        dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
        segments = _segments(query, key, value, ctx.layout, ctx.sliding_window)
        for (place, q, k, v, mask), spans, sum_ in zip(segments, ctx.layout.spans, sums, strict=True):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[place].permute(1, 2, 0, 3),
                q,
                k,
                v,
                output[place].permute(1, 2, 0, 3),
                sum_,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=ctx.scaling,
            )
            dquery[place] = dq.permute(2, 0, 1, 3)
            for total, part in ((dkey[0], dk.sum(dim=1)), (dvalue[0], dv.sum(dim=1))):
                at = 0
                for begin, end in spans:
                    total[:, begin:end] += part[:, at : at + end - begin]
                    at += end - begin
        return dquery.flatten(1, 2).transpose(0, 1)[None], dkey, dvalue, None, None, None


def _segments(query: Tensor, key: Tensor, value: Tensor, layout: Layout, sliding_window: int | None) -> Any:
    """Of each segment: its place in the row, query, key and value (G, H / G, Q or K, d), and its mask if it is not the plain one.

    The key heads are a batch for the kernel, in which all their query heads read the same keys: nothing is copied.
    """
    groups = key.shape[1]
    for begin, length, spans in zip(layout.starts, layout.lengths, layout.spans, strict=True):
        place = slice(begin, begin + length)
        k, v = (seen_by(part, spans)[0].unsqueeze(1).expand(-1, query.shape[1] // groups, -1, -1) for part in (key, value))
        size = length, k.shape[2], sliding_window
        mask = None if is_causal(*size) else _added(layout, *size, query.dtype)
        yield place, query[0, :, place].unflatten(0, (groups, -1)), k, v, mask


def seen_by(tensor: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """The keys (1, G, K, d) at ``spans`` of all (1, G, root + T, d)."""
    parts = [tensor[:, :, begin:end] for begin, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def is_causal(num_queries: int, num_keys: int, sliding_window: int | None) -> bool:
    """Whether no mask is needed besides the kernels' own."""
    return num_queries == num_keys and (sliding_window is None or num_keys <= sliding_window)


def causal(layout: Layout, num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """(Q, K) bool: the last query sees the last key."""
    name = num_queries, num_keys, sliding_window, device
    if name not in layout.masks:
        layout.masks[name] = _seen(num_queries, num_keys, sliding_window, device)
    return layout.masks[name]


def _added(layout: Layout, num_queries: int, num_keys: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
    """The same as numbers that are added to scores."""
    name = num_queries, num_keys, sliding_window, dtype
    if name not in layout.masks:
        hidden = ~_seen(num_queries, num_keys, sliding_window, torch.device("cpu"))
        layout.masks[name] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return layout.masks[name]


def _seen(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return mask if sliding_window is None else mask.triu(num_keys - num_queries - sliding_window + 1)
