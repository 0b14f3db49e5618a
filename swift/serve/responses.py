"""POST /v1/responses: OpenAI's newer form, read into a chat request and written from its answer. Nothing is stored."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, convert

from swift.engine.base import Delta
from swift.serve.chat import AnswerReader, Chat, Usage
from swift.serve.fields import AtLeastOne, JsonObjectFormat, JsonSchema, Label, Metadata, Strict, TextFormat, check_free
from swift.serve.protocol import ChatRequest, Function, FunctionName, ReasoningEffort, check_choice


class InputText(Strict, tag_field="type", tag="input_text"):
    text: str


class OutputText(Strict, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Strict, tag_field="type", tag="input_image"):
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


class Said(Strict, tag_field="type", tag="message"):
    role: Literal["user", "system", "developer", "assistant"]
    content: str | Annotated[list[InputText | OutputText | InputImage], Meta(min_length=1)]
    id: str | None = None
    status: str | None = None


class Called(Strict, tag_field="type", tag="function_call"):
    call_id: str
    name: Annotated[str, Meta(min_length=1)]
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutput(Strict, tag_field="type", tag="function_call_output"):
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class Thought(Strict, tag_field="type", tag="reasoning"):
    summary: list[Any]
    id: str | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None


Item = Said | Called | CallOutput | Thought


class FlatTool(Function, kw_only=True):
    type: Literal["function"]


class FlatToolName(FunctionName):
    type: Literal["function"]


class FlatSchema(JsonSchema, tag_field="type", tag="json_schema"):
    pass


class TextOptions(Strict):
    format: TextFormat | JsonObjectFormat | FlatSchema | None = None


class Reasoning(Strict):
    effort: ReasoningEffort | None = None


class ResponsesRequest(Strict, kw_only=True):
    """POST /v1/responses"""

    model: str
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: AtLeastOne | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolName | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Metadata | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None  # clients send true by themselves; nothing is stored, and asking for it later says so

    def items(self) -> list[Item]:
        """The input as items. A message may leave out its type."""
        if isinstance(self.input, str):
            return [Said("user", self.input)]
        made: list[Item] = []
        for number, item in enumerate(self.input):
            typed = item if "type" in item else {"type": "message", **item}
            try:
                made.append(convert(typed, Item))
            except ValueError as problem:
                raise ValueError(f"input[{number}]: {problem}") from None
        return made

    def __post_init__(self) -> None:
        if not isinstance(self.input, str):
            check_free("input", self.input)
        check_choice(self.tool_choice, self.tools)
        self.items()

    def as_chat(self) -> ChatRequest:
        """The same as a chat request."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.items():
            _add(messages, item)
        if not messages:
            raise ValueError("the input holds no message")
        choice: Any = self.tool_choice
        if isinstance(choice, FlatToolName):
            choice = {"type": "function", "function": {"name": choice.name}}
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_nested(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": choice if self.tools else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        return convert({name: value for name, value in fields.items() if value is not None}, ChatRequest)

    def _format(self) -> Any:
        wanted = self.text.format if self.text else None
        if isinstance(wanted, FlatSchema):
            return {"type": "json_schema", "json_schema": {"name": wanted.name, "schema": wanted.schema, "strict": wanted.strict}}
        return {"type": "json_object"} if isinstance(wanted, JsonObjectFormat) else None


def _add(messages: list[dict[str, Any]], item: Item) -> None:
    if isinstance(item, Said):
        content: Any = item.content
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}
                if isinstance(part, InputImage)
                else {"type": "text", "text": part.text}
                for part in content
            ]
        messages.append({"role": item.role, "content": content})
    elif isinstance(item, Called):
        call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant":
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif isinstance(item, CallOutput):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})


