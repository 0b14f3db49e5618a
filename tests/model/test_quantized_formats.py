"""Checkpoint formats of quantized weights: what is written is read back exactly, and the words are those that others read."""

import pytest
import torch

from swift.errors import ModelError
from swift.model.quantized import FORMATS
from swift.model.quantized.base import GroupedWeight, ScaledWeight, Settings
from swift.model.quantized.words import pack, pack_apart, unpack, unpack_apart

EVERY = [("gptq", bits) for bits in (2, 3, 4, 8)] + [("gptq_v2", bits) for bits in (2, 3, 4, 8)] + [("awq", 4)]


def random(*shape, below, least=0, seed=0):
    return torch.randint(least, below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def grouped(bits, *, symmetric=False, groups=None, outputs=64, inputs=96, count=3, least=0):
    scales = (torch.rand(outputs, count, generator=torch.Generator().manual_seed(2)) + 0.01).half().float()
    zeros = torch.full((outputs, count), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = random(outputs, count, below=2**bits, least=least, seed=1)
    return GroupedWeight(random(outputs, inputs, below=2**bits), scales, zeros, bits, symmetric, groups)


def same(one, other):
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)
    assert torch.equal(one.zeros, other.zeros)
    assert (one.bits, one.symmetric) == (other.bits, other.symmetric)
    assert torch.equal(one.group_of_inputs(), other.group_of_inputs())
    assert torch.equal(one.dequantize(), other.dequantize())


def test_words_hold_the_first_value_in_their_lowest_bits():
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4).tolist() == [0x87654321 - 2**32]
    assert pack(torch.tensor([0xD2, 4, 0, 0xFF], dtype=torch.uint8), 8).tolist() == [0xFF0004D2 - 2**32]
    assert pack(torch.tensor([3] + [0] * 14 + [1], dtype=torch.uint8), 2).tolist() == [0x40000003]


def test_values_of_three_bits_lie_across_words():
    """Value 10 has its two low bits in the first word and its high bit in the second; value 21 one and two."""
    values = torch.zeros(32, dtype=torch.uint8)
    values[10], values[21], values[31] = 5, 6, 7  # 101, 110, 111
    assert pack(values, 3).tolist() == [0b01 << 30, 0b1, (0b111 << 29 | 0b11) - 2**32]


def test_values_that_lie_apart_leave_two_bits_of_a_word():
    """Ten values of 3 bits a word; the eleventh begins the next."""
    values = torch.tensor([7] * 10 + [5], dtype=torch.uint8)
    assert pack_apart(values, 3).tolist() == [2**30 - 1, 5]
    assert torch.equal(unpack_apart(pack_apart(values, 3), 3, 11), values)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_words_come_back(bits):
    values = random(5, 96, below=2**bits)
    assert pack(values, bits).shape == (5, 3 * bits)
    assert torch.equal(unpack(pack(values, bits), bits), values)
    assert torch.equal(unpack_apart(pack_apart(values[:, :91], bits), bits, 91), values[:, :91])


@pytest.mark.parametrize(("name", "bits"), EVERY)
@pytest.mark.parametrize("symmetric", [True, False])
def test_grouped_weights_come_back(name, bits, symmetric):
    format = FORMATS.get(name)
    weight = grouped(bits, symmetric=symmetric, least=format.least_zero)
    settings = Settings("gptq", bits, 32, symmetric)
    found = format.write("a.b", weight, settings)
    same(format.read("a.b", found.__getitem__, settings), weight)
    assert format.unfit((64, 96), settings) is None


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_the_order_of_inputs_comes_back(name):
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3)) // 32
    weight = grouped(4, groups=order, least=1)
    format = FORMATS.get(name)
    settings = Settings("gptq", 4, 32, False, desc_act=True)
    same(format.read("x", format.write("x", weight, settings).__getitem__, settings), weight)


def test_zero_points_as_each_format_stores_them():
    """Eight zero points of 8 are 0x88888888, in V1 0x77777777."""
    weight = grouped(4, symmetric=True, outputs=8, inputs=8, count=1)
    stored = {name: FORMATS.get(name).write("x", weight, Settings("gptq", 4))["x.qzeros"].item() for name in ("gptq", "gptq_v2", "awq")}
    assert stored == {"gptq": 0x77777777, "gptq_v2": 0x88888888 - 2**32, "awq": 0x88888888 - 2**32}


def test_awq_puts_even_outputs_before_odd_ones():
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    weight = GroupedWeight(codes, torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.uint8), 4, False)
    assert FORMATS.get("awq").write("x", weight, Settings("awq", 4))["x.qweight"].item() == 0x75316420


