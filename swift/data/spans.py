"""What of a conversation is trained: character spans of the rendered text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.data.records import Message, Record
from swift.data.template import ChatTemplate
from swift.errors import ConfigError, DataError

STRATEGIES = ("default", "last_round", "all")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` have loss weight ``weight``; of spans that overlap the later one counts."""

    start: int
    end: int
    weight: float


@dataclass(slots=True)
class Layout:
    """One example before it is tokenized. ``is_plain`` text gets the tokenizer's own first token (BOS); ``adds_end``
    appends the EOS token, trained with the weight of the last span.
    """

    text: str
    spans: list[Span] = field(default_factory=list)
    is_plain: bool = False
    adds_end: bool = False


@dataclass(frozen=True)
class LossScale:
    """Which assistant turns are trained: ``default`` (every one), ``last_round``, ``all`` (prompts too).

    ``+ignore_empty_think`` after it leaves empty thoughts, ``<think></think>``, out of the loss.
    """

    strategy: str
    ignores_empty_think: bool = False

    @staticmethod
    def parse(text: str) -> "LossScale":
        strategy, *others = text.split("+")
        if strategy == "ignore_empty_think":
            strategy, others = "default", ["ignore_empty_think", *others]
        if strategy not in STRATEGIES or others not in ([], ["ignore_empty_think"]):
            raise ConfigError(
                f"unknown loss_scale {text!r}",
                hint=f"known: {', '.join(STRATEGIES)}, each with or without +ignore_empty_think",
            )
        return LossScale(strategy, bool(others))

    def weight(self, message: Message, is_last: bool) -> float:
        """The weight of an assistant message; what the message itself says comes first."""
        if message.loss is False:
            return 0.0
        scale = 1.0 if message.loss_scale is None else message.loss_scale
        if message.loss is None and message.loss_scale is None and self.strategy == "last_round" and not is_last:
            return 0.0
        return scale


def chat_layouts(record: Record, template: ChatTemplate, loss_scale: LossScale) -> list[Layout]:
    """The conversation with the spans of its trained turns: one layout, or one for each trained turn if the template
    renders a turn differently once others follow.

    Spans come from the template's generation markers if it has them, else from rendering the messages up to a turn.
    They include the token that ends the turn and not the white space after it. Raises DataError if the answer cannot be
    found.
    """
    rendered = _Rendered(record, template)
    last = max((index for index, message in enumerate(record.messages) if message.role == "assistant"), default=-1)
    turns = {
        index: loss_scale.weight(message, index == last) for index, message in enumerate(record.messages) if message.role == "assistant"
    }
    if loss_scale.strategy == "all":
        whole = Span(0, len(rendered.whole), 1.0)
        marked = {index: weight for index, weight in turns.items() if weight != 1.0}
        spans = [rendered.span(index, weight) for index, weight in marked.items()]
        if None in spans:
            raise DataError("loss or loss_scale of a message cannot be used: the chat template rewrites earlier messages")
        return [Layout(rendered.whole, _finish([whole, *(span for span in spans if span)], rendered.whole, loss_scale))]
    trained = {index: weight for index, weight in turns.items() if weight > 0}
    spans = [rendered.span(index, weight) for index, weight in trained.items()]
    if None not in spans:
        return [_layout(rendered.whole, [span for span in spans if span], template, loss_scale)]
    layouts = []
    for index, weight in trained.items():
        part = _Rendered(record, template, index + 1)
        span = part.span(index, weight)
        if span is None:
            raise DataError(part.difference(index))
        layouts.append(_layout(part.whole, [span], template, loss_scale))
    return layouts


class _Rendered:
    """The first ``stop`` messages of a record as text, and where in it the turns are."""

    def __init__(self, record: Record, template: ChatTemplate, stop: int | None = None) -> None:
        self.template, self.tools, self.kwargs = template, record.tools, record.chat_template_kwargs
        self.messages = [message.for_template() for message in record.messages[:stop]]
        self.markers: list[tuple[int, int]] = []
        if template.has_generation:
            self.whole, self.markers = template.text_and_spans(self.messages, self.tools, self.kwargs)
        else:
            self.whole = self._text(self.messages)

    def _text(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        return self.template.text(messages, self.tools, prompt=prompt, kwargs=self.kwargs)

    def span(self, index: int, weight: float) -> Span | None:
        """Where the turn ``messages[index]`` is, or None if the text before or up to it is no prefix of the whole."""
        after = self.whole if index == len(self.messages) - 1 else self._text(self.messages[: index + 1])
        if not self.whole.startswith(after):
            return None
        if self.template.has_generation:
            start, end = self._marked(index)
        else:
            before = self._text(self.messages[:index], prompt=True)
            if not after.startswith(before):
                return None
            start, end = len(before), len(after)
        stripped = start + len(self.whole[start:end].rstrip())
        return Span(start, stripped if self.whole[start:stripped].endswith(self.template.ends) else end, weight)

    def _marked(self, index: int) -> tuple[int, int]:
        answers = [position for position, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(self.markers) != len(answers):
            raise DataError(
                f"the chat template marks {len(self.markers)} generated spans for {len(answers)} assistant messages",
                hint="its generation markers must enclose each assistant message once",
            )
        return self.markers[answers.index(index)]

    def difference(self, index: int) -> str:
        before = self._text(self.messages[:index], prompt=True)
        same = next((i for i, pair in enumerate(zip(before, self.whole, strict=False)) if pair[0] != pair[1]), len(self.whole))
        start = max(0, same - 30)
        return (
            f"the chat template renders the prompt of message {index + 1} as {before[start : same + 50]!r}, "
            f"but with the answer as {self.whole[start : same + 50]!r}: the answer cannot be found"
        )


def _layout(text: str, spans: list[Span], template: ChatTemplate, loss_scale: LossScale) -> Layout:
    """A layout; a last turn that no special token ends gets the EOS token, or the model would not learn to stop."""
    final = spans[-1] if spans else None
    if final is None or text[: final.end].endswith(template.ends) or text[final.end :].strip():
        return Layout(text, _finish(spans, text, loss_scale))
    end = max(len(text[: final.end].rstrip()), final.start)
    spans = [*spans[:-1], Span(final.start, end, final.weight)]
    return Layout(text[:end], _finish(spans, text, loss_scale), adds_end=True)


def _finish(spans: list[Span], text: str, loss_scale: LossScale) -> list[Span]:
    if not loss_scale.ignores_empty_think:
        return spans
    empty = [
        Span(span.start + found.start(), span.start + found.end(), 0.0)
        for span in spans
        for found in _EMPTY_THINK.finditer(text[span.start : span.end])
    ]
    return [*spans, *empty]


def plain_layout(record: Record, loss_scale: LossScale) -> Layout:
    """The contents joined with nothing between them, the assistant's trained, the EOS token at the end."""
    if record.tools or any(message.tool_calls for message in record.messages):
        raise DataError("the row has tools, which plain text cannot show", hint="use a chat template")
    text = ""
    spans: list[Span] = []
    last = len(record.messages) - 1
    for index, message in enumerate(record.messages):
        start, text = len(text), text + message.text()
        weight = loss_scale.weight(message, index == last) if message.role == "assistant" else 0.0
        if message.role != "assistant" and loss_scale.strategy == "all":
            weight = 1.0
        if weight:
            spans.append(Span(start, len(text), weight))
    return Layout(text, _finish(spans, text, loss_scale), is_plain=True, adds_end=True)