def _nested(tool: FlatTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


class Writer:
    """A response while it is written: its events, and the whole at the end."""

    def __init__(self, asked: ResponsesRequest, chat: Chat) -> None:
        self._asked = asked
        self._usage = Usage(len(chat.requests[0].prompt))
        self._reader: AnswerReader = chat.make_reader()
        self._output: list[dict[str, Any]] = []
        self._open: str | None = None  # the kind of the last item of the output, while it is written
        self._number = 0
        self._head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        self._status = "in_progress"
        self._details: dict[str, str] | None = None

    def begin(self) -> list[dict[str, Any]]:
        return [self._event("response.created", response=self.body()), self._event("response.in_progress", response=self.body())]

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """The events of a delta; the last one's complete the response."""
        self._usage.add(delta)
        events: list[dict[str, Any]] = []
        for part in self._reader.add(delta.text, is_last=delta.finish_reason is not None):
            if "content" in part:
                events += self._text(part["content"])
            elif "reasoning_content" in part:
                events += self._thought(part["reasoning_content"])
            else:
                events += self._call(part["tool_calls"][0])
        if delta.finish_reason is not None:
            is_cut = delta.finish_reason == "length"
            events += self._close("incomplete" if is_cut else "completed")
            self._status = "incomplete" if is_cut else "completed"
            self._details = {"reason": "max_output_tokens"} if is_cut else None
            events.append(self._event(f"response.{self._status}", response=self.body()))
        return events

    def body(self) -> dict[str, Any]:
        """The response as it stands."""
        asked, usage = self._asked, self._usage
        done = self._status != "in_progress"
        return {
            **self._head,
            "status": self._status,
            "error": None,
            "incomplete_details": self._details,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": self._output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "text": {"format": {"type": "text"} if asked.text is None or asked.text.format is None else _as_given(asked.text.format)},
            "tool_choice": "auto" if asked.tool_choice is None else _as_given(asked.tool_choice),
            "tools": [_as_given(tool) for tool in asked.tools or []],
            "truncation": "disabled",
            "metadata": asked.metadata or {},
            "usage": {
                "input_tokens": usage.num_prompt,
                "input_tokens_details": {"cached_tokens": usage.num_cached},
                "output_tokens": usage.num_completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.num_prompt + usage.num_completion,
            }
            if done
            else None,
        }

    def _text(self, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self._open != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events += self._opened("message", {"type": "message", "role": "assistant", "content": []})
            self._last["content"].append(part)
            events.append(self._event("response.content_part.added", **self._place, content_index=0, part=dict(part)))
        self._last["content"][0]["text"] += text
        events.append(self._event("response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=[]))
        return events

    def _thought(self, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self._open != "reasoning":
            events += self._opened("reasoning", {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": ""}]})
        self._last["content"][0]["text"] += text
        events.append(self._event("response.reasoning_text.delta", **self._place, content_index=0, delta=text))
        return events

    def _call(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if "id" in part:
            events += self._close()
            item = {"type": "function_call", "call_id": part["id"], "name": part["function"]["name"], "arguments": ""}
            events += self._opened("function_call", item)
            return events
        self._last["arguments"] += part["function"]["arguments"]
        return [self._event("response.function_call_arguments.delta", **self._place, delta=part["function"]["arguments"])]

    def _opened(self, kind: str, item: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._close()
        prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs"}[kind]
        self._output.append({"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **item})
        self._open = kind
        events.append(self._event("response.output_item.added", output_index=len(self._output) - 1, item=_copied(self._last)))
        return events

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        if self._open is None:
            return []
        item, events = self._last, []
        item["status"] = status
        if self._open == "message":
            text = item["content"][0]["text"]
            events.append(self._event("response.output_text.done", **self._place, content_index=0, text=text, logprobs=[]))
            events.append(self._event("response.content_part.done", **self._place, content_index=0, part=dict(item["content"][0])))
        elif self._open == "function_call":
            name, arguments = item["name"], item["arguments"]
            events.append(self._event("response.function_call_arguments.done", **self._place, name=name, arguments=arguments))
        else:
            text = item["content"][0]["text"]
            events.append(self._event("response.reasoning_text.done", **self._place, content_index=0, text=text))
        events.append(self._event("response.output_item.done", output_index=len(self._output) - 1, item=_copied(item)))
        self._open = None
        return events

    @property
    def _last(self) -> dict[str, Any]:
        return self._output[-1]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._last["id"], "output_index": len(self._output) - 1}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


async def events(writer: Writer, deltas: AsyncIterator[Delta]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream."""
    for event in writer.begin():
        yield event
    async for delta in deltas:
        for event in writer.add(delta):
            yield event


async def whole(writer: Writer, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
    """The response of a request that does not stream."""
    async for delta in deltas:
        writer.add(delta)
    return writer.body()


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    content: Sequence[Any] | None = item.get("content")
    return {**item, "content": [dict(part) for part in content]} if content is not None else dict(item)


def _as_given(value: Any) -> Any:
    from msgspec import to_builtins

    return to_builtins(value)
