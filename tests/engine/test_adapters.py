"""LoRA adapters side by side, beside PEFT's own answers of each alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift.engine.answers import answers
from swift.engine.base import Request
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.errors import CheckpointError, DataError
from swift.model.load import Loaded
from tests.engine.test_native import GREEDY, loaded, random_prompts
from tests.families import build
from tests.tiny import make_tokenizer


def make_adapter(path, *, family="llama", seed=1, **options):
    """A random adapter in PEFT's files."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2", **options}
    model = get_peft_model(build(family, vocab_size=320, eos_token_id=2), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def alone(path, prompts, family="llama"):
    """Answers of PEFT's model, merged."""
    from peft import PeftModel

    model = build(family, vocab_size=320, eos_token_id=2)
    if path is not None:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    engine = NativeEngine(Loaded(model, make_tokenizer(), torch.device("cpu"), torch.float32, "test"), NativeOptions(shares_prefixes=False))
    return run(engine, prompts, [None] * len(prompts))


def run(engine, prompts, adapters):
    requests = [
        Request(id=str(number), prompt=tuple(prompt), sampling=GREEDY, adapter=adapter)
        for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True))
    ]
    return [answer.token_ids for answer in answers(engine, requests)]


@pytest.mark.parametrize("weights", [None, "float32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "phi3"])
def test_each_row_gets_its_adapter(tmp_path, family, weights):
    """One prompt for the model and two adapters, and others between, so that the cache of one must not serve another."""
    paths = {"a": make_adapter(tmp_path / "a", family=family), "b": make_adapter(tmp_path / "b", family=family, seed=2, use_rslora=True)}
    engine = NativeEngine(loaded(family), NativeOptions(block_size=4, max_num_tokens=9, weights=weights))
    for name, path in paths.items():
        engine.load_adapter(name, path)
    prompt, *others = random_prompts(4)
    prompts = [prompt, *others] * 3
    adapters = ["a", None, "b", "a", None, "b", "a", None, "b", "a", None, "b"]
    found = run(engine, prompts, adapters)
    for name in (None, "a", "b"):
        mine = [index for index, adapter in enumerate(adapters) if adapter == name]
        assert [found[index] for index in mine] == alone(paths.get(name), [prompts[index] for index in mine], family)
    assert len({tuple(found[index]) for index in (0, 4, 8)}) > 1  # the first prompt, three times
    assert run(engine, prompts, adapters) == found


def test_adapters_of_linear_layers_need_no_forward_pass_of_the_models_own(tmp_path, monkeypatch):
    engine = NativeEngine(loaded(), NativeOptions(weights="float32"))
    engine.load_adapter("a", make_adapter(tmp_path / "a"))
    prompts = random_prompts(3)
    expected = run(engine, prompts, ["a", None, "a"])
    monkeypatch.delattr(engine.runner.policy.decoder, "layers")
    assert run(engine, prompts, ["a", None, "a"]) == expected


def test_ranks_and_alphas_of_single_layers(tmp_path):
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 40}}
    path = make_adapter(tmp_path / "a", **options)
    engine = NativeEngine(loaded(), NativeOptions())
    engine.load_adapter("a", path)
    prompts = random_prompts(5)
    assert run(engine, prompts, ["a"] * 5) == alone(path, prompts)


def test_an_adapter_is_unloaded_and_another_gets_its_name(tmp_path):
    first, second = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", seed=2)
    engine = NativeEngine(loaded(), NativeOptions(block_size=4))
    prompts = random_prompts(3)
    engine.load_adapter("x", first)
    with pytest.raises(DataError, match="loaded already"):
        engine.load_adapter("x", second)
    assert run(engine, prompts, ["x"] * 3) == alone(first, prompts)
    engine.add(Request(id="on", prompt=tuple(prompts[0]), sampling=GREEDY, adapter="x"))
    with pytest.raises(DataError, match="1 requests under way use the adapter 'x'"):
        engine.unload_adapter("x")
    engine.abort("on")
    engine.unload_adapter("x")
    with pytest.raises(DataError, match="no adapter 'x' is loaded"):
        engine.unload_adapter("x")
    with pytest.raises(DataError, match="no adapter 'x' is loaded"):
        run(engine, prompts, ["x"] * 3)
    engine.load_adapter("x", second)
    assert run(engine, prompts, ["x"] * 3) == alone(second, prompts)
    assert run(engine, prompts, [None] * 3) == alone(None, prompts)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["lm_head"]}, "changes lm_head"),
        ({"target_modules": ["embed_tokens"]}, "holds .*lora_embedding"),
    ],
)
def test_what_is_not_plain_is_refused(tmp_path, options, reason):
    engine = NativeEngine(loaded(), NativeOptions())
    with pytest.raises(CheckpointError, match=reason) as problem:
        engine.load_adapter("a", make_adapter(tmp_path / "a", **options))
    assert "merge" in problem.value.hint
    assert run(engine, random_prompts(2), [None] * 2) == alone(None, random_prompts(2))


def test_what_does_not_fit_is_refused(tmp_path):
    engine = NativeEngine(loaded(hidden_size=64), NativeOptions())
    path = make_adapter(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"the adapter's .* is"):
        engine.load_adapter("a", path)
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.7.* which this model lacks"):
        NativeEngine(loaded(), NativeOptions()).load_adapter("a", path)
    save_file({name: tensor for name, tensor in tensors.items() if "lora_A" in name}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="a half of"):
        NativeEngine(loaded(), NativeOptions()).load_adapter("a", path)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="kind IA3"):
        engine.load_adapter("a", path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.load_adapter("a", tmp_path / "nothing")
