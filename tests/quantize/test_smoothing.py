"""int8 through the whole engine: range moves into what produces inputs, and the checkpoint predicts what the model does."""

import json

import pytest
import torch

from swift.config.commands import QuantizeConfig
from swift.config.options import build as build_config
from swift.export.run import run_export
from swift.model.load import load_model
from swift.model.tokenizer import load_tokenizer
from swift.quantize.tensors import Checkpoint
from tests.families import build
from tests.quantize.test_folds import GEMMA, LLAMA
from tests.tiny import make_tokenizer

SIZE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 512}
TEXTS = [{"text": f"Heavy snow is expected on day {n}: stay at home, and keep the roads free. " * 3} for n in range(24)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in TEXTS), encoding="utf-8")
    return path


def quantized(family, rows, tmp_path, **options):
    """(the model's folder, the checkpoint's)"""
    folder, out = tmp_path / "m", tmp_path / "q"
    build(family, **SIZE, bos_token_id=None, eos_token_id=2, pad_token_id=3).save_pretrained(folder)
    make_tokenizer(folder)
    given = {"model": str(folder), "dataset": [str(rows)], "output_dir": str(out), "device": "cpu", "max_length": 64}
    given |= {"quant_eval_samples": 4, **options}
    run_export(build_config(QuantizeConfig, ("argument", given)))
    return folder, out


def divergence(folder, out):
    """Of the checkpoint from the model on a text of the kind that calibrated, in nats a token."""
    ids = load_tokenizer(folder)(TEXTS[3]["text"] + "The roads are free again.", return_tensors="pt").input_ids
    with torch.inference_mode():
        before, after = (
            load_model(place, torch_dtype="float32", device="cpu").model(input_ids=ids).logits.log_softmax(-1) for place in (folder, out)
        )
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(("family", "producers"), [("llama", LLAMA), ("gemma3_text", GEMMA)])
def test_int8_moves_range_into_what_produces_inputs(family, producers, rows, tmp_path):
    """Norms are stored divided. Of a layer that produces inputs the scales are: its codes fill their range in every row."""
    folder, out = quantized(family, rows, tmp_path, quant_method="int8")
    before, after = (Checkpoint(sorted(place.glob("*.safetensors"))) for place in (folder, out))
    for producer in producers[::2]:
        name = f"model.layers.1.{producer}.weight"
        assert not torch.equal(before.read(name), after.read(name))
    codes, scales = (after.read(f"model.layers.1.{producers[3]}.{part}").float() for part in ("weight", "weight_scale"))
    ratio = (codes * scales).norm(dim=1) / before.read(f"model.layers.1.{producers[3]}.weight").norm(dim=1)
    assert codes.abs().amax(1).min() >= 127
    assert ratio.max() > 1.2 * ratio.min()
    assert divergence(folder, out) < 0.01
