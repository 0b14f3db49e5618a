"""Adapters on top of a quantized checkpoint: trained, used and merged; what would change the frozen weights is refused."""

import json

import pytest
import torch

from swift.config.commands import InferConfig
from swift.config.options import build
from swift.engine.answers import answers
from swift.engine.base import Request, Sampling
from swift.engine.load import make_engine, source_of
from swift.errors import ConfigError, ModelError
from swift.model.load import Quantization, load_model
from swift.model.quantized.base import Settings
from swift.model.quantized.linear import QuantizedLinear
from tests.quantize.checkpoints import make_checkpoint
from tests.tiny import make_model

SETTINGS = {
    "gptq": ("gptq", Settings("gptq", 4, 32, False)),
    "int8": ("compressed-tensors", Settings("int8", 8, strategy="channel", activations="dynamic")),
    "nf4": ("bnb", Settings("bnb", 4, 64, extra={"quant_type": "nf4", "double_quant": True})),
}


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    source = make_model(tmp_path_factory.mktemp("source") / "model", hidden_size=64, intermediate_size=128)
    folder = tmp_path_factory.mktemp("quantized")
    for name, (format, settings) in SETTINGS.items():
        make_checkpoint(source, folder / name, format, settings)
    return folder


def test_gradients_are_those_of_the_dense_model(quantized):
    ids = torch.arange(3, 40)[None]
    found = []
    for dense in (True, False):
        model = load_model(quantized / "gptq", dense=dense).model
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_trained_on_quantized_weights_and_answers(name, quantized, run):
    result = run(model=str(quantized / name), learning_rate=1e-2, max_steps=12)
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    options = {"adapters": [str(result.checkpoint)], "val_dataset": "none.jsonl"}
    source = source_of(build(InferConfig, ("argument", options)))
    assert any(isinstance(module, QuantizedLinear) for module in source.loaded.model.modules()) == (name != "nf4")
    ids = list(range(5, 25))
    with torch.no_grad():
        wanted = source.loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    request = Request(id="a", prompt=tuple(ids), sampling=Sampling(max_new_tokens=1, temperature=0, logprobs=0))
    (answer,) = answers(make_engine(source), [request])
    assert answer.token_ids == [wanted.argmax()]
    assert answer.logprobs[0].logprob == pytest.approx(wanted.max().item(), abs=2e-3)


@pytest.mark.parametrize("name", ["gptq", "int8"])
def test_an_adapter_is_merged_into_a_dense_model(name, quantized, run, tmp_path):
    from swift.api import merge_lora

    result = run(model=str(quantized / name), learning_rate=1e-2)
    merged = merge_lora(adapters=[str(result.checkpoint)], output_dir=str(tmp_path / "merged"))
    model = load_model(merged).model
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    ids = torch.arange(3, 40)[None]
    options = {"adapters": [str(result.checkpoint)], "val_dataset": "none.jsonl"}
    tuned = source_of(build(InferConfig, ("argument", options))).loaded.model
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tuned(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuner_type": "full"}, "are quantized .gptq.: --tuner_type full cannot train them"),
        ({"tuner_type": "llamapro"}, "--tuner_type llamapro cannot train them"),
        ({"init_weights": "pissa"}, "--init_weights pissa changes the frozen weights"),
    ],
)
def test_what_changes_the_frozen_weights_is_refused(options, message, quantized, run):
    with pytest.raises(ConfigError, match=message) as caught:
        run(model=str(quantized / "gptq"), **options)
    assert "\n" not in caught.value.message


def test_quantized_weights_are_not_quantized_again(quantized):
    with pytest.raises(ModelError, match=r"quantized already \(gptq\)") as caught:
        load_model(quantized / "gptq", quantization=Quantization(4, torch.float32))
    assert "--quant_method" in caught.value.hint
