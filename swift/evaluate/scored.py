"""Tasks that are answered by log-probabilities: which choice is the likeliest, and how likely a text is."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from swift.engine.base import Completion
from swift.engine.scoring import Score, Text
from swift.errors import ConfigError, DataError, near
from swift.evaluate.base import Asked, Example, Outcome
from swift.evaluate.declared import Declared, choices_of
from swift.evaluate.encode import Encoder, cut, fitted
from swift.evaluate.prompt import Prompt, render, value
from swift.evaluate.spec import Choosing, Reading


class Scored(NamedTuple):
    """What a metric of choices sees: their texts, log-probabilities, those without the question (if asked), and the right ones."""

    choices: Sequence[str]
    sums: Sequence[float]
    alone: Sequence[float]
    golds: Sequence[int]


def best(values: Sequence[float]) -> int:
    """The index of the largest, the first of several."""
    return max(range(len(values)), key=values.__getitem__)


def _acc(of: Scored) -> float:
    return float(best(of.sums) in of.golds)


def _acc_norm(of: Scored) -> float:
    """By the number of characters of a choice, as lm-eval does it."""
    return float(best([total / max(len(text), 1) for total, text in zip(of.sums, of.choices, strict=True)]) in of.golds)


def _acc_bytes(of: Scored) -> float:
    sizes = [max(len(text.encode()), 1) for text in of.choices]
    return float(best([total / size for total, size in zip(of.sums, sizes, strict=True)]) in of.golds)


def _acc_mutual_info(of: Scored) -> float:
    """log p(choice | question) - log p(choice), as in Askell et al. 2021 (arXiv:2112.00861), appendix."""
    return float(best([total - alone for total, alone in zip(of.sums, of.alone, strict=True)]) in of.golds)


def _probability(of: Scored) -> float:
    """What share of the probability of all choices the right ones have: MC2 of TruthfulQA (arXiv:2109.07958)."""
    most = max(of.sums)
    shares = [math.exp(total - most) for total in of.sums]
    return math.fsum(shares[gold] for gold in of.golds) / math.fsum(shares)


METRICS: dict[str, Callable[[Scored], float]] = {
    "acc": _acc,
    "acc_norm": _acc_norm,
    "acc_bytes": _acc_bytes,
    "acc_mutual_info": _acc_mutual_info,
    "probability": _probability,
}

SUMS = {"perplexity": "tokens", "word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes", "acc": ""}
"""Metrics of text, and what of a text its log-probability is divided by: sums over all texts, not means of theirs."""


def _check_metrics(declared: Declared, metrics: Sequence[str], known: Sequence[str]) -> None:
    for name in metrics:
        if name not in known:
            match = near(name, known)
            hint = f"did you mean {match!r}?" if match else f"known: {', '.join(known)}"
            raise ConfigError(f"task {declared.spec.name}: unknown metric {name!r} in mode {declared.settings.mode}", hint=hint)


class Choices:
    """Modes letter and choice: the log-probability of each choice after the question."""

    def __init__(self, declared: Declared, mode: Choosing, tokenizer: Any, max_model_len: int) -> None:
        _check_metrics(declared, mode.metrics, list(METRICS))
        self.declared, self.mode, self.about = declared, mode, declared.about
        self.encoder, self.max_model_len = Encoder(tokenizer), max_model_len
        self.asks_alone = "acc_mutual_info" in mode.metrics
        # After a chat template's text an answer begins at once.
        self.delimiter = mode.delimiter if declared.chat is None else ""
        for example in self.examples():  # what is wrong in a row is told before anything is computed
            self._choices(example)
            declared.prompt(mode, example, self._questions(example)[0])

    def examples(self) -> Sequence[Example]:
        return self.declared.data.examples

    def _choices(self, example: Example) -> tuple[list[str], list[int]]:
        where = self.declared.where(example)
        choices, golds = choices_of(self.mode, self.declared.scope(example), where)
        if self.mode.contexts is None and not all(self.delimiter + choice for choice in choices):
            raise DataError(f"{where}: choice {choices.index('') + 1} of {len(choices)} is empty", hint="a choice needs a text")
        return choices, golds

    def _questions(self, example: Example) -> list[str]:
        """One for all choices, or one for each."""
        fields, where = self.declared.scope(example), self.declared.where(example)
        if self.mode.contexts is None:
            return [render(self.mode.prompt, fields, where)]
        found: list[str] = value(self.mode.contexts, fields, where)
        return found

    def requests(self, example: Example) -> Asked:
        """A text for each choice, then, for mutual information, one for each choice without the question."""
        mode, where = self.mode, self.declared.where(example)
        choices, _ = self._choices(example)
        questions, endings = self._questions(example), choices
        if mode.contexts is None:
            questions *= len(choices)
        else:
            endings = [render(mode.ending, self.declared.scope(example), where)] * len(choices)
        delimiter = self.delimiter
        notes: dict[str, Any] = {}
        shown: dict[str, str] = {}

        def encode(prompt: Prompt) -> list[Text]:
            for question in dict.fromkeys(questions):
                shown[question], more = self.declared.laid_out(prompt.with_question(question))
                notes.update(more)
            pairs = [(shown[question], delimiter + ending) for question, ending in zip(questions, endings, strict=True)]
            texts, num_joined = self.encoder.pairs(pairs + [("", delimiter + choice) for choice in choices if self.asks_alone])
            notes.update({"joined_to_question": num_joined} if num_joined else {})
            return texts

        prompt = self.declared.prompt(mode, example, questions[0])
        with _at(where):
            found = fitted(prompt, self.max_model_len, encode)
        return Asked("\n".join(shown.values()), found.texts, notes=notes | found.notes)

    def score(self, example: Example, asked: Asked, answer: Sequence[Score] | Completion) -> Outcome:
        assert not isinstance(answer, Completion)
        choices, golds = self._choices(example)
        count = len(choices)
        sums = [score.total for score in answer]
        of = Scored(choices, sums[:count], sums[count:], golds)
        detail: dict[str, Any] = {
            "choices": choices,
            "logprobs": sums[:count],
            "num_tokens": [len(score.logprobs) for score in answer[:count]],
            "is_greedy": [score.is_greedy for score in answer[:count]],
        }
        if self.asks_alone:
            detail["logprobs_alone"] = sums[count:]
        metrics = {name: METRICS[name](of) for name in self.mode.metrics}
        gold = " | ".join(choices[index] for index in golds)
        return _outcome(self.declared, example, asked, gold, choices[best(of.sums)], metrics, detail)


class Documents:
    """Mode perplexity: the log-probability of texts, long ones in several windows."""

    def __init__(self, declared: Declared, mode: Reading, tokenizer: Any, max_model_len: int) -> None:
        _check_metrics(declared, mode.metrics, list(SUMS))
        self.declared, self.mode, self.about = declared, mode, declared.about
        self.encoder, self.max_model_len = Encoder(tokenizer), max_model_len
        for example in self.examples():  # a text that is missing is told before anything is computed
            if not self._texts(example)[1]:
                raise DataError(f"{declared.where(example)}: the text is empty: there is nothing to score", hint="leave the row out")

    def examples(self) -> Sequence[Example]:
        return self.declared.data.examples

    def _texts(self, example: Example) -> tuple[str, str]:
        """What stands before the text, and the text."""
        fields, where = self.declared.scope(example), self.declared.where(example)
        return render(self.mode.context, fields, where), render(self.mode.text, fields, where)

    def requests(self, example: Example) -> Asked:
        context, text = self._texts(example)
        if not context:
            windows = self.encoder.document(text, self.max_model_len)
            return Asked(text, tuple(windows), notes={"windows": len(windows)} if len(windows) > 1 else {})
        with _at(self.declared.where(example)):
            (whole,), num_joined = self.encoder.pairs([(context, text)])
            kept = cut(whole, self.max_model_len)
        notes = {"truncated": len(whole.tokens) - len(kept.tokens)} if kept is not whole else {}
        notes |= {"joined_to_question": num_joined} if num_joined else {}
        return Asked(context + text, (kept,), notes=notes)

    def score(self, example: Example, asked: Asked, answer: Sequence[Score] | Completion) -> Outcome:
        """Sums of one text, of which a report makes perplexities: nats, and how many tokens, words and bytes."""
        assert not isinstance(answer, Completion)
        fields, where = self.declared.scope(example), self.declared.where(example)
        text = self._texts(example)[1]
        counted = text if self.mode.original is None else str(value(self.mode.original, fields, where))
        sizes = {
            "tokens": sum(len(score.logprobs) for score in answer),
            "words": len(re.split(r"\s+", counted)),
            "bytes": len(counted.encode()),
        }
        metrics = {"nll": -math.fsum(score.total for score in answer)}
        metrics |= {size: float(sizes[size]) for name in self.mode.metrics if (size := SUMS[name])}
        if "acc" in self.mode.metrics:
            metrics["acc"] = float(all(score.is_greedy for score in answer))
        return _outcome(self.declared, example, asked, text if self.mode.context else "", None, metrics, sizes)


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """A DataError says file and line."""
    try:
        yield
    except DataError as problem:
        raise DataError(f"{where}: {problem.message}", hint=problem.hint) from None


def _outcome(
    declared: Declared, example: Example, asked: Asked, gold: str, prediction: str | None, metrics: dict[str, float], detail: dict[str, Any]
) -> Outcome:
    if asked.notes:
        detail = {**detail, "notes": dict(asked.notes)}
    if declared.spec.cluster is not None:
        detail = {**detail, "cluster": str(value(declared.spec.cluster, declared.scope(example), declared.where(example)))}
    return Outcome(example.id, example.category, asked.prompt, gold, prediction, metrics, detail)
