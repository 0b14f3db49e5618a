"""Which operation produces an input is found by trial, and dividing it changes nothing, for every family."""

import json

import pytest
import torch
from torch import nn

from swift.model.quantized.base import GroupedWeight
from swift.quantize.folds import Fold, divide_rows, find_folds
from swift.quantize.grid import find_grid, round_to
from tests.quantize.blocks import block_of

LLAMA = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
GEMMA = ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]
PRODUCERS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "granite": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "olmo2": [None, "self_attn.v_proj", None, "mlp.up_proj"],  # its norms come after the layers
    "cohere": ["input_layernorm", "self_attn.v_proj", "mlp.up_proj"],  # attention and MLP read one norm
    "gpt_neox": ["input_layernorm", "attention.query_key_value", "post_attention_layernorm", None],  # GELU of one branch
    "opt": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],  # ReLU lets a scale pass
}


def folds_of(given, **options):
    return find_folds(given.block, given.groups, given.together, given.alone, **options)


@pytest.mark.parametrize("family", PRODUCERS)
def test_producers_of_every_family_are_found_and_can_be_divided(family):
    given = block_of(family)
    before = {name: tensor.clone() for name, tensor in given.block.state_dict().items()}
    folds = folds_of(given)
    assert [fold and fold.producer for fold in folds] == PRODUCERS[family]
    assert all(torch.equal(before[name], tensor) for name, tensor in given.block.state_dict().items())
    output = given.together()
    generator = torch.Generator().manual_seed(3)
    for fold, group in zip(folds, given.groups, strict=True):
        if fold is not None:
            scale = fold.divide(given.block, fold.pool(torch.rand(len(fold.share), generator=generator) * 3 + 0.2))
            for name in group:
                given.block.get_submodule(name).weight.data.mul_(scale)
    assert sum(not torch.equal(before[name], tensor) for name, tensor in given.block.state_dict().items()) > 3
    torch.testing.assert_close(given.together(), output, rtol=1e-4, atol=1e-4 * float(output.abs().max()))


def test_query_heads_that_share_a_kv_head_share_its_channels():
    """4 query heads, 2 kv heads of 8 channels: heads 0 and 1 read the first, 2 and 3 the second."""
    first, second = list(range(8)), list(range(8, 16))
    assert folds_of(block_of("llama"))[1].share.tolist() == first + first + second + second


def test_only_the_slice_of_a_fused_layer_that_scales_is_divided():
    """Phi3's rows are 32 of queries, 16 of keys, 16 of values; its gate's 48 come before the 48 that are multiplied."""
    folds = folds_of(block_of("phi3"))
    assert folds[1].share.tolist() == [48 + channel for head in (0, 0, 1, 1) for channel in range(8 * head, 8 * head + 8)]
    assert folds[3].share.tolist() == list(range(48, 96))


def test_gpt_neox_interleaves_queries_keys_and_values_of_each_head():
    share = folds_of(block_of("gpt_neox"))[1].share.tolist()
    assert share == [24 * head + 16 + channel for head in range(4) for channel in range(8)]


def test_norms_that_add_one_are_rounded_as_stored_and_the_scale_makes_up_for_it():
    given = block_of("gemma3_text")
    fold = folds_of(given)[0]
    assert fold.offset == 1.0
    norm, output = given.block.get_submodule(fold.producer), given.together()
    scale = fold.divide(given.block, torch.linspace(0.3, 3.1, 32), torch.bfloat16)
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    assert not torch.equal(scale, torch.linspace(0.3, 3.1, 32))
    for name in given.groups[0]:
        given.block.get_submodule(name).weight.data.mul_(scale)
    torch.testing.assert_close(given.together(), output, rtol=1e-4, atol=1e-4)


def test_a_known_fold_is_only_checked():
    given = block_of("llama")
    known = {}
    folds = folds_of(given, known=known)
    assert [known[tuple(group)] for group in given.groups] == folds
    runs = []

    def alone():
        runs.append(1)
        return given.alone()

    assert find_folds(given.block, given.groups, given.together, alone, known=known) == folds
    assert len(runs) == 1
    wrong = known | {tuple(given.groups[0]): Fold("post_attention_layernorm", folds[0].share)}
    assert folds_of(given, known=wrong)[0].producer == "input_layernorm"


def test_pool_gives_inputs_of_one_channel_their_mean():
    assert Fold("x", torch.tensor([0, 1, 0, 1])).pool(torch.tensor([1.0, 2, 3, 6])).tolist() == [2, 4, 2, 4]


