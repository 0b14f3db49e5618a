"""Bodies of requests: JSON, read by the type of the route."""

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from swift.serve.errors import ApiError, decoded
from swift.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from swift.serve.responses import ResponsesRequest

K = TypeVar("K")
REQUESTS = (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    ResponsesRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
DECODERS: dict[type, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in REQUESTS}


async def read_body(http: HttpRequest, kind: type[K]) -> tuple[K, int]:
    """The request in the body, and the body's size.

    A browser sends a body that is not called JSON for any page, without asking first, and says which page: that is refused.
    Nobody else has to call it by its name; `curl -d` does not.
    """
    kind_of_body = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind_of_body != "application/json" and ("origin" in http.headers or "sec-fetch-site" in http.headers):
        raise ApiError(415, "the body must be JSON: Content-Type: application/json", code="unsupported_media_type")
    body = await http.body()
    return decoded(DECODERS[kind], body), len(body)
