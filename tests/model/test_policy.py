"""Models of many families, built here with random weights: what is relied on is tried on each."""

import pytest
import torch
from torch.nn import functional as F

from swift.data.collate import flat_batch, flat_batches, padded_batch
from swift.model.policy import Policy, packing_fault
from tests.families import FAMILIES, build


def examples():
    """Three documents; the first two share 16 tokens, of which the last four are trained in both."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 128, (16,), generator=generator).tolist()
    ends = [torch.randint(3, 128, (count,), generator=generator).tolist() for count in (7, 5, 9)]
    documents = [shared + ends[0], shared + ends[1], ends[2]]
    return [{"input_ids": ids, "labels": [-100] * min(12, len(ids) - 4) + ids[min(12, len(ids) - 4) :]} for ids in documents]


def one_by_one(model):
    """The loss and gradients of transformers' own logits, a document at a time."""
    loss = torch.zeros(())
    for example in examples():
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = loss + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
    return loss, gradients(model, loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, wanted):
    """To 1e-5 of the largest value of each. Some are zero but for rounding (by a bias of keys, which moves all scores of a query
    alike), so 1e-7 of the model's largest is allowed too."""
    assert found.keys() == wanted.keys()
    rounding = 1e-7 * max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()) + rounding, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False], ids=["shared beginnings", "whole documents"])
def test_a_flat_row_of_documents_gives_each_ones_own_loss_and_gradients(family, share):
    model = build(family)
    wanted, wanted_gradients = one_by_one(model)
    assert packing_fault(model) is None
    batch = flat_batch(examples(), share=share)
    assert batch.num_computed == (37 if share else 53)
    found, _ = Policy(model).cross_entropy(batch)
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-5)
    found_gradients = gradients(model, found)
    assert_same_gradients(found_gradients, wanted_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_root_computed_once_for_several_passes_gives_the_same_loss_and_gradients(family):
    model = build(family)
    shared = torch.randint(3, 128, (18,), generator=torch.Generator().manual_seed(4)).tolist()
    rows = [{"input_ids": shared + row["input_ids"], "labels": [-100] * 18 + row["labels"]} for row in examples()]
    policy = Policy(model)
    wanted = policy.cross_entropy(padded_batch(rows, pad_token_id=0))[0]
    wanted_gradients = gradients(model, wanted)
    assert packing_fault(model) is None
    model.zero_grad()
    batches = flat_batches([rows[:2], rows[2:]])
    assert len(batches[0].root_ids) == 18
    found = torch.zeros(())
    with policy.root(batches[0].root_ids):
        for batch in batches:
            loss = policy.cross_entropy(batch)[0]
            loss.backward()
            found = found + loss.detach()
    torch.testing.assert_close(found, wanted.detach(), atol=0, rtol=1e-5)
    trained = dict(model.named_parameters())
    assert_same_gradients({name: trained[name].grad for name in wanted_gradients}, wanted_gradients)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_give_the_same_loss(family, side):
    model = build(family)
    wanted, _ = one_by_one(model)
    found, _ = Policy(model).cross_entropy(padded_batch(examples(), pad_token_id=0, padding_side=side))
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "from one document to the next"),
        ("jamba", {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}, "from one document to"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "cannot be replaced"),
        ("llama4_text", {"num_local_experts": 2}, "chunks"),
    ],
)
@pytest.mark.parametrize("std", [0.02, 0.15])  # with small weights little is carried over, and that must be seen too
def test_a_model_that_would_mix_documents_is_found_out(monkeypatch, family, options, reason, std):
    monkeypatch.setitem(FAMILIES, family, options)
    model = build(family, std=std)
    before = model.config._attn_implementation
    assert reason in packing_fault(model)
    assert model.config._attn_implementation == before


def test_a_model_goes_on_to_generate_as_before():
    model = build("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert packing_fault(model) is None
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)


def test_experts_are_balanced_by_the_models_own_loss():
    model = build("mixtral")
    ids = examples()[0]["input_ids"]
    with torch.no_grad():
        aux = model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False).aux_loss
    assert packing_fault(model) is None
    batch = flat_batch(examples()[:1])
    plain, _ = Policy(model).cross_entropy(batch)
    balanced, _ = Policy(model, router_aux_loss_coef=0.1).cross_entropy(batch)
    torch.testing.assert_close(balanced - plain, 0.1 * len(batch.target_S) * aux, atol=1e-4, rtol=1e-4)
    assert balanced.requires_grad


def test_a_decoder_whose_head_cannot_be_told_apart_gives_the_loss_too():
    model = build("opt")
    assert not Policy(model).has_own_head
    wanted, _ = one_by_one(model)
    found, _ = Policy(model).cross_entropy(padded_batch(examples(), pad_token_id=0))
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi3"])
def test_only_a_head_that_is_a_product_and_nothing_else_is_taken_for_one(family):
    """Gemma-2 caps its logits and Cohere scales them."""
    model = build(family)
    policy = Policy(model)
    model.get_output_embeddings().weight.data.mul_(100)  # so that a cap counts
    wanted, wanted_gradients = one_by_one(model)
    found, _ = policy.cross_entropy(padded_batch(examples(), pad_token_id=0))
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-5)
    assert_same_gradients(gradients(model, found), wanted_gradients)
    assert isinstance(policy.head, torch.Tensor) == (family in ("llama", "phi3"))


def test_experts_are_balanced_where_the_head_cannot_be_told_apart():
    model = build("mixtral")
    batch = padded_batch(examples()[:1], pad_token_id=0)
    wanted, _ = Policy(model, router_aux_loss_coef=0.1).cross_entropy(batch)
    model.base_model.forward = model.base_model.forward  # someone else's replacement: the head is left where it is
    policy = Policy(model, router_aux_loss_coef=0.1)
    assert not policy.has_own_head
    found, _ = policy.cross_entropy(batch)
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-5)


def test_weights_that_are_no_numbers_are_called_that():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    assert packing_fault(model) == "its logits are not finite numbers"
    assert not model.config._attn_implementation.startswith("swift")
