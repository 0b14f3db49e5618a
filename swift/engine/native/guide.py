"""Grammars that an answer keeps to, by llguidance."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swift import deps
from swift.engine.base import Grammar
from swift.engine.native.grammar import library_text
from swift.errors import DataError, first_line

KEPT = 64  # grammars of earlier requests whose compiled form is kept


class Guides:
    """Compiled grammars for one tokenizer. ``vocabulary`` is the width of the logits, ``ends`` what may follow a whole answer."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = ends
        self._of_library: Any = None
        self._matchers: OrderedDict[Grammar, Any] = OrderedDict()

    def make(self, grammar: Grammar) -> "LlGuide":
        """A guide at its beginning. Raises DataError for a grammar that cannot be read."""
        library = deps.require("llguidance", extra="guided")
        if grammar not in self._matchers:
            if self._of_library is None:
                from llguidance.hf import from_tokenizer

                self._of_library = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=list(self._ends))
            try:
                matcher = library.LLMatcher(self._of_library, library_text(grammar, library.LLMatcher), log_level=0)
            except ValueError as problem:
                raise DataError(f"the {grammar.kind} cannot be read: {first_line(problem)}") from None
            if matcher.is_error():
                raise DataError(f"the {grammar.kind} cannot be read: {first_line(matcher.get_error())}")
            self._matchers[grammar] = matcher
            if len(self._matchers) > KEPT:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(grammar)
        return LlGuide(self._matchers[grammar].deep_copy(), lambda: self._matchers.pop(grammar, None))


class LlGuide:
    """One answer under a grammar.

    ``forget`` drops what is compiled of it: when the library gave up, that may be of no use for other answers, which share it.
    """

    def __init__(self, matcher: Any, forget: Callable[[], object]) -> None:
        self._matcher = matcher
        self._forget = forget

    def allowed(self, num_tokens: int) -> Tensor:
        """(num_tokens,) bool: what may come next."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return mask[:num_tokens] != 0

    def accept(self, token: int) -> None:
        """``token`` came next. Raises DataError if the library gave up."""
        if not self._matcher.consume_token(token):
            self._forget()
            raise DataError(f"the grammar does not take token {token}: {first_line(self._matcher.get_error())}")

    def end(self) -> None:
        """The answer ended. Raises DataError if only since the library gave up, after which it allows nothing but the end."""
        if self._matcher.is_error():
            self._forget()
            raise DataError(f"the grammar cannot be kept to: {first_line(self._matcher.get_error())}")

    def is_finished(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._matcher.is_stopped())
