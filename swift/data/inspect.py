"""Show encoded rows as a model sees them: what is trained, what is not, and what was cut or rejected."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from swift import console
from swift.data.encoded import Encoded
from swift.data.records import Rejected, reasons
from swift.data.render import IGNORED
from swift.data.spool import Joined
from swift.data.template import text_tokenizer
from swift.errors import DataError

_BARS = 40


def inspect(encoded: Encoded, tokenizer: Any, n: int = 3, *, rejected: Sequence[Rejected] = ()) -> None:
    """Print the first ``n`` rows, the lengths and the counts. ``rejected`` are rows that did not reach ``encoded``.

    On a terminal trained text is green and the rest dim; elsewhere trained text stands between ``[[`` and ``]]``.
    """
    if n < 0:
        raise DataError(f"{n} rows cannot be shown", hint="give 0 or more")
    tokenizer = text_tokenizer(tokenizer)
    for index in range(min(n, len(encoded))):
        example = encoded[index]
        sides = {"chosen": example["chosen"], "rejected": example["rejected"]} if encoded.is_paired else {"": example}
        for name, side in sides.items():
            _show(f"row {index + 1} of {len(encoded)}{' ' + name if name else ''}", side, tokenizer)
    _histogram(encoded)
    _summary(encoded, rejected)


def marked(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is trained. Joined, the pieces are the decoded text."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for index in range(1, len(input_ids) + 1):
        is_end = index == len(input_ids)
        if not is_end and (labels[index] == IGNORED) == (labels[start] == IGNORED):
            continue
        ids = [int(token) for token in input_ids[start:index]]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text, bool(labels[start] != IGNORED)))
        start = index
    return pieces


def _show(title: str, side: dict[str, Any], tokenizer: Any) -> None:
    pieces = marked(side["input_ids"], side["labels"], tokenizer)
    trained = int((np.asarray(side["labels"]) != IGNORED).sum())
    weights = side["weights"]
    facts: dict[str, Any] = {"tokens": len(side["input_ids"]), "trained": trained}
    if weights is not None:
        facts["weights"] = " ".join(f"{value:g}" for value in sorted({float(weight) for weight in weights}))
    plain = "".join(f"[[{text}]]" if is_trained else text for text, is_trained in pieces)
    if console.is_json():
        console.event("row", {"title": title, **facts, "text": plain})
        return
    console.say(title, **facts)
    if not console.is_terminal():
        console.say(plain)
        return
    from rich.text import Text

    shown = Text()
    for text, is_trained in pieces:
        shown.append(text, style="green" if is_trained else "dim")
    if console.is_main_rank():
        console.rich_console().print(shown)


def _histogram(encoded: Encoded) -> None:
    """How many examples have which length, in at most ten steps."""
    lengths = np.asarray(encoded.lengths)
    step = _round_up(max(1, int(lengths.max())) / 10)
    counts = Counter(int((length - 1) // step) for length in lengths)
    most = max(counts.values())
    bar = "#" if not console.is_terminal() or (sys.stdout.encoding or "").lower() != "utf-8" else "\u2588"
    rows = [
        (f"{index * step + 1} to {(index + 1) * step}", counts[index], bar * -(-counts[index] * _BARS // most))
        for index in range(min(counts), max(counts) + 1)
    ]
    console.table(("tokens", "examples", ""), rows, title="lengths")


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= value:
                return factor * power
        power *= 10


def _summary(encoded: Encoded, rejected: Sequence[Rejected]) -> None:
    stats = encoded.stats()
    lengths = np.asarray(encoded.lengths)
    middle, high = (int(np.percentile(lengths, share, method="higher")) for share in (50, 95))
    everything = Joined(rejected, encoded.rejected)
    rows = [
        ("examples", stats["examples"]),
        ("rows they come from", stats["rows"]),
        ("rejected rows", len(everything)),
        ("of them longer than max_length", stats["too_long"]),
        ("tokens of those", stats["tokens_too_long"]),
        ("rows cut to max_length", stats["truncated"]),
        ("tokens cut", stats["tokens_cut"]),
        ("rows split in pieces", stats["split"]),
        ("tokens", stats["tokens"]),
        ("trained tokens", stats["trained_tokens"]),
        ("share that is trained", f"{stats['trained_tokens'] / stats['tokens']:.1%}"),
        ("length: mean", stats["mean_length"]),
        ("length: median", middle),
        ("length: 95 %", high),
        ("length: longest", stats["max_length"]),
    ]
    console.table(("", "count"), rows, title="summary")
    if everything:
        console.table(("rows", "reason", "first"), reasons(everything), title="rejected")
