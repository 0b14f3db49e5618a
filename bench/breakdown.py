"""Where the time of a training step goes: products of matrices, attention, and the rest.

    python bench/breakdown.py --data alpaca.json
    python bench/breakdown.py --data alpaca.json --tokens 512

One step of LoRA (rank 8, all linear layers, float32) over random documents that have the lengths of the first --rows rows
of the data and as many trained tokens, in forward passes of up to --tokens tokens, in this process, under torch's
profiler: first the seconds without it, then the shares of self CPU time with it. Random documents share no beginnings.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from growth import documents, load_policy, parser_of
from rows import Counts, count, load_rows
from train import SNOW_ALERTS, resolve_model

GROUPS = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"),
    "attention, forward": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "attention, backward": ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",),
    "sums and exponentials": ("aten::amax", "aten::sub_", "aten::exp_", "aten::log", "aten::sum"),
    "gates": ("aten::silu", "aten::silu_backward", "aten::gelu", "aten::gelu_backward"),
    "copies and zeros": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index_select", "aten::clone"),
    "other arithmetic": ("aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::neg", "aten::addcmul", "aten::linalg_vector_norm"),
}
REST = "the rest: views, Python, autograd"


def rows_like(counts: Sequence[Counts], vocabulary: int) -> list[dict[str, Any]]:
    """Random documents with as many tokens, the last of which are trained."""
    examples = documents([one.real for one in counts], vocabulary)
    for example, one in zip(examples, counts, strict=True):
        labels = example["labels"].copy()
        labels[: one.real - one.supervised] = -100
        example["labels"] = labels
    return examples


def step(policy: Any, batches: Sequence[Any]) -> None:
    policy.model.zero_grad()
    for batch in batches:
        loss, _ = policy.cross_entropy(batch)
        loss.backward()


def shares(events: Sequence[Any]) -> dict[str, float]:
    """Self CPU microseconds of each group."""
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    result = dict.fromkeys([*GROUPS, REST], 0.0)
    for event in events:
        result[group_of.get(event.key, REST)] += event.self_cpu_time_total
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, default=SNOW_ALERTS, help="messages .jsonl, or alpaca or sharegpt .json")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="of a forward pass (default 1024)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoTokenizer

    from swift.data.collate import flat_batches
    from swift.train.steps import cut_by_tokens

    path = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    counts = [count(row.messages, tokenizer, args.max_length) for row in load_rows(args.data, "lora")[: args.rows]]
    policy = load_policy(args.model)
    examples = rows_like(counts, policy.inner.config.vocab_size)
    lengths = [one.real for one in counts]
    passes = cut_by_tokens(range(len(lengths)), lengths, args.tokens)
    batches = flat_batches([[examples[row] for row in part] for part in passes])
    step(policy, batches)  # warms up
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        step(policy, batches)
        seconds.append(time.perf_counter() - begin)
    with torch.profiler.profile(with_flops=True) as profile:
        step(policy, batches)
    events = profile.key_averages()
    parts = shares(events)
    print(f"{sum(lengths):,} tokens in {len(batches)} forward passes; seconds of a step: {', '.join(f'{one:.2f}' for one in seconds)}")
    total = sum(parts.values())
    print("| part | share of the time |\n|---|---|")
    for name, part in parts.items():
        print(f"| {name} | {part / total:.1%} |")
    products = [event for event in events if event.key in GROUPS["products of matrices"]]
    flops, spent = sum(event.flops for event in products), sum(event.self_cpu_time_total for event in products)
    print(f"products of matrices: {flops / spent / 1e3:.0f} GFLOP/s while they run")


if __name__ == "__main__":
    main()
