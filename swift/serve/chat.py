"""POST /v1/chat/completions: messages to a prompt, tokens to messages."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swift.data.template import ChatTemplate
from swift.engine.base import Delta, Logprob, Media, Request, Sampling
from swift.engine.logprobs import Spell, content_of
from swift.errors import ConfigError, DataError
from swift.serve import limits
from swift.serve.errors import unsupported
from swift.serve.images import Pictures, images_of
from swift.serve.protocol import (
    AssistantMessage,
    ChatRequest,
    DeveloperMessage,
    ImagePart,
    Message,
    NamedTool,
    OnlyPart,
    RefusalPart,
    TextPart,
    Tool,
    ToolMessage,
)
from swift.serve.reasoning import ReasoningReader, tags_of
from swift.serve.tools import CallArguments, CallBegins, Event, ToolFormat, ToolReader, tool_format


@dataclass(frozen=True)
class Chat:
    """A chat request made ready: ``requests`` share a prompt, one for each of ``n`` answers."""

    id: str
    model: str
    requests: tuple[Request, ...]
    make_reader: Callable[[], "AnswerReader"]


class ChatRenderer:
    """Messages to prompts with the model's own template. What depends on the template alone is found once."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None,
        processor: Any = None,
        max_images: int = limits.MOST_IMAGES,
        max_pixels: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template: ChatTemplate | None = None
        self.fault: str | None = None
        try:
            self.template = ChatTemplate(tokenizer, chat_template=chat_template)
        except DataError as problem:
            self.fault = str(problem)
        self.pictures: Pictures | None = None
        if processor is not None:
            self.pictures = Pictures(processor, self.template, most=max_images, max_pixels=max_pixels)
        self.thought_tags = tags_of(self.template.source) if self.template else None
        self._tool_format: ToolFormat | None = None

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        kwargs: dict[str, Any] | None = None,
        continues: bool = False,
        opens_answer: bool = True,
    ) -> tuple[tuple[int, ...], Media | None]:
        """Token ids and images of ``messages`` up to where the answer begins, or, if it ``continues``, to where the last one ends."""
        if self.template is None:
            raise unsupported(f"{self.fault}: use /v1/completions", param="messages")
        if images := images_of(messages):
            if self.pictures is None:
                raise unsupported("the model reads text only: there is an image in the messages", param=images[0][0])
            self.pictures.check(images)
        given, prefix = list(messages), ""
        if continues:
            prefix = _text(given.pop().content)
            if not given:
                raise unsupported("continue_final_message needs a message before the last one", param="messages")
        listed = [_plain(tool) for tool in tools] if tools else None
        template = ChatTemplate(self.tokenizer, chat_template=self.chat_template)  # it learns from a request what others need not have
        try:
            text = template.text([as_dict(message) for message in given], listed, prompt=opens_answer, kwargs=kwargs) + prefix
        except (DataError, ConfigError) as problem:
            raise unsupported(str(problem), param="messages") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError) as problem:
            message = f"the chat template cannot render the messages: {type(problem).__name__}"
            raise unsupported(message, param="messages") from None
        if self.pictures is None:
            return self.to_ids(text, "messages", add_special_tokens=False), None
        self._check_length(text, "messages")
        return self.pictures.ready(text, images) if images else (self.pictures.prompts.to_ids(text), None)

    def to_ids(self, text: str, param: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of ``text``. Raises ApiError if it is so long that finding them would take too much memory."""
        self._check_length(text, param)
        return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def _check_length(self, text: str, param: str) -> None:
        if len(text) > limits.MOST_CHARACTERS:
            raise unsupported(f"the text has {len(text)} characters, {limits.MOST_CHARACTERS} at most", param=param)

    def tool_format(self) -> ToolFormat:
        """How the model writes calls."""
        if self._tool_format is None:
            assert self.template is not None
            try:
                self._tool_format = tool_format(self.template)
            except DataError as problem:
                raise unsupported(str(problem), param="tools") from None
        return self._tool_format

    def ready(self, request: ChatRequest, *, adapter: str | None) -> Chat:
        """Raises ApiError for what cannot be rendered or honoured."""
        kwargs = dict(request.chat_template_kwargs or {})
        if request.reasoning_effort is not None:
            if self.template is None or "reasoning_effort" not in self.template.source:
                raise unsupported("reasoning_effort has no effect: the model's chat template does not read it", param="reasoning_effort")
            kwargs["reasoning_effort"] = request.reasoning_effort
        tools = request.tools if request.tool_choice != "none" else None
        continues = bool(request.continue_final_message)
        prompt, media = self.prompt(request.messages, tools, kwargs=kwargs, continues=continues)
        form = self.tool_format() if tools else None
        grammar = request.answer_grammar()
        if form is not None and request.forces_call:
            chosen = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
            wanted = [_plain(tool)["function"] for tool in tools or [] if chosen in (None, tool.function.name)]
            grammar = form.grammar(wanted, several=chosen is None and request.parallel_tool_calls is not False)
        sampling = request.sampling(
            max_new_tokens=request.max_completion_tokens or request.max_tokens or 2**31 - 1,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            grammar=grammar,
            keeps_tags=form is not None,
        )
        id = f"chatcmpl-{uuid.uuid4().hex}"
        names = [tool.function.name for tool in tools or []]
        tags = self.thought_tags
        end = self.tokenizer.decode(prompt[-16:])

        def make_reader() -> "AnswerReader":
            thoughts = ReasoningReader(tags, end) if tags is not None else None
            return AnswerReader(
                thoughts, ToolReader(form, names) if form is not None else None, several=request.parallel_tool_calls is not False
            )

        return Chat(id, request.model, requests_of(id, prompt, sampling, request.n or 1, adapter, media), make_reader)


def requests_of(
    id: str, prompt: tuple[int, ...], sampling: Sampling, count: int, adapter: str | None, media: Media | None = None
) -> tuple[Request, ...]:
    """One request for each of ``count`` answers; with a seed each has its own."""
    made = []
    for index in range(count):
        seed = None if sampling.seed is None else sampling.seed + index
        made.append(Request(id=f"{id}:{index}", prompt=prompt, sampling=replace(sampling, seed=seed), adapter=adapter, media=media))
    return tuple(made)


class AnswerReader:
    """What an answer says, thinks and calls, while it is written."""

    def __init__(self, thoughts: ReasoningReader | None, tools: ToolReader | None, *, several: bool = True) -> None:
        self._thoughts = thoughts
        self._tools = tools
        self._several = several
        self.content = ""
        self.thought = ""
        self.calls: list[dict[str, Any]] = []

    def add(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """OpenAI's deltas of a message for what is certain after ``text`` too."""
        thought, said = self._thoughts.add(text) if self._thoughts else ("", text)
        if is_last and self._thoughts:
            last_thought, last_said = self._thoughts.end()
            thought, said = thought + last_thought, said + last_said
        events: list[Event] = [said] if said else []
        if self._tools is not None:
            events = self._tools.add(said) + (self._tools.end() if is_last else [])
        deltas: list[dict[str, Any]] = []
        if thought:
            self.thought += thought
            deltas.append({"reasoning_content": thought})
        for event in events:
            if (delta := self._of(event)) is not None:
                deltas.append(delta)
        return deltas

    def _of(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, str):
            self.content += event
            return {"content": event}
        if event.index > 0 and not self._several:
            return None
        if isinstance(event, CallBegins):
            function = {"name": event.name, "arguments": ""}
            call: dict[str, Any] = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            self.calls.append(call)
            return {"tool_calls": [{"index": event.index, **call, "function": dict(function)}]}
        assert isinstance(event, CallArguments)
        self.calls[event.index]["function"]["arguments"] += event.text
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

    def message(self) -> dict[str, Any]:
        """The whole message."""
        made: dict[str, Any] = {"role": "assistant", "content": self.content if self.content or not self.calls else None, "refusal": None}
        if self.thought:
            made["reasoning_content"] = self.thought
        if self.calls:
            made["tool_calls"] = self.calls
        return made

    def finish_reason(self, reason: str) -> str:
        return "tool_calls" if self.calls and reason == "stop" else reason


async def whole(chat: Chat, deltas: AsyncIterator[Delta], spell: Spell) -> dict[str, Any]:
    """The response of a request that does not stream."""
    readers = [chat.make_reader() for _ in chat.requests]
    values: list[list[Logprob]] = [[] for _ in readers]
    reasons = [""] * len(readers)
    usage = Usage(len(chat.requests[0].prompt))
    async for delta in deltas:
        index = index_of(delta)
        usage.add(delta)
        readers[index].add(delta.text, is_last=delta.finish_reason is not None)
        values[index] += delta.logprobs
        if delta.finish_reason is not None:
            reasons[index] = readers[index].finish_reason(delta.finish_reason)
    wants_logprobs = chat.requests[0].sampling.logprobs is not None
    choices = [
        {
            "index": index,
            "message": reader.message(),
            "logprobs": logprobs_of(values[index], spell) if wants_logprobs else None,
            "finish_reason": reasons[index],
        }
        for index, reader in enumerate(readers)
    ]
    return {
        "id": chat.id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": chat.model,
        "choices": choices,
        "usage": usage.body(),
    }


async def chunks(chat: Chat, deltas: AsyncIterator[Delta], spell: Spell, *, includes_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream; with ``includes_usage`` the last one has the usage and no choices."""
    readers = [chat.make_reader() for _ in chat.requests]
    usage = Usage(len(chat.requests[0].prompt))
    head = {"id": chat.id, "object": "chat.completion.chunk", "created": int(time.time()), "model": chat.model}
    wants_logprobs = chat.requests[0].sampling.logprobs is not None

    def chunk(index: int, delta: dict[str, Any], values: Sequence[Logprob] = (), reason: str | None = None) -> dict[str, Any]:
        logprobs = logprobs_of(values, spell) if wants_logprobs and values else None
        made = {**head, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}
        return {**made, "usage": None} if includes_usage else made

    for index in range(len(readers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for delta in deltas:
        index, reason = index_of(delta), delta.finish_reason
        usage.add(delta)
        parts = readers[index].add(delta.text, is_last=reason is not None)
        if not parts and delta.logprobs:
            parts = [{"content": ""}]  # its tokens are no text yet, but their log-probabilities are wanted
        for number, part in enumerate(parts):
            yield chunk(index, part, delta.logprobs if number == 0 else ())
        if reason is not None:
            yield chunk(index, {}, reason=readers[index].finish_reason(reason))
    if includes_usage:
        yield {**head, "choices": [], "usage": usage.body()}


class Usage:
    """Tokens of a request."""

    def __init__(self, num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self.num_completion = 0
        self.num_cached = 0

    def add(self, delta: Delta) -> None:
        self.num_completion += len(delta.token_ids)
        self.num_cached = max(self.num_cached, delta.num_cached)

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_completion,
            "total_tokens": self.num_prompt + self.num_completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


def index_of(delta: Delta) -> int:
    """Which of the ``n`` answers a delta belongs to."""
    return int(delta.id.rpartition(":")[2])


def logprobs_of(values: Sequence[Logprob], spell: Spell) -> dict[str, Any]:
    return {"content": content_of(values, spell), "refusal": None}


def as_dict(message: Message) -> dict[str, Any]:
    """The message as a chat template reads it."""
    if isinstance(message, AssistantMessage):
        made: dict[str, Any] = {"role": "assistant", "content": _text(message.content)}
        if message.reasoning_content is not None:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
    elif isinstance(message, ToolMessage):
        made = {"role": "tool", "content": _text(message.content), "tool_call_id": message.tool_call_id}
    else:
        role = "system" if isinstance(message, DeveloperMessage) else str(message.__struct_config__.tag)
        made = {"role": role, "content": _content(message.content)}
    if message.name is not None:
        made["name"] = message.name
    return made


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _content(content: Any) -> Any:
    """A text, or parts if there are images among them."""
    if isinstance(content, str) or not any(isinstance(part, ImagePart) for part in content):
        return _text(content)
    return [{"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text} for part in content]


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(
        part.text if isinstance(part, TextPart | OnlyPart) else part.refusal
        for part in content
        if isinstance(part, TextPart | OnlyPart | RefusalPart)
    )


def _plain(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}
