"""Log-probabilities of given texts: what an engine that shows them offers beside answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from swift.errors import DataError


@dataclass(frozen=True)
class Text:
    """Token ids, of which those from ``start`` (at least 1) on are scored."""

    tokens: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        assert 1 <= self.start < len(self.tokens), "a text to score has a token before, and one to score"


@dataclass(frozen=True)
class Score:
    """Natural logarithms of the probabilities of the scored tokens; ``is_greedy`` if each was the likeliest at its place."""

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@runtime_checkable
class Scorer(Protocol):
    """Scores texts. Members are the native engine and transformers' forward pass, which is its reference."""

    def scores(self, texts: Sequence[Text]) -> Iterator[tuple[int, Score]]:
        """(index, score) of each of ``texts``, in the order in which they are done. DataError for one beyond the context.

        What texts have in common at their beginnings is computed once.
        """


def check_texts(texts: Sequence[Text], *, context: int, vocabulary: int) -> None:
    """DataError for a text that is longer than ``context`` tokens and the last one, which is only read, or has unknown tokens."""
    for number, text in enumerate(texts):
        if len(text.tokens) - 1 > context:
            raise DataError(
                f"text {number} has {len(text.tokens)} tokens, the model's context {context} and one to predict",
                hint="shorten it, or leave examples out of its prompt",
            )
        if not 0 <= min(text.tokens) <= max(text.tokens) < vocabulary:
            raise DataError(f"text {number} has tokens beyond the model's {vocabulary}")


def context_of(model: Any) -> int:
    """Most tokens that ``model`` computes in a row; very many if its configuration does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62)