class Experts(nn.Module):
    """Norm, router, the best of 4 experts for each token, and the norm's output once more if ``leaks``."""

    def __init__(self, leaks=False):
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.router = nn.Linear(16, 4)
        self.first = nn.ModuleList(nn.Linear(16, 24) for _ in range(4))
        self.second = nn.ModuleList(nn.Linear(24, 16) for _ in range(4))
        self.leaks = leaks

    def forward(self, x):
        normed = self.norm(x)
        weights, best = self.router(normed).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number in range(4):
            at = best == number
            out[at] = self.second[number](self.first[number](normed[at]).relu()) * weights[at, None]
        return x + out + 0.01 * normed if self.leaks else x + out


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return lambda **options: (Experts(**options), torch.randn(1, 32, 16))


GROUPS = [[f"first.{number}" for number in range(4)], ["second.2"]]


def test_a_router_that_reads_the_same_input_is_scaled_with_the_experts(experts):
    block, x = experts()
    folds = find_folds(block, GROUPS, lambda: block(x), lambda: block(x.transpose(0, 1)))
    assert (folds[0].producer, folds[0].further) == ("norm", ("router.weight",))
    assert (folds[1].producer, folds[1].further) == ("first.2", ())


def test_experts_that_got_no_token_are_searched_when_they_do(experts):
    """And a fold that was found is not forgotten in a block where no token shows it."""
    block, x = experts()
    (best,) = block.router(block.norm(x[:, :1])).argmax(-1)[0].tolist()
    groups, known = [[f"second.{number}"] for number in range(4)], {}
    one = find_folds(block, groups, lambda: block(x[:, :1]), lambda: block(x[:, :1]), known)
    assert [number for number, fold in enumerate(one) if fold] == [best]
    assert list(known) == [(f"second.{best}",)]
    assert all(find_folds(block, groups, lambda: block(x), lambda: block(x.transpose(0, 1)), known))
    find_folds(block, groups, lambda: block(x[:, :1]), lambda: block(x[:, :1]), known)
    assert len(known) == 4 and all(known.values())


def test_a_fold_is_the_same_after_a_way_through_json():
    fold = Fold("norm", torch.tensor([2, 0, 1]), 1.0, ("router.weight",))
    again = Fold.of(json.loads(json.dumps(fold.as_dict())), torch.device("cpu"))
    assert again.share.tolist() == [2, 0, 1] and again.share.dtype == torch.int64
    assert (again.producer, again.offset, again.further) == ("norm", 1.0, ("router.weight",))


def test_no_fold_where_something_else_reads_the_input(experts):
    block, x = experts(leaks=True)
    assert find_folds(block, GROUPS[:1], lambda: block(x), lambda: block(x.transpose(0, 1))) == [None]
    block, x = experts()
    assert find_folds(block, [["first.1"]], lambda: block(x), lambda: block(x.transpose(0, 1))) == [None], "other experts read it too"


def test_dividing_a_quantized_producer_divides_its_scales():
    given = block_of("llama")
    fold = folds_of(given)[3]
    up = given.block.mlp.up_proj
    grid = find_grid(up.weight.data, 4, 16, False)
    made = {"mlp.up_proj": GroupedWeight(round_to(up.weight.data, *grid, 4), *grid, 4, False)}
    up.weight.data.copy_(made["mlp.up_proj"].dequantize())
    codes, output = made["mlp.up_proj"].codes, given.together()
    scale = fold.divide(given.block, torch.linspace(0.3, 3.1, 48), made=made)
    given.block.mlp.down_proj.weight.data.mul_(scale)
    assert torch.equal(made["mlp.up_proj"].codes, codes)
    assert torch.equal(made["mlp.up_proj"].dequantize(), up.weight)
    assert torch.equal(made["mlp.up_proj"].scales, made["mlp.up_proj"].scales.half().float())
    torch.testing.assert_close(given.together(), output, rtol=1e-3, atol=1e-3)  # scales have the 11 bits of float16


def test_rows_are_divided_by_hand():
    weight = GroupedWeight(torch.tensor([[9], [7]], dtype=torch.uint8), torch.tensor([[1.0], [3.0]]), torch.tensor([[8], [8]]), 4, True)
    assert divide_rows(weight, torch.tensor([2.0, 4.0])).dequantize().tolist() == [[0.5], [-0.75]]
