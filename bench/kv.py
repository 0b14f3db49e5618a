"""How many requests fit into a fixed memory for keys and values: the native engine's paged cache, and one stretch a request.

    python bench/kv.py

A cache of --tokens tokens (23,301 are 1 GiB of SmolLM2-135M in float32, 46,080 bytes a token) is filled to the brim by the
real engine, with a tiny random model, since only lengths matter: --requests requests wait from the beginning, and as
many are under way as the cache lets. Lengths are those of alpaca: prompts and answers are drawn, each by itself, from
the deciles of the 999 rows of LLaMA-Factory's alpaca_en_demo.json as SmolLM2's chat template and tokenizer make them (on
average 49 and 151 tokens). With --prefix all prompts begin with so many more tokens in common, a system message.

`paged`: requests under way on average over the passes in which others wait, and the share of the cache's tokens that
they have filled (a prefix that all share counted once). `preemptions` give up blocks and are computed again; `computed` is the
tokens that were computed over those that had to be. `contiguous` is what fits where each request has room of its own for the
model's whole context (--context tokens, as a static cache or a slot has), `longest` where it has room for the longest
request of this load, which a server does not know; both are divisions.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer import apart
from startup import make_tiny_model

PROMPT_DECILES = (34, 38, 40, 41, 43, 45, 47, 50, 55, 63, 199)
ANSWER_DECILES = (2, 12, 20, 34, 65, 107, 162, 219, 291, 363, 595)


def lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """(tokens of the prompt, of the answer) of so many requests."""
    draw = random.Random(seed)

    def one(deciles: Sequence[int]) -> int:
        place = draw.random() * (len(deciles) - 1)
        low = deciles[int(place)]
        return round(low + (place % 1) * (deciles[int(place) + 1] - low))

    return [(one(PROMPT_DECILES), one(ANSWER_DECILES)) for _ in range(count)]


def fill(model: Path, load: Sequence[tuple[int, int]], *, tokens: int, prefix: int, shares: bool, seed: int) -> dict[str, float]:
    """What the engine does with all of ``load`` at once."""
    from swift.engine.base import Request, Sampling
    from swift.engine.native.engine import NativeEngine, NativeOptions
    from swift.model.load import load_model

    loaded = load_model(model, torch_dtype="float32", device="cpu")
    options = {"max_num_seqs": len(load), "max_num_tokens": 2048, "shares_prefixes": shares}
    one = NativeEngine(loaded, NativeOptions(**options)).runner.bytes_per_token()
    engine = NativeEngine(loaded, NativeOptions(kv_cache_bytes=tokens * one, **options))
    draw = random.Random(seed)
    vocabulary = loaded.model.config.vocab_size
    beginning = [draw.randrange(vocabulary) for _ in range(prefix)]
    for number, (prompt, answer) in enumerate(load):
        ids = (*beginning, *(draw.randrange(vocabulary) for _ in range(prompt)))
        sampling = Sampling(max_new_tokens=answer, temperature=0, ignore_eos=True)
        engine.add(Request(id=str(number), prompt=ids, sampling=sampling))
    scheduler, run = engine.scheduler, engine.runner.run
    computed: list[int] = []
    engine.runner.run = lambda step: (computed.append(sum(part.num_tokens for part in step.parts)), run(step))[1]  # type: ignore[method-assign]
    running: list[int] = []
    filled: list[float] = []
    finished = 0
    while not engine.is_idle:
        deltas = engine.step()
        finished += sum(delta.finish_reason is not None for delta in deltas)
        if scheduler.waiting:
            shared = prefix * (len(scheduler.running) - 1) if shares else 0
            running.append(len(scheduler.running))
            filled.append((sum(sequence.num_computed for sequence in scheduler.running) - shared) / tokens)
    assert finished == len(load)
    once = sum(prompt + prefix + answer - 1 for prompt, answer in load) - (prefix * (len(load) - 1) if shares else 0)
    return {
        "paged": sum(running) / len(running),
        "paged_most": max(running),
        "filled": sum(filled) / len(filled),
        "preemptions": scheduler.num_preemptions,
        "computed": sum(computed) / once,
    }


def measure(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    load = lengths(args.requests, args.seed)
    longest = max(prompt + answer for prompt, answer in load) + args.prefix
    asked = {"tokens": args.tokens, "prefix": args.prefix}
    mean = sum(prompt + answer for prompt, answer in load) / len(load) + args.prefix
    about = {**asked, "requests": len(load), "mean_tokens": round(mean, 1), "longest": longest}
    slots = {"contiguous": args.tokens // args.context, "longest_known": args.tokens // longest}
    found = fill(model, load, **asked, shares=bool(args.prefix), seed=args.seed)
    return {**about, **slots, **{name: round(value, 3) for name, value in found.items()}}


def sentence(result: dict[str, Any], context: int) -> str:
    beginning = f", {result['prefix']} of them a beginning that all share" if result["prefix"] else ""
    return (
        f"Of requests of {result['mean_tokens']:.0f} tokens on average{beginning}, a cache of {result['tokens']:,} tokens holds"
        f" {result['paged']:.0f} at once, {result['filled']:.0%} of it filled; with room for {context:,} tokens each it holds"
        f" {result['contiguous']}, with room for the longest one ({result['longest']} tokens) {result['longest_known']}."
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=23301, help="tokens that the cache holds (default 23301)")
    parser.add_argument("--requests", type=int, default=600, help="requests of the load (default 600)")
    parser.add_argument("--context", type=int, default=8192, help="the model's whole context (default 8192, SmolLM2's)")
    parser.add_argument("--prefix", type=int, nargs="+", default=[0, 256], help="tokens all prompts share (default: 0, then 256)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prefixes: list[int] = args.prefix
    with tempfile.TemporaryDirectory(prefix="swift-bench-") as folder:
        model = apart(make_tiny_model, Path(folder) / "model")
        for prefix in prefixes:
            args.prefix = prefix
            result = apart(measure, model, args)
            print(json.dumps(result), flush=True)
            print(sentence(result, args.context), flush=True)


if __name__ == "__main__":
    main()
