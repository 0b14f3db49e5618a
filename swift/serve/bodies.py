"""Bodies of requests: JSON, read by the type of the route."""

from functools import cache
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from swift.serve.errors import ApiError, decoded
from swift.serve.fields import Strict

K = TypeVar("K", bound=Strict)


@cache
def decoder(kind: Any) -> "msgspec.json.Decoder[Any]":
    """What reads requests of the type ``kind``."""
    return msgspec.json.Decoder(kind)


async def read_body(http: HttpRequest, kind: type[K]) -> tuple[K, int]:
    """The request in the body, and the body's size.

    A browser sends a body that is not called JSON for any page, without asking first, and says which page: that is refused.
    Nobody else has to call it by its name; `curl -d` does not.
    """
    kind_of_body = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind_of_body != "application/json" and ("origin" in http.headers or "sec-fetch-site" in http.headers):
        raise ApiError(415, "the body must be JSON: Content-Type: application/json", code="unsupported_media_type")
    body = await http.body()
    return decoded(decoder(kind), body), len(body)
