"""The compiled kernels beside the same thing written with torch, and their building."""

import _ctypes
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from swift.config.commands import InferConfig
from swift.config.options import build as build_config
from swift.engine.answers import answers
from swift.engine.base import Request, Sampling
from swift.engine.load import make_engine, source_of
from swift.engine.native import compiled
from swift.engine.native.compiled import kernels
from swift.engine.native.packed import GROUP, CompiledNorm, PackedLinear, pack, pack_model, unpack
from swift.engine.native.pages import PagedCache, Pages, Piece
from swift.errors import MachineError
from tests.families import FAMILIES, build

FORMATS = ["float32", "float16", "bfloat16", "int8", "int4"]
CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_computed_with(x, format):
    """Inputs as whole numbers of 16 bits for each group of a format in few bits."""
    if format not in GROUP:
        return x
    groups = x.unflatten(-1, (-1, GROUP[format]))
    scale = groups.abs().amax(-1, keepdim=True) / 32767
    return ((groups / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 97, 200])
def test_a_packed_layer_computes_with_the_weights_that_it_shows(format, rows):
    x, weight, bias = numbers(rows, 320), numbers(75, 320, seed=1), numbers(75, seed=2)
    layer = PackedLinear(weight, bias, format)
    torch.testing.assert_close(
        layer(as_computed_with(x, format)), F.linear(as_computed_with(x, format), layer.weight, bias), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_inputs_of_a_product_in_few_bits_lose_half_a_step_of_sixteen(format):
    """At most: each input half of largest / 32767 of its group, times the weight that it meets."""
    x, weight = numbers(9, 320) * 10, numbers(40, 320, seed=1)
    layer = PackedLinear(weight, None, format)
    steps = x.unflatten(-1, (-1, GROUP[format])).abs().amax(-1, keepdim=True).expand(-1, -1, GROUP[format]).flatten(-2) / 32767
    most = 0.51 * steps @ layer.weight.abs().T + 1e-4
    assert ((layer(x) - F.linear(x, layer.weight)).abs() <= most).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_largest_products_of_few_bits_overflow_nothing(format):
    """All inputs and weights of a group at their largest, with one sign and with two."""
    weight = torch.stack([torch.ones(128), -torch.ones(128), torch.tensor([1.0, -1.0] * 64)])
    layer = PackedLinear(weight, None, format)
    x = torch.stack([torch.full((128,), 3e38), torch.full((128,), -1e-38), torch.zeros(128)])
    torch.testing.assert_close(layer(x / 128) / 3e38, F.linear(x / 128, layer.weight) / 3e38, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS[:3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 7), (64, 257), (200, 300)])
def test_any_shape_is_packed(format, shape):
    layer = PackedLinear(numbers(*shape), None, format)
    x = numbers(2, 3, shape[1])
    assert layer(x).shape == (2, 3, shape[0])
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [8, 16, 32])
def test_floats_come_back_as_they_are(width):
    weight = numbers(50, 37)
    for format, dtype in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        assert torch.equal(unpack(pack(weight, format, width), format, 50, 37, width), weight.to(dtype).float())


@pytest.mark.parametrize("width", [8, 16, 32])
def test_what_few_bits_lose(width):
    """Half a step of each group: 2/127 of the largest weight for 8 bits; for 4 the mean square, of 15 steps, is 1/12 of a step's."""
    weight = numbers(50, 128)
    eight = unpack(pack(weight, "int8", width), "int8", 50, 128, width)
    steps = weight.unflatten(1, (-1, 64)).abs().amax(2, keepdim=True).expand(-1, -1, 64).flatten(1) / 127
    assert ((eight - weight).abs() <= steps * 0.501).all()
    four = unpack(pack(weight, "int4", width), "int4", 50, 128, width)
    groups = weight.unflatten(1, (-1, 32))
    step = (groups.amax(2) - groups.amin(2)) / 15
    assert (four - weight).square().mean() < 1.05 * step.square().mean() / 12


