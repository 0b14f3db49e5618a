import gc
import inspect
import math
import weakref

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from swift.model.attention import packed_attention
from swift.model.layout import Layout

TREE = Layout(lengths=(5, 4, 6, 3, 7), parents=(-1, 0, 0, 2, -1))
H, G, D = 4, 2, 8


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, H, TREE.num_tokens, D), (1, G, TREE.num_tokens, D), (1, G, TREE.num_tokens, D))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def by_definition(query, key, value, mask, *, softcap=None, sinks=None):
    """softmax(q k^T / sqrt(d)) v over the whole row, with the mask of the layout."""
    key, value = key.repeat_interleave(H // G, dim=1), value.repeat_interleave(H // G, dim=1)
    scores = query @ key.transpose(2, 3) / math.sqrt(D)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, H, 1, 1).expand(1, H, query.shape[2], 1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def same(found, wanted, inputs):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    for got, expected in zip(
        torch.autograd.grad((found * weights).sum(), inputs), torch.autograd.grad((wanted * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_segment_by_segment_is_the_whole_row_under_the_mask(base):
    inputs = tensors()
    same(packed_attention(*inputs, TREE, base=base), by_definition(*inputs, TREE.mask()), inputs)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_sliding_window_counts_positions_of_the_document(base):
    inputs = tensors()
    positions = TREE.position_ids()[0]
    window = TREE.mask() & (positions[:, None] - positions[None, :] < 3)
    same(packed_attention(*inputs, TREE, base=base, sliding_window=3), by_definition(*inputs, window), inputs)


def test_scores_are_capped_and_sinks_take_their_share():
    inputs = [*tensors(), torch.randn(H, generator=torch.Generator().manual_seed(2)).requires_grad_()]
    found = packed_attention(*inputs[:3], TREE, softcap=2.0, s_aux=inputs[3])
    same(found, by_definition(*inputs[:3], TREE.mask(), softcap=2.0, sinks=inputs[3]), inputs)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 4])
def test_keys_of_a_root_are_seen_by_every_document(base, window):
    layout = Layout(TREE.lengths, TREE.parents, root=6)
    query, key, value = tensors()
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.cat([torch.randn(1, G, 6, D, generator=generator), part], dim=2).detach().requires_grad_() for part in (key, value))
    mask = layout.mask()
    if window:
        positions = torch.cat([torch.arange(6), layout.position_ids()[0]])
        mask = mask & (positions[6:, None] - positions[None, :] < window)
    found = packed_attention(query, key, value, layout, base=base, sliding_window=window)
    same(found, by_definition(query, key, value, mask), [query, key, value])


def test_another_document_changes_nothing():
    query, key, value = tensors()
    before = packed_attention(query, key, value, TREE)
    key, value = key.detach().clone(), value.detach().clone()
    key[:, :, 18:], value[:, :, 18:] = 9.0, 9.0  # the last document
    after = packed_attention(query, key, value, TREE)
    assert torch.equal(before[:, :18], after[:, :18])
    assert not torch.equal(before[:, 18:], after[:, 18:])


def test_the_kernel_for_cuda_takes_what_it_is_given():
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(parameters)


def test_values_of_another_width_and_dropout_go_another_way():
    query, key, value = tensors()
    narrow = value[..., :4].detach().requires_grad_()
    same(packed_attention(query, key, narrow, TREE), by_definition(query, key, narrow, TREE.mask()), [query, key, narrow])
    torch.manual_seed(0)
    dropped = packed_attention(query, key, value, TREE, dropout=0.5)
    assert dropped.shape == (1, TREE.num_tokens, H, D)
    assert not torch.allclose(dropped, packed_attention(query, key, value, TREE))


@pytest.mark.parametrize("root", [0, 2])
def test_query_key_value_and_output_are_kept_once(root):
    layout = Layout((64, 64, 96), (-1, 0, 0), root)
    generator = torch.Generator().manual_seed(0)
    rows = root + layout.num_tokens
    inputs = [
        torch.randn(1, heads, count, D, generator=generator).requires_grad_() for heads, count in ((H, rows - root), (G, rows), (G, rows))
    ]
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = packed_attention(*inputs, layout)
    own = sum(tensor.untyped_storage().nbytes() for tensor in (*inputs, output))
    assert sum(kept.values()) <= own + 4 * H * layout.num_tokens  # and a number per query and head


def test_spans_are_the_ones_of_the_mask_with_adjoining_ones_as_one():
    layout = Layout(TREE.lengths, TREE.parents, root=6)
    assert layout.spans[0] == ((0, 11),)
    assert layout.spans[1] == ((0, 15),)
    assert layout.spans[3] == ((0, 11), (15, 24))
    for begin, spans in zip(layout.starts, layout.spans, strict=True):
        seen = torch.zeros(6 + layout.num_tokens, dtype=torch.bool)
        for first, last in spans:
            seen[first:last] = True
        assert torch.equal(seen[:6], layout.mask()[begin, :6])
        assert bool((layout.mask()[begin] <= seen).all())


def test_autocast_computes_in_its_precision():
    query, key, value = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed_attention(query, key, value.bfloat16(), TREE)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), by_definition(query, key, value, TREE.mask()), atol=0.05, rtol=0.05)
    (gradient,) = torch.autograd.grad(found.float().sum(), [query])
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_masks_are_made_once_for_all_layers_and_go_with_the_layout(base):
    layout = Layout(TREE.lengths, TREE.parents)
    query, key, value = tensors()
    packed_attention(query, key, value, layout, base=base)
    masks = dict(layout.masks)
    assert masks
    packed_attention(query, key, value, layout, base=base)
    assert layout.masks.keys() == masks.keys()
    assert all(layout.masks[name] is mask for name, mask in masks.items())
    gone = weakref.ref(next(iter(masks.values())))
    del layout, masks
    gc.collect()
    assert gone() is None
