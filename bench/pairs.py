"""The forward work of preference pairs: two answers to one prompt, side by side in one row, and as tools commonly do it.

    python bench/pairs.py --data dpo.json --max_length 1024

*padded*: transformers on the chosen and the rejected sequences of --batch pairs in one padded batch, logits at every
position, then the log-probability of each answer's tokens, as TRL and LLaMA-Factory do. *ours*: the same pairs in flat
rows of up to --tokens tokens; the prompt of a pair is computed once, the head runs at the answers alone. Both sides
are forward passes without gradient (what a reference model does) of one model in this process, in turn; both must come
to the same sum of log-probabilities.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from growth import load_policy, parser_of
from rows import Row, load_rows, whole_pairs
from torch.nn import functional as F
from train import resolve_model

Example = dict[str, Any]


def encode(row: Row, tokenizer: Any) -> list[Example]:
    """Token ids of both sides, and labels of their last messages."""
    prompt = tokenizer.apply_chat_template(row.messages[:-1], tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    sides = []
    for side in row.sides():
        text = tokenizer.apply_chat_template(side, tokenize=False).rstrip("\n")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        sides.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return sides


@torch.no_grad()
def padded(model: Any, pairs: Sequence[list[Example]], batch: int) -> tuple[float, int]:
    """(sum of the answers' log-probabilities, positions computed)."""
    total, positions = 0.0, 0
    for at in range(0, len(pairs), batch):
        part = pairs[at : at + batch]
        sides = [pair[0] for pair in part] + [pair[1] for pair in part]
        width = max(len(side["input_ids"]) for side in sides)
        ids = torch.zeros(len(sides), width, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for index, side in enumerate(sides):
            length = len(side["input_ids"])
            ids[index, :length], labels[index, :length] = torch.tensor(side["input_ids"]), torch.tensor(side["labels"])
            mask[index, :length] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:]
        chosen = logits.log_softmax(-1).gather(2, wanted.clamp_min(0)[..., None]).squeeze(-1)
        total += float((chosen * (wanted >= 0)).sum())
        positions += ids.numel()
    return total, positions


@torch.no_grad()
def flat(policy: Any, pairs: Sequence[list[Example]], tokens: int) -> tuple[float, int]:
    """The same by flat rows with shared beginnings."""
    from swift.data.collate import flat_batches
    from swift.train.steps import cut_by_tokens

    sizes = [len(pair[0]["input_ids"]) + len(pair[1]["input_ids"]) for pair in pairs]
    passes = cut_by_tokens(range(len(pairs)), sizes, tokens)
    total, positions = 0.0, 0
    batches = flat_batches([[side for pair in part for side in pairs[pair]] for part in passes])
    with policy.root(batches[0].root_ids):
        for batch in batches:
            total -= float(policy.cross_entropy(batch)[0])
            positions += batch.num_computed
    return total, positions


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="sharegpt .json with chosen and rejected")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2, help="pairs of a padded batch (default 2)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a flat row (default 1024)")
    parser.add_argument("--max_length", type=int, default=1024, help="longer pairs are left out (default 1024)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    rows = whole_pairs(load_rows(args.data, "dpo"), path, args.max_length)[: args.pairs]
    pairs = [encode(row, tokenizer) for row in rows]
    plain = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
    policy = load_policy(args.model)
    policy.model.eval()
    ways = {"padded": lambda: padded(plain, pairs, args.batch), "ours": lambda: flat(policy, pairs, args.tokens)}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, tuple[float, int]] = {}
    for repeat in range(args.repeats + 1):  # the first one warms up
        for name, way in ways.items():
            begin = time.perf_counter()
            found[name] = way()
            if repeat:
                spent[name].append(time.perf_counter() - begin)
    sums = torch.tensor([found[name][0] for name in ways])
    assert F.l1_loss(sums[:1], sums[1:]) < 1e-4 * sums.abs().max(), sums
    tokens = sum(len(side["input_ids"]) for pair in pairs for side in pair)
    print(f"{len(pairs)} pairs, {tokens:,} tokens, {args.threads} threads; log-probabilities {sums.tolist()}")
    print("| way | positions | seconds: least / median / most | tokens/s |\n|---|---|---|---|")
    for name, seconds in spent.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {found[name][1]:,} | {min(seconds):.2f} / {middle:.2f} / {max(seconds):.2f} | {tokens / middle:.0f} |")
    print(f"ours is {statistics.median(spent['padded']) / statistics.median(spent['ours']):.2f} times as fast")


if __name__ == "__main__":
    main()
