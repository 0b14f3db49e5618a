"""A model of transformers that computes its part of a sequence, and the trial of whether it can."""

from typing import Any

import torch
from torch import Tensor

from swift.errors import ConfigError
from swift.model.attention import PREFIX, packed_attention, packed_inputs
from swift.model.layout import Layout
from swift.model.policy import evaluating, is_close, narrow_windows, packing_fault, probe_ids
from swift.parallel.sequence.exchange import Gather
from swift.parallel.sequence.ring import ring_attention
from swift.parallel.sequence.share import Share
from swift.parallel.sequence.split import PartLayout, part_layout
from swift.parallel.sequence.ulysses import own_heads, repeated, to_heads, to_tokens

MARK = PREFIX + "sequence_"
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Their frequencies follow the largest position in a pass, which differs from part to part.
LENGTH_BOUND = ("dynamic", "longrope")


def use_sequence_parallel(model: Any, share: Share) -> None:
    """Let ``model`` compute batches that ``split`` has cut. Called in all processes of ``share`` at once, on whole weights.

    Dropout and noise on embeddings are drawn by each process for its own tokens (Ulysses: attention dropout for its own
    heads). The load-balancing loss of a mixture of experts is that of the whole row. ConfigError if the model's layers
    carry anything from token to token besides attention, which is tried, or if a ring would need what it has not.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if fault := _stated_fault(inner, share) or packing_fault(model) or _trial_fault(inner, share):
        raise ConfigError(
            f"--sequence_parallel_size {share.size} cannot be used with {type(inner).__name__}: {fault}",
            hint="leave --sequence_parallel_size away; --tensor_model_parallel_size or --fsdp fsdp2 spread the memory otherwise",
        )
    inner.base_model.register_forward_hook(_gather_routers, with_kwargs=True)


def _stated_fault(model: Any, share: Share) -> str | None:
    """What its configuration says against it."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    for kind in kinds:
        if kind in LENGTH_BOUND:
            return f"rope_type {kind} depends on the length of the whole sequence"
    if share.ring_size > 1 and (name := next((name for name in DROPOUTS if getattr(config, name, 0)), None)):
        return f"{name} is {getattr(config, name)}, and a ring has no attention dropout; set it to 0 in config.json"
    return None


def _trial_fault(model: Any, share: Share) -> str | None:
    """Why parts would not be computed as the whole is; the same answer in every process. The model is switched, and back if so."""
    before = model.config._attn_implementation
    try:
        _switch(model)
        is_same = _parts_give_the_whole(model, share)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as problem:
        model.set_attn_implementation(before)
        return f"its forward pass does not take a part: {str(problem).splitlines()[0]}"
    if not is_same:
        model.set_attn_implementation(before)
        return "its layers carry something from token to token besides attention"
    return None


def _switch(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    packed = model.config._attn_implementation
    if packed.startswith(MARK):
        return
    name = MARK + packed.removeprefix(PREFIX)
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_after(ALL_ATTENTION_FUNCTIONS[packed], packed.removeprefix(PREFIX)))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[packed])
    model.set_attn_implementation(name)


def _attention_after(packed: Any, base: str) -> Any:
    """The attention function of a part, and ``packed``'s if there is none."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        layout = options.get("layout")
        if not isinstance(layout, PartLayout):
            return packed(module, query, key, value, attention_mask, **options)
        del options["layout"]
        root = options.pop("root", None)
        roots = root.before(module, key[:, :, :0], value[:, :, :0]) if root is not None and layout.root else None
        return attend(query, key, value, layout, roots, base, options), None

    return attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: PartLayout, roots: tuple[Tensor, Tensor] | None, base: str, options: dict[str, Any]
) -> Tensor:
    """(1, t, H, d) of a part's query (1, H, t, d), key and value (1, G, t, d)."""
    share = layout.share
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (part.to(dtype) for part in (query, key, value))
    roots = None if roots is None else (roots[0].to(dtype), roots[1].to(dtype))
    if share.heads is not None:
        query, key, value = to_heads(query, key, value, share.heads)
        if roots is not None:
            first, second = (own_heads(repeated(part, share.heads_size), share.heads) for part in roots)
            roots = first, second
        if (sinks := options.get("s_aux")) is not None:
            options["s_aux"] = own_heads(sinks, share.heads, dim=0)
    if share.ring is None:
        if roots is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(roots, (key, value), strict=True))
        output = packed_attention(query, key, value, layout, base=base, **options)
    else:
        if options.get("dropout"):
            raise ConfigError("--sequence_parallel_kind ring has no attention dropout", hint="use ulysses, or set it to 0 in config.json")
        known = ("scaling", "sliding_window", "softcap", "s_aux")
        output = ring_attention(query, key, value, layout, root=roots, **{name: options[name] for name in known if name in options})
    return output if share.heads is None else to_tokens(output, share.heads)


def _gather_routers(decoder: Any, arguments: Any, options: dict[str, Any], output: Any) -> Any:
    """The router logits of the whole row, so that experts are balanced over it and not over each part."""
    layout, routers = options.get("layout"), getattr(output, "router_logits", None)
    if isinstance(layout, PartLayout) and routers is not None:
        output.router_logits = tuple(_whole(part, layout) for part in routers)
    return output


def _whole(part: Tensor, layout: PartLayout) -> Tensor:
    """(T, ...) the rows of all processes in their order, without the filling, of this process's (t, ...)."""
    gathered = Gather.apply(part, layout.share.group).flatten(0, 1)
    order = torch.cat(layout.places).argsort()[: layout.num_tokens - layout.num_filled]
    whole: Tensor = gathered[order.to(part.device)]
    return whole


@torch.no_grad()
def _parts_give_the_whole(model: Any, share: Share) -> bool:
    """Whether parts of documents, two of which share a beginning, get the logits that they get in one process."""
    size = 3 * share.size
    whole = Layout(lengths=(size, size + 1, 4, size), parents=(-1, 0, 0, -1))
    layout = part_layout(whole, share)
    ids = probe_ids(model, whole.num_tokens)
    own = layout.own.to(ids.device)
    with evaluating(model), narrow_windows(model):
        inputs = packed_inputs(whole, ids.device)
        wanted = model(input_ids=ids, position_ids=whole.position_ids().to(ids.device), use_cache=False, **inputs).logits[0]
        ids = torch.nn.functional.pad(ids, (0, layout.num_filled))
        inputs = packed_inputs(layout, ids.device)
        part = model(input_ids=ids[:, own], position_ids=layout.position_ids().to(ids.device), use_cache=False, **inputs).logits[0]
    return is_close(_whole(part, layout), wanted)
