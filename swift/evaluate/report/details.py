"""What outcomes say beside their metrics: scores of choices, notes on prompts, answers that could not be read."""

import math
from collections import Counter
from collections.abc import Sequence

from swift.evaluate.base import Outcome
from swift.evaluate.report.schema import Bin, Calibration, Guess

BINS = 10
MOST_CHOICES = 26  # more different right answers than this, or than one for ten items, say nothing about a constant answer


def scores(outcome: Outcome) -> list[tuple[str, float]] | None:
    """(choice, log-probability in nats) of each choice: ``detail["choices"]`` and ``detail["logprobs"]``; None if there are none."""
    choices, found = outcome.detail.get("choices"), outcome.detail.get("logprobs")
    if not isinstance(choices, list) or not isinstance(found, list) or len(choices) != len(found) or len(found) < 2:
        return None
    if not all(isinstance(value, int | float) for value in found):
        return None
    return list(zip(map(str, choices), found, strict=True))


def notes(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many items have each of the notes on their prompts (``detail["notes"]``)."""
    found: Counter[str] = Counter()
    for outcome in outcomes:
        given = outcome.detail.get("notes")
        found.update(key for key, value in given.items() if value) if isinstance(given, dict) else None
    return dict(found)


def guess(outcomes: Sequence[Outcome], metric: str) -> Guess | None:
    """What guessing gets where items have choices and ``metric`` is 0 or 1; else None.

    Where outcomes do not name the choices, few different right answers of many items are taken for them.
    """
    if not outcomes or any(outcome.metrics.get(metric) not in (0, 1) for outcome in outcomes):
        return None
    golds = Counter(outcome.gold for outcome in outcomes)
    choices = [outcome.detail.get("choices") for outcome in outcomes]
    sizes = [len(each) for each in choices if isinstance(each, list) and len(each) > 1]
    if len(sizes) < len(outcomes):
        if not 2 <= len(golds) <= min(MOST_CHOICES, len(outcomes) // 10):
            return None
        sizes = [len(golds)]
    blind = sum(1 / size for size in sizes) / len(sizes)
    answer, count = golds.most_common(1)[0]
    if len(golds) > min(MOST_CHOICES, len(outcomes) // 10):
        return Guess(blind, blind, "")
    return Guess(blind, count / len(outcomes), answer.strip())


def calibration(outcomes: Sequence[Outcome]) -> Calibration | None:
    """How far the probabilities that scores give to choices can be believed; None unless every item has scores of its right choice.

    Bins of equal width, as in Guo et al. 2017 (arXiv:1706.04599, eq. 3).
    """
    confidences: list[float] = []
    rights: list[bool] = []
    brier = 0.0
    for outcome in outcomes:
        found = scores(outcome)
        if not found or outcome.gold not in dict(found) or not all(math.isfinite(value) for _, value in found):
            return None
        highest = max(value for _, value in found)
        weights = [math.exp(value - highest) for _, value in found]
        total = sum(weights)
        confidences.append(1 / total)
        chosen = next(name for name, value in found if value == highest)
        rights.append(chosen == outcome.gold)
        brier += sum((weight / total - (name == outcome.gold)) ** 2 for weight, (name, _) in zip(weights, found, strict=True))
    if not confidences:
        return None
    bins = []
    for number in range(BINS):
        inside = [index for index, value in enumerate(confidences) if min(int(value * BINS), BINS - 1) == number]
        if inside:
            size = len(inside)
            bins.append(Bin(size, sum(confidences[i] for i in inside) / size, sum(rights[i] for i in inside) / size))
    error = sum(item.count * abs(item.confidence - item.accuracy) for item in bins) / len(confidences)
    return Calibration(bins, error, brier / len(confidences))
