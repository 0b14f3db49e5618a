"""What the routes answer, and rules of requests between fields, as JSON schemas for the description of the API."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
NULL: Schema = {"type": "null"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {"type": "object"}


def _object(optional: Schema | None = None, **fields: Schema) -> Schema:
    """An object of just these fields; ``optional`` ones may be left out."""
    return {"type": "object", "required": list(fields), "properties": {**fields, **(optional or {})}, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT)))
USAGE = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT, prompt_tokens_details=_object(cached_tokens=COUNT))
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": _list(COUNT)}
_CALL = _object(id=TEXT, type=_one_of("function"), function=_object(name=TEXT, arguments=TEXT))
_MESSAGE = _object({"reasoning_content": TEXT, "tool_calls": _list(_CALL)}, role=_one_of("assistant"), content=_or_null(TEXT), refusal=NULL)
_CHAT_LOGPROBS = _object(content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN)))), refusal=NULL)
EVENT = _object({"event": TEXT}, data=TEXT)
_FINISH = _one_of("stop", "length", "tool_calls")

CHAT = _object(
    id=TEXT,
    object=_one_of("chat.completion"),
    created=COUNT,
    model=TEXT,
    choices=_list(_object(index=COUNT, message=_MESSAGE, logprobs=_or_null(_CHAT_LOGPROBS), finish_reason=_FINISH)),
    usage=USAGE,
)
_RAW_LOGPROBS = _object(
    tokens=_list(TEXT),
    token_logprobs=_list(_or_null(NUMBER)),
    top_logprobs=_list(_or_null({"type": "object", "additionalProperties": NUMBER})),
    text_offset=_list(COUNT),
)
COMPLETION = _object(
    id=TEXT,
    object=_one_of("text_completion"),
    created=COUNT,
    model=TEXT,
    choices=_list(_object(index=COUNT, text=TEXT, logprobs=_or_null(_RAW_LOGPROBS), finish_reason=_one_of("stop", "length"))),
    usage=USAGE,
)
RESPONSE = _object(
    id=TEXT,
    object=_one_of("response"),
    created_at=COUNT,
    status=_one_of("completed", "incomplete"),
    error=NULL,
    incomplete_details=_or_null(_object(reason=TEXT)),
    instructions=_or_null(TEXT),
    max_output_tokens=_or_null(COUNT),
    model=TEXT,
    output=_list(ANY),
    parallel_tool_calls=FLAG,
    previous_response_id=NULL,
    store=FLAG,
    temperature=_or_null(NUMBER),
    top_p=_or_null(NUMBER),
    text=_object(format=ANY),
    tool_choice={"anyOf": [TEXT, ANY]},
    tools=_list(ANY),
    truncation=_one_of("disabled"),
    metadata=ANY,
    usage=_object(
        input_tokens=COUNT,
        input_tokens_details=_object(cached_tokens=COUNT),
        output_tokens=COUNT,
        output_tokens_details=_object(reasoning_tokens=COUNT),
        total_tokens=COUNT,
    ),
)
EMBEDDINGS = _object(
    object=_one_of("list"),
    data=_list(_object(object=_one_of("embedding"), index=COUNT, embedding={"anyOf": [_list(NUMBER), TEXT]})),
    model=TEXT,
    usage=_object(prompt_tokens=COUNT, total_tokens=COUNT),
)
TOKENS = _object({"token_strs": _list(TEXT)}, tokens=_list(COUNT), count=COUNT, max_model_len=_or_null(COUNT))
TEXT_OF_TOKENS = _object(prompt=TEXT)
MODEL = _object(id=TEXT, object=_one_of("model"), created=COUNT, owned_by=TEXT, max_model_len=_or_null(COUNT), parent=_or_null(TEXT))
DELETED = _object(id=TEXT, object=_one_of("model"), deleted={"const": True})
MODELS = _object(object=_one_of("list"), data=_list(MODEL))
_STATE = _one_of("starting", "ready", "restarting", "stopped")
HEALTH = _object(
    {"engine": TEXT, "max_model_len": _or_null(COUNT), "device": TEXT, "dtype": TEXT, "vocab_size": COUNT},
    status=_STATE,
    restarts=COUNT,
    requests=COUNT,
)
READY = _object(status={"anyOf": [_STATE, _one_of("full")]})


def _needs(field: str, *others: Schema) -> Schema:
    """Where ``field`` is given and not null, ``others`` hold as well."""
    return {"if": {"required": [field], "properties": {field: {"not": NULL}}}, "then": {"allOf": list(others)}}


def _given(field: str, value: Schema) -> Schema:
    return {"required": [field], "properties": {field: value}}


_STREAM_RULES = [
    _needs("stream_options", _given("stream", {"const": True})),
    {"properties": {"store": {"enum": [False, None]}}},
]
RULES: dict[str, Schema] = {
    "ChatRequest": {
        "allOf": [
            *_STREAM_RULES,
            {"if": _given("top_logprobs", {"type": "integer", "minimum": 1}), "then": _given("logprobs", {"const": True})},
            {"if": _given("tool_choice", {"not": {"enum": [None, "none"]}}), "then": _given("tools", {"not": NULL})},
        ]
    },
    "CompletionRequest": {
        "allOf": [
            *_STREAM_RULES,
            {"if": _given("max_tokens", {"const": 0}), "then": _given("echo", {"const": True})},
            {"if": _given("echo", {"const": True}), "then": {"properties": {"stream": {"enum": [False, None]}}}},
            _needs("best_of", {"properties": {"stream": {"enum": [False, None]}}}),
        ]
    },
    "ResponsesRequest": {
        "allOf": [
            {"if": _given("tool_choice", {"not": {"enum": [None, "none"]}}), "then": _given("tools", {"type": "array", "minItems": 1})}
        ]
    },
    "StructuredOutputs": {
        "oneOf": [_given(name, {"not": NULL}) for name in ("json", "regex", "choice", "grammar")],
    },
    "TokenizeRequest": {"oneOf": [_given(name, {"not": NULL}) for name in ("prompt", "messages")]},
}
