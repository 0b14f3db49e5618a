import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from swift.model.policy import probe_ids
from swift.tuner.fused import fuse
from swift.tuner.switch import switchable, with_adapter_named, without_adapter

IDS = torch.arange(4, 24)[None]


def adapted(path, *, seed=0, **options):
    """The model with a LoRA adapter that changes it."""
    torch.manual_seed(seed)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_without_its_adapter_a_model_is_what_it_was(tiny_model, options):
    model = adapted(tiny_model, **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(2)
    fuse(model, probe_ids(model.get_base_model(), 8))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before, plain = logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    modules = switchable(model)
    with without_adapter(modules):
        found = logits(model)
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert not torch.allclose(before, plain, atol=1e-3)


def test_the_switch_does_what_that_of_peft_does(tiny_model):
    model = adapted(tiny_model)
    with model.disable_adapter():
        wanted = logits(model)
    with without_adapter(switchable(model)):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)


def test_another_adapter_takes_the_place_of_the_trained_one(tiny_model, tmp_path):
    """Also in fused layers, which know the trained one alone."""
    other = adapted(tiny_model, seed=1)
    other.save_pretrained(tmp_path)
    model = adapted(tiny_model)
    model.load_adapter(str(tmp_path), adapter_name="reference", is_trainable=False)
    assert fuse(model, probe_ids(model.get_base_model(), 8)).num_layers == 14
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before, wanted = logits(model), logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path))
    with with_adapter_named(switchable(model), "reference"):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any("reference" in name for name in trained)
