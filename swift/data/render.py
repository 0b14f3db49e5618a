"""Records to token ids and labels, through the tokenizer's chat template and without code for any model."""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.data.records import Message, Record
from swift.data.spans import Layout, LossScale, Span, chat_layouts, plain_layout
from swift.data.template import ChatTemplate, text_tokenizer
from swift.errors import ConfigError, DataError

IGNORED = -100
OBJECTIVES = ("sft", "pt", "classify")


@dataclass(slots=True)
class Rendered:
    """Token ids, labels (-100 where not trained) and, only if some weight is not 1, the loss weight of each token."""

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


def render(
    record: Record,
    tokenizer: Any,
    *,
    objective: str = "sft",
    loss_scale: str = "default",
    use_chat_template: bool = True,
    chat_template: str | None = None,
    enable_thinking: bool | None = None,
) -> list[Rendered]:
    """One example, or one for each trained turn if the template rewrites history. See ``lay_out`` and ``tokenize``."""
    renderer = Renderer(
        tokenizer,
        objective=objective,
        loss_scale=loss_scale,
        use_chat_template=use_chat_template,
        chat_template=chat_template,
        enable_thinking=enable_thinking,
    )
    return renderer.tokenize(renderer.lay_out(record))


def render_prompt(
    messages: Sequence[Message | dict[str, Any]],
    tokenizer: Any,
    tools: list[dict[str, Any]] | None = None,
    *,
    use_chat_template: bool = True,
    chat_template: str | None = None,
    enable_thinking: bool | None = None,
    response_prefix: str = "",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """The ids of ``messages`` up to where the assistant's answer begins, ``response_prefix`` included."""
    dicts = [message.for_template() if isinstance(message, Message) else message for message in messages]
    if not use_chat_template:
        layout = Layout("".join(str(message["content"]) for message in dicts) + response_prefix, is_plain=True)
    else:
        template = ChatTemplate(tokenizer, chat_template=chat_template, enable_thinking=enable_thinking)
        layout = Layout(template.text(dicts, tools, prompt=True, kwargs=chat_template_kwargs) + response_prefix)
    return to_ids([layout], text_tokenizer(tokenizer))[0].input_ids


class Renderer:
    """The options of rendering, checked once for many records."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        objective: str = "sft",
        loss_scale: str = "default",
        use_chat_template: bool = True,
        chat_template: str | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {objective!r}", hint=f"known: {', '.join(OBJECTIVES)}")
        if not use_chat_template and (chat_template is not None or enable_thinking is not None):
            name = "chat_template" if chat_template is not None else "enable_thinking"
            raise ConfigError(f"{name} has no effect with use_chat_template false", hint=f"leave out --{name}")
        self.objective = objective
        self.loss_scale = LossScale.parse("all" if objective == "pt" else loss_scale)
        self.tokenizer = text_tokenizer(tokenizer)
        self.template: ChatTemplate | None = None
        has_template = bool(self.tokenizer.chat_template or chat_template)
        if use_chat_template and (objective != "pt" or has_template):
            self.template = ChatTemplate(tokenizer, chat_template=chat_template, enable_thinking=enable_thinking)

    def lay_out(self, record: Record) -> list[Layout]:
        """Text and trained spans. A pre-training row of one message is plain text with everything trained.

        Raises DataError if the row cannot be rendered.
        """
        if record.has_media():
            raise DataError("the row has images, videos or audios, but the tokenizer reads text only")
        if self.template is None or (self.objective == "pt" and len(record.messages) == 1):
            if self.objective == "pt" and len(record.messages) > 1 and self.template is None:
                raise DataError("pre-training on a conversation needs a chat template")
            return [plain_layout(record, self.loss_scale)]
        if self.objective == "classify":
            messages = [message.for_template() for message in record.messages]
            return [Layout(self.template.text(messages, record.tools, kwargs=record.chat_template_kwargs))]
        return chat_layouts(record, self.template, self.loss_scale)

    def tokenize(self, layouts: Sequence[Layout]) -> list[Rendered]:
        return to_ids(layouts, self.tokenizer)


def to_ids(layouts: Sequence[Layout], tokenizer: Any) -> list[Rendered]:
    """Tokenize ``layouts`` in one call and turn character spans into labels.

    A token belongs to a span if it starts in it. Where one token would lie across the start of a span (an answer that
    begins with a newline), the text is tokenized in pieces, as it is at inference.
    """
    if not layouts:
        return []
    batch = tokenizer(
        [layout.text for layout in layouts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    prefix = _first_tokens(tokenizer) if any(layout.is_plain for layout in layouts) else []
    made = []
    for layout, ids, offsets in zip(layouts, batch["input_ids"], batch["offset_mapping"], strict=True):
        weights = _weights(layout.spans, offsets)
        if weights is None:
            ids, weights = _in_pieces(layout, tokenizer)
        made.append(_rendered(layout, ids, weights, prefix, tokenizer.eos_token_id))
    return made


def _weights(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> list[float] | None:
    """The weight of each token, or None if a token lies across the start of a span."""
    weights = [0.0] * len(offsets)
    starts = [start for start, _ in offsets]
    for span in spans:
        first, end = bisect_left(starts, span.start), bisect_left(starts, span.end)
        if first and offsets[first - 1][1] > span.start:
            return None
        weights[first:end] = [span.weight] * (end - first)
    return weights


def _in_pieces(layout: Layout, tokenizer: Any) -> tuple[list[int], list[float]]:
    cuts = sorted({0, len(layout.text), *(span.start for span in layout.spans), *(span.end for span in layout.spans)})
    ids: list[int] = []
    weights: list[float] = []
    for start, end in itertools.pairwise(cuts):
        piece = tokenizer(layout.text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        weight = next((span.weight for span in reversed(layout.spans) if span.start <= start < span.end), 0.0)
        ids += piece
        weights += [weight] * len(piece)
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != layout.text:
        start = layout.spans[0].start
        raise DataError(
            f"the tokenizer joins the end of the prompt and the start of the answer in one token: "
            f"{layout.text[max(0, start - 20) : start + 20]!r}"
        )
    return ids, weights


def _rendered(layout: Layout, ids: list[int], weights: list[float], prefix: list[int], eos: int | None) -> Rendered:
    if layout.is_plain and ids[: len(prefix)] != prefix:
        is_trained = bool(weights) and weights[0] > 0
        ids, weights = [*prefix, *ids], [*([weights[0] if is_trained else 0.0] * len(prefix)), *weights]
    if layout.adds_end and eos is not None and (not layout.is_plain or ids[-1:] != [eos]):
        ids, weights = [*ids, eos], [*weights, layout.spans[-1].weight if layout.spans else 0.0]
    labels = [token if weight > 0 else IGNORED for token, weight in zip(ids, weights, strict=True)]
    is_weighted = any(weight not in (0.0, 1.0) for weight in weights)
    return Rendered(ids, labels, weights if is_weighted else None)


def _first_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    raise DataError("the tokenizer changes a text when it adds special tokens, so that plain text cannot be built")
