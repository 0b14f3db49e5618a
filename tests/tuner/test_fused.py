"""The same adapter with PEFT's own forward passes and with the replaced ones."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from swift.model.norms import use_lean_norms
from swift.train.build import checkpoint_activations
from swift.tuner.fused import fuse

IDS = torch.tensor([[5, 9, 17, 33, 12, 8], [4, 4, 6, 250, 31, 7]])


def adapted(tiny_model, *, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0} | options
    model = get_peft_model(model, LoraConfig(**settings)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model, fused_model, *, tolerance):
    wanted, wanted_gradients = loss_and_gradients(model)
    found, found_gradients = loss_and_gradients(fused_model)
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=tolerance * float(gradient.abs().max()), rtol=0, msg=name)


def test_layers_with_the_same_input_are_one_group(tiny_model):
    fused = fuse(adapted(tiny_model), IDS)
    names = [len(group.layers) for group in fused.groups]
    assert names == [3, 1, 2, 1] * 2  # q k v, o, gate up, down in each of two blocks
    assert fused.num_layers == 14


def test_the_loss_and_all_gradients_are_pefts(tiny_model):
    model, fused_model = adapted(tiny_model), adapted(tiny_model)
    fuse(fused_model, IDS)
    assert_same(model, fused_model, tolerance=1e-5)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"bias": "all"}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}])
def test_variants_are_pefts_too(tiny_model, options):
    model, fused_model = adapted(tiny_model, **options), adapted(tiny_model, **options)
    assert fuse(fused_model, IDS).num_layers > 0
    assert_same(model, fused_model, tolerance=1e-5)


def assert_formed_from_todays_weights(fused):
    for group in fused.groups:
        wanted = [(base.weight + 4 * b @ a).detach() for base, a, b in zip(group.bases, group.a, group.b, strict=True)]
        torch.testing.assert_close(group.merged, wanted)


def test_an_optimizer_step_is_seen_when_it_is_said(tiny_model):
    model = adapted(tiny_model)
    fused = fuse(model, IDS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    optimizer.register_step_post_hook(lambda *_: fused.changed())
    for _ in range(2):
        loss_and_gradients(model)
        optimizer.step()
        loss_and_gradients(model)
        assert_formed_from_todays_weights(fused)


def test_a_gated_mlp_keeps_its_two_products_alone(tiny_model):
    """Of what lies between the layers of an MLP only the outputs of gate and up are kept for the backward pass."""
    model, fused_model = adapted(tiny_model), adapted(tiny_model)
    fuse(fused_model, IDS)
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = []
    for each in (model, fused_model):
        sizes = []
        note = lambda tensor, sizes=sizes: sizes.append(tuple(tensor.shape)) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            each.base_model.model.model.layers[0].mlp(x)
        kept.append(sum(shape[-2:] == (5, 64) for shape in sizes))
    assert kept == [4, 2]  # gate, activated gate, up and their product; gate and up


def test_an_activation_that_gives_its_input_back_leaves_the_gate_as_it_is(tiny_model):
    model, fused_model = adapted(tiny_model), adapted(tiny_model)
    for module in (*model.modules(), *fused_model.modules()):
        if hasattr(module, "act_fn"):
            module.act_fn = torch.nn.Identity()
    fuse(fused_model, IDS)
    assert_same(model, fused_model, tolerance=1e-5)


def test_what_a_lean_norm_gave_is_made_again_and_not_kept(tiny_model):
    plain, lean = adapted(tiny_model), adapted(tiny_model)
    for model in (plain, lean):
        fuse(model, IDS)
    use_lean_norms(lean)
    assert_same(plain, lean, tolerance=1e-5)
    normed = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: normed.append(out)) for layer in lean.modules() if hasattr(layer, "variance_epsilon")
    ]
    kept = set()

    def note(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = lean(input_ids=IDS, labels=IDS, use_cache=False).loss
    for handle in handles:
        handle.remove()
    assert loss.requires_grad and len(normed) == 5
    assert not kept & {out.untyped_storage().data_ptr() for out in normed[:-1]}  # the last one is the head's, which is PEFT's own


def test_weights_that_are_loaded_are_seen_at_once(tiny_model):
    model, other = adapted(tiny_model), adapted(tiny_model)
    fused = fuse(model, IDS)
    loss_and_gradients(model)
    model.load_state_dict({name: 2 * value for name, value in other.state_dict().items() if "lora_" in name}, strict=False)
    loss_and_gradients(model)
    assert_formed_from_todays_weights(fused)


def test_16_bit_weights_get_the_update_on_the_output(tiny_model):
    model, fused_model = adapted(tiny_model, dtype=torch.bfloat16), adapted(tiny_model, dtype=torch.bfloat16)
    fused = fuse(fused_model, IDS)
    for each in (model, fused_model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            each.result = loss_and_gradients(each)
    assert not any(group.merged for group in fused.groups)
    torch.testing.assert_close(fused_model.result[0], model.result[0], atol=2e-2, rtol=0)
    for name, gradient in model.result[1].items():
        assert torch.nn.functional.cosine_similarity(fused_model.result[1][name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_dropout_acts_on_the_adapter_alone(tiny_model):
    model = adapted(tiny_model, lora_dropout=0.5)
    fuse(model, IDS)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    base = layer.base_layer(x)
    draws = torch.stack([layer(x) for _ in range(4000)])
    model.eval()
    plain = layer(x)
    assert torch.equal(plain, layer(x))  # no dropout in evaluation
    assert not torch.equal(draws[0], draws[1])
    # The mean of the draws is the undropped output: 4000 draws leave about 1 / sqrt(4000) of their spread.
    assert ((draws.mean(dim=0) - plain).abs() < 5 * draws.std(dim=0) / 4000**0.5).all()
    assert (plain - base).abs().mean() > 10 * (draws.mean(dim=0) - plain).abs().mean()


def test_gradients_with_dropout_are_those_of_the_mask_that_was_drawn(tiny_model):
    model = adapted(tiny_model, lora_dropout=0.3).double()
    fuse(model, IDS)
    weight = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)

    def loss(shift):
        torch.manual_seed(2)
        with torch.no_grad():
            weight[0, 0] += shift
        logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), IDS[:, 1:])

    model.zero_grad()
    loss(0.0).backward()
    slope = (loss(1e-3) - loss(-2e-3)) / 2e-3  # the weight is shifted to one side, then to the other; norms compute in float32
    torch.testing.assert_close(weight.grad[0, 0], slope.detach(), rtol=2e-3, atol=0)


def test_the_adapter_can_be_switched_off_and_saved_and_merged(tiny_model, tmp_path):
    model = adapted(tiny_model)
    fuse(model, IDS)
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        with model.disable_adapter():
            base = model(input_ids=IDS, use_cache=False).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
        torch.testing.assert_close(base, plain(input_ids=IDS, use_cache=False).logits)
        model.save_pretrained(tmp_path)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)
    from peft import PeftModel

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)


def test_dora_keeps_pefts_forward_pass(tiny_model):
    assert fuse(adapted(tiny_model, use_dora=True), IDS).num_layers == 0


def test_recomputed_activations_change_nothing(tiny_model):
    model, fused_model = adapted(tiny_model), adapted(tiny_model)
    fuse(fused_model, IDS)
    fused_model.enable_input_require_grads()
    checkpoint_activations(fused_model.base_model.model, {"use_reentrant": False})
    assert_same(model, fused_model, tolerance=1e-5)
