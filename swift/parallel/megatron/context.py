"""Flat rows of documents, and parts of them: Megatron's layers compute each token by itself, and our attention the rest.

Megatron-Core's own attention over packed rows, and over parts of rows (context parallelism), is Transformer Engine's alone.
Its layers know nothing of other tokens but in the attention and in the positions: both are put in here. A part is a whole
flat row, whose layout keeps documents apart, or what ``sequence.split`` has cut for one of several processes.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ConfigError
from swift.model.attention import packed_attention
from swift.model.batch import Batch
from swift.model.layout import Layout
from swift.parallel.megatron import package
from swift.parallel.sequence.attend import attend
from swift.parallel.sequence.split import PartLayout

# t tokens of a part, H query heads and G key heads of a process, d width of a head


@dataclass(frozen=True)
class Handed:
    """A part's layout, in the place of PackedSeqParams: every layer is handed it, when it is computed again too."""

    layout: Layout
    max_seqlen_q: int
    max_seqlen_kv: int
    qkv_format: str = "sbhd"  # of thd, Megatron-Core would cut the rotary embedding itself
    cp_group: Any = None


class PartAttention(nn.Module):
    """A layer's attention without its matrices, as Megatron-Core's layer specification takes it."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.scaling = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.shares_tokens = config.sequence_parallel
        is_narrow = package.part("transformer.utils").is_layer_window_attention
        narrow = is_narrow(config.window_size, config.window_attn_skip_freq, layer_number)
        # Megatron's window counts the tokens before a token, ours the token itself too.
        self.window: int | None = config.window_size[0] + 1 if narrow else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Handed, **__: Any) -> Tensor:
        """(t, 1, H d) of query (t, 1, H, d) and key and value (t, 1, G, d)."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        options: dict[str, Any] = {"scaling": self.scaling, "sliding_window": self.window}
        layout = packed_seq_params.layout
        if isinstance(layout, PartLayout):
            output = attend(query, key, value, layout, None, "sdpa", options)
        else:
            with self._drawing():
                output = packed_attention(query, key, value, layout, dropout=self.dropout if self.training else 0.0, **options)
        return output.transpose(0, 1).flatten(2)

    def _drawing(self) -> Any:
        """Within, each process that shares a layer draws for its own heads. Where they share tokens, Megatron's block does so already."""
        if not self.dropout or not self.training or self.shares_tokens:
            return contextlib.nullcontext()
        return package.part("tensor_parallel").get_cuda_rng_tracker().fork()


class PartRotary(nn.Module):
    """Megatron's rotary embedding at the positions of a part's tokens."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.whole, self.get_rotary_seq_len = whole, whole.get_rotary_seq_len
        self.positions_T: Tensor | None = None

    def forward(self, length: int, **_: Any) -> Tensor:
        """(t, 1, 1, d); ``length`` is that of the longest document."""
        assert self.positions_T is not None
        embedding: Tensor = self.whole.get_emb(length)
        return embedding.index_select(0, self.positions_T.to(embedding.device))


def use_part_attention(spec: Any) -> None:
    """Let the layers of ``spec``, a block's specification, attend within documents, over the processes that share them."""
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = PartAttention


def use_part_positions(chunk: Any) -> None:
    """Let ``chunk``, a GPTModel, take positions from the part that it is given."""
    chunk.rotary_pos_emb = PartRotary(chunk.rotary_pos_emb)


def compute_part(chunk: Any, part: Batch) -> Any:
    """What ``chunk`` makes of ``part``, a flat row (1, t): hidden states, or logits (1, t, V) in the last stage."""
    layout = part.layout
    assert layout is not None and part.position_ids is not None
    chunk.rotary_pos_emb.positions_T = part.position_ids[0]
    longest = max(depth + length for depth, length in zip(layout.depths, layout.lengths, strict=True))
    return chunk(part.input_ids, part.position_ids, None, packed_seq_params=Handed(layout, longest, longest))


def check_part_attention(config: Any) -> None:
    """ConfigError for what a TransformerConfig asks of attention, and ours has not."""
    size = config.context_parallel_size
    unknown: list[tuple[str, Any]] = [("softmax_type", "vanilla"), ("fused_single_qkv_rope", False)]
    if size > 1:
        unknown.append(("attention_dropout", 0.0))
    for name, neutral in unknown:
        if (value := getattr(config, name, neutral)) != neutral:
            said, way = f"--sequence_parallel_size {size}", "leave --sequence_parallel_size away"
            if size == 1:
                said, way = "rows without padding", "say --padding_free false"
            raise ConfigError(
                f"--strategy megatron and {said} cannot be combined with {name} = {value}", hint=f"use --strategy fsdp2, or {way}"
            )


def filled(batch: Batch, length: int) -> Batch:
    """``batch``, a flat row, with tokens up to ``length``: a document at its end that nothing sees and that predicts nothing."""
    layout = batch.layout
    assert layout is not None and batch.position_ids is not None
    missing = length - layout.num_tokens
    if not missing:
        return batch
    positions = torch.arange(missing, device=batch.position_ids.device)[None]
    return replace(
        batch,
        input_ids=nn.functional.pad(batch.input_ids, (0, missing)),
        position_ids=torch.cat([batch.position_ids, positions], dim=1),
        layout=Layout((*layout.lengths, missing), (*layout.parents, -1), layout.root),
    )
