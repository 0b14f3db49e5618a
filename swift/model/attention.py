"""Attention over a flattened batch: each document by itself, shared beginnings computed once, for any model of transformers.

A model is switched once (`use_packed_attention`). After that a forward pass with ``layout=`` computes per document; one
with ``attend=`` leaves attention to that function, as engines do that have a cache of their own; one without either
(evaluation of padded rows, generation) does what the model did before.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swift.errors import ModelError
from swift.model.layout import Layout
from swift.model.segments import causal, has_kernel, is_causal, seen_by, segment_attention

PREFIX = "swift_"
# A mask of four dimensions is handed on by transformers as it is, so that no (T, T) mask is made.
NO_MASK_SHAPE = (1, 1, 1, 1)

# H query heads, G key heads, T tokens of the flat row, Q queries of a segment, K keys that they see, d width of a head


class Root:
    """Keys and values, in each layer, of the tokens that all documents of a step begin with: computed once, used by each pass.

    The passes of the step see copies outside of the graph, whose gradients add up; ``backward`` hands the sums on to the
    pass that computed the root.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Tensor, Tensor]] = {}
        self._seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def keep(self, module: Any, key: Tensor, value: Tensor) -> None:
        if module not in self._kept:  # a block that is recomputed comes here again
            self._kept[module] = (key, value)
            self._seen[module] = tuple(part.detach().requires_grad_(part.requires_grad) for part in (key, value))  # type: ignore[assignment]

    def before(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The root's keys and values of this layer, with those of a row after them."""
        root_key, root_value = self._seen[module]
        return torch.cat([root_key, key], dim=2), torch.cat([root_value, value], dim=2)

    def backward(self) -> None:
        """The backward pass of the root, with the gradients of all passes that used it."""
        pairs = [(mine, seen.grad) for module in self._kept for mine, seen in zip(self._kept[module], self._seen[module], strict=True)]
        pairs = [(mine, gradient) for mine, gradient in pairs if gradient is not None]
        if pairs:
            torch.autograd.backward([mine for mine, _ in pairs], [gradient for _, gradient in pairs])


def use_packed_attention(model: Any) -> None:
    """Let ``model`` take ``layout=``. Raises ModelError if its attention cannot be replaced."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = model.config._attn_implementation
    if base.startswith(PREFIX):
        return
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_after(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    try:
        model.set_attn_implementation(name)
    except ValueError as problem:
        raise ModelError(f"the attention of {type(model).__name__} cannot be replaced: {problem}") from None
    if model.config._attn_implementation != name:
        raise ModelError(f"the attention of {type(model).__name__} cannot be replaced")


def packed_inputs(layout: Layout, device: torch.device, root: Root | None = None) -> dict[str, Any]:
    """What a forward pass over a flattened batch takes besides the tokens; ``root`` is filled by the pass of a root."""
    return {"layout": layout, "root": root, "attention_mask": torch.zeros(NO_MASK_SHAPE, dtype=torch.bool, device=device)}


def _attention_after(base: str) -> Any:
    """The attention function that is packed with a layout, ``attend`` if that is given, and ``base``'s without either."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        if (attend := options.pop("attend", None)) is not None:
            return attend(module, query, key, value, **options), None
        layout, root = options.pop("layout", None), options.pop("root", None)
        if layout is None:
            return _unpacked(base, module)(module, query, key, value, attention_mask, **options)
        if root is not None and layout.root:
            key, value = root.before(module, key, value)
        elif root is not None:
            root.keep(module, key, value)
        return packed_attention(query, key, value, layout, base=base, **options), None

    return attention


def _unpacked(base: str, module: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base == "eager":
        import sys

        # Each model file of transformers has its own, which is what it calls when no other is asked for.
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    base: str = "sdpa",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """(1, T, H, d) from query (1, H, T, d) and key and value (1, G, root + T, d).

    ``sliding_window`` w: a token sees itself and the w - 1 before it. ``softcap`` c: scores are c tanh(score / c).
    ``s_aux`` (H,): a score for attending to nothing. The kernels for sequences of unequal length serve half precision on
    a CUDA device; every segment by itself otherwise.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_plain = softcap is None and s_aux is None
    if is_plain and dropout == 0 and query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query, key, value, layout, scaling, sliding_window)
    if is_plain and dropout == 0 and base != "eager" and has_kernel(query, value):
        return segment_attention(query, key, value, layout, scaling, sliding_window)
    outputs = []
    for begin, length, spans in zip(layout.starts, layout.lengths, layout.spans, strict=True):
        q, k, v = query[:, :, begin : begin + length], seen_by(key, spans), seen_by(value, spans)
        if is_plain and base != "eager":
            mask = None if is_causal(length, k.shape[2], sliding_window) else causal(layout, length, k.shape[2], sliding_window, q.device)
            options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout, "scale": scaling}
            output = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
        else:
            mask = causal(layout, length, k.shape[2], sliding_window, q.device)
            output = eager_attention(q, k, v, mask, scaling, dropout, softcap, s_aux)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, sliding_window: int | None) -> Tensor:
    """All segments in one call of the kernel that torch has for sequences of unequal length."""
    from torch.nn.attention.varlen import varlen_attn

    index, ends_q, ends_k, most_q, most_k = layout.varlen
    index = index.to(query.device, non_blocking=True)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    if len(index) != len(k):
        k, v = k.index_select(0, index), v.index_select(0, index)
    out = varlen_attn(
        q,
        k,
        v,
        ends_q.to(query.device, non_blocking=True),
        ends_k.to(query.device, non_blocking=True),
        most_q,
        most_k,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)
