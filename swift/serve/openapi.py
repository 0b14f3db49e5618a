"""GET /openapi.json: what the routes take, from the definitions that read the requests, and what they answer."""

from collections.abc import Sequence
from typing import Any

import msgspec

from swift import __version__
from swift.serve import limits, shapes
from swift.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from swift.serve.responses import Called, CallOutput, ResponsesRequest, Said, Thought

BODIES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, "an answer to a conversation", shapes.CHAT),
    "/v1/completions": (CompletionRequest, "what follows a raw prompt", shapes.COMPLETION),
    "/v1/responses": (ResponsesRequest, "an answer, in OpenAI's newer form", shapes.RESPONSE),
    "/v1/embeddings": (EmbeddingRequest, "a vector for each text", shapes.EMBEDDINGS),
    "/v1/load_lora_adapter": (LoadAdapterRequest, "an adapter is loaded, and served under its name", shapes.MODEL),
    "/v1/unload_lora_adapter": (UnloadAdapterRequest, "an adapter is taken away", shapes.DELETED),
    "/tokenize": (TokenizeRequest, "token ids of a text or of messages", shapes.TOKENS),
    "/detokenize": (DetokenizeRequest, "the text of token ids", shapes.TEXT_OF_TOKENS),
}
ITEMS = (Said, Called, CallOutput, Thought)
REFERENCE = "#/components/schemas/{name}"
STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
READS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/models": ("the models that are served", shapes.MODELS),
    "/v1/models/{model}": ("one model", shapes.MODEL),
    "/health": ("whether the engine computes", shapes.HEALTH),
    "/ready": ("whether another request would be taken", shapes.READY),
    "/metrics": ("counts and times, in Prometheus' text form", shapes.TEXT),
    "/openapi.json": ("this description", {"type": "object"}),
}
STATUSES = {
    "400": "a request that cannot be read or honoured",
    "401": "no key, or a wrong one",
    "403": "an adapter, where none may be loaded",
    "404": "a model that is not served",
    "405": "the route does not take this method",
    "408": "a body that did not arrive in time",
    "413": "a body that is too large",
    "415": "a body that is not called JSON",
    "429": "too many requests wait",
    "431": "a head that is too large",
    "500": "the server, or the engine at this request, has made a mistake",
    "503": "the engine is not there",
    "504": "the answer took too long",
}
FOR_READING = ("400", "401", "405", "408", "413", "431", "500", "503")
HEADERS = {"401": "WWW-Authenticate", "405": "Allow", "429": "Retry-After", "503": "Retry-After"}
WITHOUT_KEY = ("/health", "/ready")


def document(models: Sequence[str], *, vocab_size: int, has_keys: bool, loads_adapters: bool) -> dict[str, Any]:
    """The OpenAPI description, version 3.1, of a server of ``models``. ``has_keys``: a request needs one."""
    bodies = {path: body for path, body in BODIES.items() if loads_adapters or not path.endswith("_adapter")}
    kinds = [kind for kind, _, _ in bodies.values()]
    schemas, components = msgspec.json.schema_components([*kinds, *ITEMS], ref_template=REFERENCE)
    components["ResponsesRequest"]["properties"]["input"] = _input(schemas[len(kinds) :])
    components["Said"]["required"].remove("type")
    token = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocab_size}
    for name, field, schema in (
        ("CompletionRequest", "prompt", _prompt(token)),
        ("EmbeddingRequest", "input", _prompt(token)),
        ("DetokenizeRequest", "tokens", {"type": "array", "items": token}),
    ):
        components[name]["properties"][field] = schema
    for name in ("ChatRequest", "CompletionRequest"):
        components[name]["properties"]["stop_token_ids"]["anyOf"][0]["items"] = token
    components["Error"] = shapes.ERROR
    for kind in kinds:
        properties: Any = components[kind.__name__]["properties"]
        if "model" in properties:
            names: Any = {"enum": list(models)}
            is_required = "model" in components[kind.__name__]["required"]
            properties["model"] = names if is_required else {"anyOf": [names, {"type": "null"}]}
    for name, rules in shapes.RULES.items():
        components[name] |= rules
    paths: dict[str, Any] = {}
    for (path, (_, summary, shape)), schema in zip(bodies.items(), schemas, strict=False):
        body: Any = {"required": True, "content": {"application/json": {"schema": schema}}}
        responses = _responses(path, shape, tuple(STATUSES))
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    for path, (summary, shape) in READS.items():
        one = path.endswith("{model}")
        responses = _responses(path, shape, FOR_READING + (("404",) if one else ()))
        paths[path] = {"get": {"summary": summary, "responses": responses}}
        if one:
            parameter = {"type": "string", "minLength": 1}
            paths[path]["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": parameter}]
        if path in WITHOUT_KEY:
            paths[path]["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {"title": "swift", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if has_keys else [],
    }


def _prompt(token: dict[str, Any]) -> dict[str, Any]:
    """A text, token ids, or several of these: what the type that reads them says only in part."""
    ids = {"type": "array", "minItems": 1, "items": token}
    several = {"type": "array", "minItems": 1, "maxItems": limits.MOST_PROMPTS, "items": {"anyOf": [{"type": "string"}, ids]}}
    return {"anyOf": [{"type": "string"}, ids, several]}


def _input(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That of the newer form, whose items are read later than the rest."""
    return {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"anyOf": list(items)}}]}


def _responses(path: str, shape: dict[str, Any], statuses: Sequence[str]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain" if shape is shapes.TEXT else "application/json": {"schema": shape}}
    if path in STREAMS:
        content["text/event-stream"] = {"schema": shapes.EVENT}
    made: dict[str, Any] = {"200": {"description": "done", "content": content}}
    for status in sorted(statuses):
        # Who asks for the state gets it in the same form when it is bad.
        own = path in WITHOUT_KEY and status == "503"
        wrong = shape if own else {"$ref": "#/components/schemas/Error"}
        made[status] = {"description": STATUSES[status], "content": {"application/json": {"schema": wrong}}}
        if status in HEADERS and not own:
            required = status in ("401", "405")
            made[status]["headers"] = {HEADERS[status]: {"required": required, "schema": {"type": "string"}}}
    return made