def test_a_group_of_equal_weights_is_kept():
    weight = torch.full((4, 64), 0.25)
    for format in ("int8", "int4"):
        found = unpack(pack(weight, format, 16), format, 4, 64, 16)
        torch.testing.assert_close(found, weight, rtol=5e-3, atol=0)
    assert torch.equal(unpack(pack(weight * 0, "int8", 16), "int8", 4, 64, 16), weight * 0)


def test_half_precision_keeps_small_and_large_weights():
    weight = torch.tensor([[6.1e-5, -3e-8, 65504.0, 0.0, -1.0, 5.96e-8, 1e-3, 2.0]]).half().float()
    layer = PackedLinear(weight, None, "float16")
    assert torch.equal(layer(torch.eye(8)).T, weight)


@pytest.mark.parametrize("width", [32, 64, 200, 576])
def test_the_norm(width):
    x, weight = numbers(3, 4, width) * 5, numbers(width, seed=1)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(CompiledNorm(weight, 1e-5)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"sliding_window": 5}, {"softcap": 2.0}, {"s_aux": numbers(6, seed=9)}])
@pytest.mark.parametrize("width", [8, 24, 64])
def test_attention_where_keys_lie_is_that_over_gathered_keys(extra, width):
    """Sequences of 1, 9, 40 and 17 tokens with blocks in no order, and one of several queries between them."""
    heads, groups, size = 6, 2, 4
    found = []
    for kernel in (None, kernels().paged_attention):
        cache = PagedCache(40, size)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
        pieces, begin, used = [], 0, 0
        for length, context in ((1, 1), (1, 9), (3, 8), (1, 40), (1, 17)):
            count = -(-context // size)
            pieces.append(Piece(begin, length, context, tuple(order[used : used + count])))
            begin, used = begin + length, used + count
        cache.of(0, numbers(1, groups, 1, width), numbers(1, groups, 1, width))
        for part, seed in zip(cache.layers[0], (1, 2), strict=True):
            part.copy_(numbers(*part.shape, seed=seed))
        module = torch.nn.Module()
        module.layer_idx = 0
        pages = Pages(cache, pieces, CPU, kernel)
        # As projections give them: heads beside one another.
        query = numbers(1, begin, heads, width, seed=4).transpose(1, 2)
        key, value = (numbers(1, begin, groups, width, seed=seed).transpose(1, 2) for seed in (5, 6))
        found.append(pages(module, query, key, value, **extra))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_large_scores_overflow_nothing():
    cache = PagedCache(4, 4)
    module = torch.nn.Module()
    module.layer_idx = 0
    key = numbers(1, 1, 7, 8) * 300
    pages = Pages(cache, [Piece(0, 7, 7, (2, 0))], CPU, kernels().paged_attention)
    pages(module, key, key, key)
    pages = Pages(cache, [Piece(0, 1, 8, (2, 0))], CPU, kernels().paged_attention)
    query = numbers(1, 1, 1, 8, seed=1) * 300
    keys = torch.cat([key, query], dim=2)
    expected = F.scaled_dot_product_attention(query, keys, keys)
    torch.testing.assert_close(pages(module, query, query, query), expected.transpose(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_it_did(family):
    ids = torch.arange(3, 19)[None]
    model = build(family)
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        packed = pack_model(model, "float32")
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert sum(packed.formats.values()) == sum(isinstance(module, PackedLinear) for module in model.modules()) > 2


def test_weights_in_16_bits_are_kept_so_where_nothing_is_lost():
    model = build("llama")
    with torch.no_grad():
        for number, module in enumerate(model.modules()):
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_([module.weight.bfloat16(), module.weight.half(), module.weight][number % 3])
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    weights = {name: model.get_submodule(name).weight.clone() for name in linears}
    packed = pack_model(model, "auto")
    assert len(packed.formats) == 3
    assert packed.bytes_after < packed.bytes_before
    assert all(torch.equal(model.get_submodule(name).weight, weights[name]) for name in linears)


def test_layers_that_no_group_divides_are_kept_without_loss():
    model = build("llama", hidden_size=32, intermediate_size=128)
    packed = pack_model(model, "int8")
    assert packed.formats == {"int8": 2, "float32": 13}  # the two down projections have 128 inputs, all else 32


def test_the_head_has_8_bits_beside_4():
    model = build("llama", hidden_size=64, intermediate_size=64)
    pack_model(model, "int4")
    assert model.get_output_embeddings().format == "int8"
    assert model.model.layers[0].self_attn.q_proj.format == "int4"


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A source with the names of the kernels alone, which is built in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    functions = "\n".join(f"void {name}() {{}}" for name in compiled.SIGNATURES)
    (folder / "kernels.cpp").write_text(f'extern "C" {{\n{functions}\n}}\n')
    monkeypatch.setattr(compiled, "SOURCES", folder)
    return folder


def rebuilt(monkeypatch, tmp_path, **environment):
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return kernels.__wrapped__()


def test_kernels_are_built_once(monkeypatch, tmp_path, sources):
    rebuilt(monkeypatch, tmp_path)
    built = list((tmp_path / "kernels").iterdir())
    assert len(built) == 1
    before = built[0].stat().st_mtime_ns
    rebuilt(monkeypatch, tmp_path)
    assert built[0].stat().st_mtime_ns == before


def test_other_sources_are_another_build(monkeypatch, tmp_path, sources):
    rebuilt(monkeypatch, tmp_path / "cache")
    (sources / "kernels.h").write_text("\n")
    rebuilt(monkeypatch, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 2


def test_no_compiler_and_one_that_fails(monkeypatch, tmp_path):
    with pytest.raises(MachineError, match=r"no C\+\+ compiler nothing-of-the-kind"):
        rebuilt(monkeypatch, tmp_path, CXX="nothing-of-the-kind")
    with pytest.raises(MachineError, match=r"cannot build the kernels|does not run"):
        rebuilt(monkeypatch, tmp_path, CXX="false")
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "kernels").touch()
    with pytest.raises(MachineError, match=rf"^the kernels cannot be kept in {tmp_path}/kernels: File exists$"):
        rebuilt(monkeypatch, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no library", None])
def test_a_library_that_cannot_be_loaded_is_said(monkeypatch, tmp_path, sources, content):
    """An empty file, some text, and a library without the kernels."""
    rebuilt(monkeypatch, tmp_path / "whole")
    (built,) = (tmp_path / "whole" / "kernels").iterdir()
    broken = tmp_path / "broken" / "kernels" / built.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(Path(_ctypes.__file__).read_bytes() if content is None else content)
    with pytest.raises(MachineError, match="the kernels cannot be loaded: ") as caught:
        rebuilt(monkeypatch, tmp_path / "broken")
    assert str(broken) in caught.value.hint
    assert "\n" not in str(caught.value)


def test_without_kernels_torchs_own_are_used_unless_others_were_asked_for(monkeypatch, tmp_path, tiny_model, capsys):
    (tmp_path / "kernels").touch()
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path))
    monkeypatch.setattr("swift.engine.native.make.kernels", kernels.__wrapped__)
    options = {"model": str(tiny_model), "val_dataset": "none.jsonl"}
    engine = make_engine(source_of(build_config(InferConfig, ("argument", options))))
    (answer,) = answers(engine, [Request(id="a", prompt=(5, 6), sampling=Sampling(max_new_tokens=3, temperature=0))])
    assert len(answer.token_ids) == 3
    assert "cannot be kept in" in capsys.readouterr().err
    with pytest.raises(MachineError, match="cannot be kept in"):
        make_engine(source_of(build_config(InferConfig, ("argument", options | {"weight_format": "int8"}))))
