"""A model of transformers as a function of tensors alone, for what traces it: own attention, own cache, no classes of transformers.

The model's own forward runs with an attention function and a cache of ours, so that what is traced has plain products, and
keys and values go in and come out as tensors.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from swift.errors import first_line

# B sequences, Q new tokens, K tokens with those before, H heads, G heads of keys and values, d width of a head, V vocabulary

ATTENTION = "swift_traced"


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Scaled dot product attention (B, Q, H, d); query (B, H, Q, d), key and value (B, G, K, d), mask (B, 1, Q, K)."""
    key, value = _repeated(query, key, value)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention with all that models ask of it, in plain products: windows, soft caps (Gemma 2) and sinks (gpt-oss)."""
    if sliding_window is not None:
        WINDOWS.append(sliding_window)
        attention_mask = attention_mask & _in_window(query.shape[2], key.shape[2], sliding_window)
    key, value = _repeated(query, key, value)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Not infinity: a row that sees nothing then gives numbers, not NaN.
    scores = torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
    if s_aux is None:
        weights = scores.softmax(-1)
    else:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


WINDOWS: list[int] = []  # that layers asked for since it was cleared
AttentionInterface.register(ATTENTION, _attention)


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for each head of the queries, (B, H, K, d)."""
    heads = int(query.shape[1])
    repeats = heads // int(key.shape[1])
    if repeats == 1:
        return key, value
    whole = [part[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(part.shape[0], heads, -1, part.shape[3]) for part in (key, value)]
    return whole[0], whole[1]


def causal(new: int, total: int) -> Tensor:
    """(Q, K): which columns the last ``new`` of ``total`` columns see."""
    columns = torch.arange(total)
    return columns[None, :] <= columns[total - new :, None]


def _in_window(new: int, total: int, window: int) -> Tensor:
    columns = torch.arange(total)
    return columns[None, :] > columns[total - new :, None] - window


class Past(Cache):
    """Keys and values that came before, (B, G, K, d) for each layer in turn; ``present`` has the new ones behind them."""

    def __init__(self, past: tuple[Tensor, ...] = ()) -> None:
        super().__init__(layers=[])
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pair = key_states, value_states
        if self.past:
            before = self.past[2 * layer_idx], self.past[2 * layer_idx + 1]
            pair = torch.cat([before[0], pair[0]], 2), torch.cat([before[1], pair[1]], 2)
        self.present[layer_idx] = pair
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.past[0].shape[2]) if self.past else 0


class Step(nn.Module):
    """Logits (B, Q, V) of ``input_ids`` (B, Q), and keys and values of all tokens so far (B, G, K, d).

    ``attention_mask`` (B, K) is 0 where a column holds no token, as on the left of a short row.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        mask = causal(input_ids.shape[1], attention_mask.shape[1])[None, None] & (attention_mask[:, None, None, :] > 0)
        cache = Past(past)
        logits = forward(self.model, input_ids, mask, position_ids, cache)
        return logits, *(part for layer in range(len(past) // 2) for part in cache.present[layer])


def forward(model: Any, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
    """Logits (B, Q, V) with ``mask`` (B, 1, Q, K), true where a token is seen."""
    given = {_cache_argument(model): cache}
    made = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **given)
    logits: Tensor = made.logits
    return logits


def _cache_argument(model: Any) -> str:
    """What the forward pass calls the cache: transformers 5.24 has another name than the releases before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Untraceable(Exception):
    """Why a model cannot be traced this way."""


def probe(model: Any) -> list[tuple[int, int]]:
    """(heads, width) of the keys and values of each layer in turn; WINDOWS then has those that layers asked for.

    Raises Untraceable if layers keep other things, or attend in a way that the attention function is not told of.
    """
    cache = Past()
    WINDOWS.clear()
    try:
        with torch.inference_mode():
            forward(model, torch.tensor([[5, 6]]), causal(2, 2)[None, None], torch.arange(2)[None], cache)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as problem:
        raise Untraceable(f"it does not run with plain keys and values ({first_line(problem)})") from None
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    if sorted(cache.present) != list(range(layers)):
        raise Untraceable(f"{len(cache.present)} of its {layers} layers keep keys and values")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds - {"sliding_attention"} or (_says_window(config, kinds) and not WINDOWS):
        raise Untraceable(f"its masks are not told to its attention ({', '.join(sorted(kinds)) or 'sliding_window'})")
    return [(part.shape[1], part.shape[3]) for layer in range(layers) for part in cache.present[layer]]


def _says_window(config: Any, kinds: set[str]) -> bool:
    """Whether layers have a window, by the kinds of layers if there are kinds."""
    if getattr(config, "layer_types", None):
        return bool(kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True) is not False


def names(shapes: list[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """What keys and values are called as inputs and as outputs: past_key_values.0.key, present.0.key and so on."""
    kinds = [f"{index // 2}.{'value' if index % 2 else 'key'}" for index in range(len(shapes))]
    return [f"past_key_values.{kind}" for kind in kinds], [f"present.{kind}" for kind in kinds]


def example(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Arguments of Step: two sequences of three tokens that came before and two new ones."""
    past = [torch.zeros(2, heads, 3, width, dtype=dtype) for heads, width in shapes]
    return torch.tensor([[5, 6], [7, 8]]), torch.ones(2, 5, dtype=torch.int64), torch.tensor([[3, 4], [3, 4]]), *past
