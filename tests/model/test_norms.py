import copy

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from swift.model.norms import recipe, use_lean_norms
from tests.families import build


def norm(kind, width=24):
    module = kind(width, eps=1e-5)
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 3, 4, 24)])
def test_a_replaced_norm_has_the_values_and_gradients_of_the_models_own(kind, shape):
    own = norm(kind)
    lean = copy.deepcopy(own)
    assert use_lean_norms(lean) == 1
    results = []
    for module in (own, lean):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = module(x)
        (out * torch.randn(shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        results.append((out.detach(), x.grad, module.weight.grad))
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_other_precisions_keep_the_models_own():
    own = norm(LlamaRMSNorm)
    lean = copy.deepcopy(own)
    use_lean_norms(lean)
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(lean(x), own(x))


def test_a_layer_norm_is_left_alone():
    assert use_lean_norms(torch.nn.LayerNorm(8)) == 0


@pytest.mark.parametrize(("family", "count"), [("llama", 5), ("qwen3", 9), ("gemma2", 9), ("olmo2", 9), ("gpt2", 0), ("opt", 0)])
def test_the_norms_of_a_model_are_found(family, count):
    model = build(family)
    ids = torch.tensor([[5, 9, 7, 100]])
    wanted = model(ids).logits
    assert use_lean_norms(model) == count
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_what_a_norm_gave_is_made_again_bit_for_bit_from_its_recipe(kind):
    lean = norm(kind)
    use_lean_norms(lean)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = lean(x)
    given, scale, weight = recipe(out)
    assert given.data_ptr() == x.data_ptr()  # no copy
    assert torch.equal((given * scale).mul_(weight), out)
    assert recipe(x) is None
