"""Requests of the API, as OpenAI documents them. What cannot be honoured here is in ``REFUSED``, each with its reason."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from swift.config.generate import MOST_LOGPROBS
from swift.engine.base import Grammar
from swift.serve import limits
from swift.serve.fields import (
    AtLeastOne,
    Count,
    Label,
    ResponseFormat,
    SamplingFields,
    Strict,
    StructuredOutputs,
    TextFormat,
    TokenId,
    check_free,
)

REFUSED = {
    "audio": "the model writes text only",
    "function_call": "tool_choice took its place",
    "functions": "tools took its place",
    "modalities": "the model writes text only",
    "prediction": "guesses are made by --num_speculative_tokens",
    "verbosity": "no model that is served reads it",
    "web_search_options": "nothing leaves this machine",
    "suffix": "the model was not trained to fill in",
    "previous_response_id": "answers are not stored; send the whole input",
    "conversation": "answers are not stored; send the whole input",
    "background": "answers are not stored",
    "include": "nothing is left out of an answer that could be included",
    "prompt": "no prompt templates are stored",
    "max_tool_calls": "there are no built-in tools",
    "dimensions": "the width of an embedding is the model's own",
}


class TextPart(Strict, tag_field="type", tag="text"):
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict, tag_field="type", tag="image_url"):
    image_url: ImageUrl


class RefusalPart(Strict, tag_field="type", tag="refusal"):
    refusal: str


class OnlyPart(Strict):
    """A part where there are no others."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[OnlyPart], Meta(min_length=1)]
Prompt = str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]


class CalledFunction(Strict):
    name: Annotated[str, Meta(min_length=1)]
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Strict, tag_field="role", tag="system"):
    content: str | Parts
    name: str | None = None


class DeveloperMessage(SystemMessage, tag_field="role", tag="developer"):
    """What newer clients call the system message."""


class UserMessage(Strict, tag_field="role", tag="user"):
    content: str | Annotated[list[TextPart | ImagePart], Meta(min_length=1)]
    name: str | None = None


class AssistantMessage(Strict, tag_field="role", tag="assistant"):
    content: str | Annotated[list[TextPart | RefusalPart], Meta(min_length=1)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(min_length=1)] | None = None
    annotations: list[Any] | None = None  # as OpenAI's client sends back what it was given
    audio: None = None
    function_call: None = None

    def __post_init__(self) -> None:
        check_free("annotations", self.annotations)


class ToolMessage(Strict, tag_field="role", tag="tool"):
    content: str | Parts
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(Strict):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        check_free("parameters", self.parameters)


class Tool(Strict):
    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Meta(min_length=1, max_length=128)]


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


def check_choice(tool_choice: Any, tools: Sequence[Any] | None) -> None:
    """ValueError for a ``tool_choice`` that has nothing to choose from."""
    if tool_choice not in (None, "none") and not tools:
        raise ValueError("tool_choice needs tools")


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions"""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_free("chat_template_kwargs", self.chat_template_kwargs)
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        check_choice(self.tool_choice, self.tools)
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or []]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of tools")
        if self.continue_final_message and not isinstance(self.messages[-1], AssistantMessage):
            raise ValueError("continue_final_message needs a last message from the assistant")
        if not isinstance(self.response_format, TextFormat | None) and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs both say what the answer must be: remove one")
        if self.forces_call and self.answer_grammar() is not None:
            raise ValueError("an answer cannot be a call and keep to a format too: remove tool_choice or the format")

    @property
    def forces_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def answer_grammar(self) -> Grammar | None:
        """What the text of the answer must be."""
        return grammar_of(self.response_format, self.structured_outputs)


def grammar_of(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> Grammar | None:
    """What these two fields ask an answer to be."""
    if structured_outputs is not None:
        return structured_outputs.as_grammar()
    if response_format is None or isinstance(response_format, TextFormat):
        return None
    schema = getattr(response_format, "json_schema", None)
    return Grammar("json_schema", '{"type": "object"}' if schema is None else json.dumps(schema.schema))


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions: a raw prompt, to which no chat template is applied"""

    model: str
    prompt: Prompt
    max_tokens: Count | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    add_special_tokens: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 leaves nothing to do without echo")
        if self.echo and self.stream:
            raise ValueError("echo is not available with stream: true")
        if self.best_of is not None and self.stream:
            raise ValueError("best_of is not available with stream: true")
        prompts_of(self.prompt)

    @property
    def num_drawn(self) -> int:
        """Answers that are computed for each prompt, of which the ``n`` best are given."""
        return max(self.n or 1, self.best_of or 1)


def prompts_of(given: str | list[Any]) -> list[str | list[int]]:
    """Each prompt, as text or as token ids. ValueError for a mixture of them."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(part, int) for part in given):
        return [list(given)]
    if len(given) > limits.MOST_PROMPTS:
        raise ValueError(f"there are {len(given)} prompts, {limits.MOST_PROMPTS} at most")
    if any(isinstance(part, int) for part in given):
        raise ValueError("prompts are texts, lists of token ids, or one list of token ids: not a mixture")
    return list(given)


class EmbeddingRequest(Strict):
    """POST /v1/embeddings"""

    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    user: Label | None = None

    def __post_init__(self) -> None:
        prompts_of(self.input)


class TokenizeRequest(Strict):
    """POST /tokenize: of a text, or of messages as the model sees them"""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        check_free("chat_template_kwargs", self.chat_template_kwargs)


class DetokenizeRequest(Strict, kw_only=True):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[TokenId]


class LoadAdapterRequest(Strict):
    """POST /v1/load_lora_adapter, as vLLM names it"""

    lora_name: Annotated[str, Meta(min_length=1)]
    lora_path: Annotated[str, Meta(min_length=1)]


class UnloadAdapterRequest(Strict):
    """POST /v1/unload_lora_adapter, as vLLM names it"""

    lora_name: Annotated[str, Meta(min_length=1)]
