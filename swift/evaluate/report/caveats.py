"""Where a result says little, or something else than it seems to."""

from collections import Counter
from collections.abc import Sequence

from swift.evaluate.base import Outcome
from swift.evaluate.report.schema import Guess, Result
from swift.evaluate.statistics import Estimate, finite

WIDE = 0.10  # half of an interval of a share
UNANSWERED = 0.02
ONE_ANSWER = 0.9
FEW = 30
# What was done to prompts, by the name of the note.
NOTES = {
    "shots_left_out": "prompts with fewer solved examples, so that they fit the model",
    "truncated": "prompts cut, so that they fit the model",
    "joined_to_question": "questions with an answer whose first token the tokenizer joins to the question, scored without that beginning",
    "system_in_question": "prompts whose system message stands before the question, since the template takes none",
    "prefix_left_out": "prompts without the words that an answer begins with, since servers take none",
}


def warnings(result: Result, outcomes: Sequence[Outcome], is_share: bool) -> list[str]:
    """Sentences for a reader, most important first."""
    found = []
    if result.value is None:
        found.append(f"no item has a value of {result.about.metric}")
    elif result.guess is not None:
        found += _against_guessing(result.value, result.guess)
    found += _same_answer(outcomes, result.guess)
    if result.items and result.unanswered / result.items > UNANSWERED:
        share = result.unanswered / result.items
        found.append(f"answers that could not be read, and count as wrong: {result.unanswered} ({share:.0%})")
    cut = sum(outcome.detail.get("finish_reason") == "length" for outcome in outcomes)
    if result.items and cut / result.items > UNANSWERED:
        found.append(f"answers cut off at the most tokens that they may have: {cut} ({cut / result.items:.0%})")
    if result.value is not None and not result.value.count:
        found.append(f"the number is that of {result.about.mode} as it stands, without items for an interval or a comparison")
    elif result.value is not None:
        found += _few(result.value, is_share)
        missing = len(outcomes) - len(finite(outcomes, result.about.metric))
        if missing:
            found.append(f"items without a finite value of {result.about.metric}, left out of its mean: {missing}")
    told = ((NOTES.get(name, name.replace("_", " ")), count) for name, count in result.notes.items() if name != "windows")
    found += [f"{what}: {count}" for what, count in told]
    return found


def _against_guessing(value: Estimate, guess: Guess) -> list[str]:
    if value.low is None or value.high is None:
        return []
    if guess.constant > guess.blind and value.low <= guess.constant:
        what = f"always answering {guess.answer!r}, which gets {guess.constant:.1%}"
        if value.low > guess.blind:
            return [f"not told apart from {what}" if value.high >= guess.constant else f"worse than {what}"]
    if value.high < guess.blind:
        return [f"below blind guessing, which gets {guess.blind:.1%}"]
    if value.low <= guess.blind:
        return [f"not told apart from blind guessing, which gets {guess.blind:.1%}"]
    return []


def _same_answer(outcomes: Sequence[Outcome], guess: Guess | None) -> list[str]:
    given = Counter(outcome.prediction for outcome in outcomes if outcome.prediction is not None)
    if guess is None or len(outcomes) < FEW or not given:
        return []
    answer, count = given.most_common(1)[0]
    share = count / len(outcomes)
    return [f"{share:.0%} of the answers are {answer.strip()!r}"] if share >= max(ONE_ANSWER, guess.constant + 0.1) else []


def _few(value: Estimate, is_share: bool) -> list[str]:
    if value.low is None or value.high is None:
        return ["too few items for an interval"]
    half = (value.high - value.low) / 2
    if is_share and half > WIDE:
        return [f"only {value.count} items: the interval reaches {half * 100:.0f} points to either side"]
    if value.clusters < FEW and not is_share:
        return [f"only {value.clusters} items: the interval itself is uncertain"]
    return []
