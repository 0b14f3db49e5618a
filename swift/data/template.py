"""The chat template of a tokenizer: render messages to text, knowing what the template can and cannot do."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from swift.data import tools as tool_text
from swift.errors import ConfigError, DataError, ModelError
from swift.model.template import BUILT_IN

MARK = "marker-of-a-text"


class ChatTemplate:
    """A tokenizer with its template, or with ``chat_template``: a Jinja text or a built-in name.

    ``ends`` are the special tokens that can end a turn; ``texts_as_parts``: the template reads contents that are lists of parts
    alone, which is tried. Raises DataError if there is no template at all and ConfigError
    if ``enable_thinking`` is given to a template that does not read it.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None, enable_thinking: bool | None = None) -> None:
        self.tokenizer = text_tokenizer(tokenizer)
        self.source = self._find(chat_template)
        self.has_generation = "{% generation" in self.source or "{%- generation" in self.source
        self.reads_tools = "tool_calls" in self.source and "tools" in self.source
        self.arguments_as_text = False
        self.kwargs: dict[str, Any] = {}
        if enable_thinking is not None:
            if "enable_thinking" not in self.source:
                raise ConfigError(
                    "enable_thinking has no effect: the model's chat template does not read it",
                    hint="leave out --enable_thinking",
                )
            self.kwargs["enable_thinking"] = enable_thinking
        added = self.tokenizer.added_tokens_decoder.values()
        self.ends = tuple({*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)})
        self.texts_as_parts = False
        self.texts_as_parts = "image" in self.source and not self.shows(MARK, MARK)  # a loop over parts finds none in a text

    def shows(self, content: Any, text: str) -> bool:
        """Whether a message of this ``content`` is rendered with ``text`` in it."""
        try:
            return text in self.text([{"role": "user", "content": content}], prompt=True)
        except (DataError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return False

    def _find(self, chat_template: str | None) -> str:
        if chat_template is not None:
            if chat_template in BUILT_IN:
                return BUILT_IN[chat_template]
            if "{{" not in chat_template and "{%" not in chat_template:
                raise ConfigError(
                    f"chat_template {chat_template!r} is neither a Jinja text nor a known name",
                    hint=f"known: {', '.join(BUILT_IN)}",
                )
            return chat_template
        own = self.tokenizer.chat_template
        if not own:
            raise DataError(
                "the model's tokenizer has no chat template, so messages cannot be rendered",
                hint="give --chat_template chatml (or a Jinja text), or --use_chat_template false to join plain texts",
            )
        return own if isinstance(own, str) else str(self.tokenizer.get_chat_template())

    def text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The rendered text; ``prompt`` ends it where the assistant's answer begins."""
        return self._render(messages, tools, prompt, kwargs, want_spans=False)[0]

    def text_and_spans(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the character spans that the template's own generation markers enclose."""
        return self._render(messages, tools, False, kwargs, want_spans=True)

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Any, prompt: bool, kwargs: Any, *, want_spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        uses_tools = tools or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        if uses_tools and not self.reads_tools:
            messages, tools = tool_text.as_text(messages, tools), None
        try:
            return self._call(messages, tools, prompt, kwargs, want_spans)
        except TypeError as error:
            if self.arguments_as_text or not any(message.get("tool_calls") for message in messages):
                raise DataError(f"the chat template cannot render the messages: {error}") from None
            # Templates that join the arguments to a text want them as JSON text, as OpenAI sends them.
            self.arguments_as_text = True
        return self._render(messages, tools, prompt, kwargs, want_spans=want_spans)

    def _call(
        self, messages: Sequence[dict[str, Any]], tools: Any, prompt: bool, kwargs: Any, want_spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.texts_as_parts:
            messages = [_with_parts(message) for message in messages]
        if self.arguments_as_text:
            messages = [_with_argument_texts(message) for message in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=want_spans,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **self.kwargs, **(kwargs or {})},
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error}") from None
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if want_spans else []


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or that of a processor; ModelError unless it gives character offsets."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(inner, "is_fast", False):
        raise ModelError(
            f"the tokenizer {type(inner).__name__} gives no character offsets, which loss spans need",
            hint="use a model with a tokenizer.json",
        )
    return inner


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_argument_texts(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}