def test_a_zero_point_of_zero_is_refused_by_the_first_form_of_gptq_alone():
    weight = grouped(4)
    with pytest.raises(ModelError, match="the format gptq holds no zero point of 0") as caught:
        FORMATS.get("gptq").write("x", weight, Settings("gptq", 4, 32, False))
    assert "gptq_v2" in caught.value.hint


def test_zero_points_that_gptqmodel_stored_by_a_borrow_are_read():
    """gptqmodel takes 0x11111111 from the word of all eight: zero points 0 1 0 0 0 0 0 5 become 5 - 1 and so on, with borrows."""
    zeros = torch.tensor([[0], [1], [0], [0], [0], [0], [0], [5]], dtype=torch.uint8)
    weight = GroupedWeight(random(8, 8, below=16), torch.ones(8, 1), zeros, 4, False)
    tensors = FORMATS.get("gptq_v2").write("x", weight, Settings("gptq", 4))
    tensors["x.qzeros"] -= 0x11111111
    same(FORMATS.get("gptq").read("x", tensors.__getitem__, Settings("gptq", 4)), weight)


@pytest.mark.parametrize(
    ("name", "shape", "settings", "reason"),
    [
        ("gptq", (12, 64), Settings("gptq", 4, 32), "12 outputs of 4 bits do not fill words"),
        ("gptq", (8, 36), Settings("gptq", 4, 12), "36 inputs of 4 bits do not fill words"),
        ("gptq", (24, 64), Settings("gptq", 3, 32), "24 outputs of 3 bits"),
        ("gptq_v2", (32, 48), Settings("gptq", 8, 32), "48 inputs are no multiple of groups of 32"),
        ("awq", (12, 64), Settings("awq", 4, 32), "12 outputs are no multiple of 8"),
        ("awq", (8, 40), Settings("awq", 4, 32), "40 inputs are no multiple of groups of 32"),
    ],
)
def test_shapes_that_a_format_cannot_hold(name, shape, settings, reason):
    assert reason in FORMATS.get(name).unfit(shape, settings)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_settings_come_back(name):
    format = FORMATS.get(name)
    wanted = Settings(
        method=name.removesuffix("_v2"),
        bits=4,
        group_size=64,
        symmetric=False,
        desc_act=name != "awq",
        skipped=("lm_head", "model.layers.0.mlp.down_proj"),
        extra={} if name == "awq" else {"damp_percent": 0.05},
    )
    assert format.settings(format.config(wanted)) == wanted


DAMAGES = [
    ("qweight", lambda t: t[:-1]),
    ("qweight", lambda t: t[:, :-1]),
    ("scales", lambda t: t[:, :-8]),
    ("scales", lambda t: t[:-1]),
    ("scales", lambda t: t * float("inf")),
    ("qzeros", lambda t: t[:, :-1]),
    ("g_idx", lambda t: t + 1),
    ("g_idx", lambda t: t[:-8]),
]


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [(name, *damage) for name in ("gptq", "gptq_v2", "awq") for damage in DAMAGES if name != "awq" or damage[0] != "g_idx"],
)
def test_damaged_tensors_are_refused(name, part, change):
    format = FORMATS.get(name)
    settings = Settings("gptq", 4, 32, False)
    tensors = format.write("layer", grouped(4, least=1), settings)
    tensors[f"layer.{part}"] = change(tensors[f"layer.{part}"])
    with pytest.raises(ModelError, match=r"^layer: "):
        format.read("layer", tensors.__getitem__, settings)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gptq", {"bits": 5}, "gptq with 5 bits"),
        ("gptq", {}, "gptq with None bits"),
        ("awq", {"bits": 8}, "awq with 8 bits"),
        ("awq", {"bits": 4, "version": "gemv"}, "layout 'gemv' of awq"),
        ("awq", {"bits": 4, "zero_point": False}, "awq without zero points"),
    ],
)
def test_settings_that_are_not_supported(name, config, message):
    with pytest.raises(ModelError, match=message):
        FORMATS.get(name).settings(config)


def test_what_a_format_does_not_hold_is_refused():
    scaled = ScaledWeight(torch.zeros(8, 8, dtype=torch.int8), torch.ones(8, 1))
    with pytest.raises(ModelError, match="x: this format holds whole numbers in groups, not ScaledWeight"):
        FORMATS.get("awq").write("x", scaled, Settings("awq", 4))
    with pytest.raises(ModelError, match="x: awq holds 4 bits"):
        FORMATS.get("awq").write("x", grouped(8), Settings("awq", 8))
    third = grouped(4, least=1)
    with pytest.raises(ModelError, match="scales that float16 does not hold"):
        FORMATS.get("gptq").write("x", GroupedWeight(third.codes, third.scales / 3, third.zeros, 4, False), Settings("gptq", 4))
