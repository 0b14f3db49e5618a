"""Errors of the API: OpenAI's object and status codes."""

import re
from typing import Any

import msgspec
from starlette.responses import JSONResponse

from swift.serve.protocol import REFUSED
from swift.serve.runtime import Faulty, NotTaken, Overloaded, TimedOut, Unavailable

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_PLACE = re.compile(r"^(?P<message>.*) - at (`key` in )?`\$(?P<place>[^`]*)`$", re.DOTALL)


class ApiError(Exception):
    """Becomes a response. ``param`` is the field that is at fault, ``code`` OpenAI's short name of the fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def unsupported(message: str, *, param: str | None = None) -> ApiError:
    """For a request that is well formed, but asks for what this model or this server cannot do."""
    return ApiError(400, message, param=param, code="unsupported_value")


def decoded(decoder: "msgspec.json.Decoder[Any]", body: bytes) -> Any:
    """The request in ``body``. Raises ApiError that names the field at fault."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as problem:
        raise _invalid(str(problem)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        raise ApiError(400, f"the body is no valid JSON: {problem}", code="invalid_json") from None


def of_runtime(problem: Exception) -> ApiError:
    """What the runtime raises, as a response."""
    if isinstance(problem, Overloaded):
        headers = {"Retry-After": str(problem.retry_after_s)}
        return ApiError(429, f"{problem}; come again in {problem.retry_after_s} s", code="rate_limit_exceeded", headers=headers)
    if isinstance(problem, Unavailable):
        return ApiError(503, str(problem), code="engine_unavailable", headers={"Retry-After": "5"})
    if isinstance(problem, TimedOut):
        return ApiError(504, str(problem), code="timeout")
    if isinstance(problem, Faulty):
        return ApiError(500, str(problem), code="engine_error")
    assert isinstance(problem, NotTaken)
    code = "context_length_exceeded" if "context" in str(problem) else "unsupported_value"
    return ApiError(400, str(problem), code=code)


def _invalid(text: str) -> ApiError:
    found = _PLACE.match(text)
    message, place = (found["message"], found["place"].lstrip(".")) if found else (text, "")
    if (unknown := _UNKNOWN.match(message)) is not None:
        name = unknown["name"]
        param = f"{place}.{name}" if place else name
        if not place and name in REFUSED:
            return ApiError(400, f"{name} is not available: {REFUSED[name]}", param=param, code="unsupported_parameter")
        return ApiError(400, f"unknown field {param}", param=param, code="unknown_parameter")
    if message.startswith("Object missing required field"):
        name = message.split("`")[1]
        param = f"{place}.{name}" if place else name
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    return ApiError(400, f"{place}: {message}" if place else message, param=place or None, code="invalid_value")
