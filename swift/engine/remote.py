"""The engine that asks another machine: any server with OpenAI's /v1/completions that takes prompts as token ids."""

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from swift.engine.base import Delta, Grammar, Sampling
from swift.engine.outside import Answer, Taker, reason_of
from swift.engine.source import Source
from swift.engine.streamed import Put, StreamedEngine
from swift.errors import ConfigError, DataError, MachineError
from swift.files import explain_os_errors

KNOWN = frozenset(
    "min_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed grammar".split()
)
# OpenAI's names and, behind them, those that vLLM, SGLang and this project's server have added.
NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
}


@dataclass(frozen=True)
class Endpoint:
    """A server: ``url`` up to /v1, without a slash at the end."""

    url: str
    key: str | None
    timeout_s: float
    options: str = "remote"  # what the names of the options begin with, for messages

    def send(self, method: str, path: str, body: Any = None) -> tuple[socket.socket, http.client.HTTPResponse]:
        """An answer with status 200, whose body is not read, and its socket.

        Raises MachineError, DataError if the request is refused, ConfigError if the key is.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout_s)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            connection.connect()
            own = connection.sock
            connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status == 200:
                return own, response
            text = response.read(65536).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as problem:
            connection.close()
            raise MachineError(
                f"{self.url} does not answer: {problem or type(problem).__name__}", hint=f"see --{self.options}_url"
            ) from None
        connection.close()
        message = f"{self.url}{path}: status {response.status}: {_message(text)}"
        if response.status in (401, 403):
            raise ConfigError(message, hint=f"see --{self.options}_api_key")
        raise DataError(message) if response.status in (400, 404, 413, 422) else MachineError(message)

    def models(self) -> list[str]:
        """The names of the models that it serves."""
        own, response = self.send("GET", "/models")
        try:
            return [str(each["id"]) for each in json.load(response)["data"]]
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise MachineError(f"{self.url}/models gives no list of models: {problem}", hint="name the model") from None
        finally:
            own.close()


def body_of(model: str, answer: Answer) -> dict[str, Any]:
    """The request for ``answer``. What it leaves open is left to the server, whose model may have other settings than ours."""
    sampling, fresh = answer.request.sampling, Sampling()
    body: dict[str, Any] = {"model": model, "prompt": list(answer.request.prompt), "max_tokens": answer.room, "stream": True}
    for ours, theirs in NAMES.items():
        if (value := getattr(sampling, ours)) != getattr(fresh, ours):
            body[theirs] = value
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.stop_words:
        body["stop"] = list(sampling.stop_words)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.grammar is not None:
        body["structured_outputs"] = _structured(sampling.grammar)
    return body


def _structured(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind in ("choice", "json_schema"):
        return {"choice" if grammar.kind == "choice" else "json": json.loads(grammar.text)}
    return {"regex" if grammar.kind == "regex" else "grammar": grammar.text}


class _Reader:
    """Reads one answer in a thread. ``stop`` may come at any time."""

    def __init__(self, endpoint: Endpoint, model: str, answer: Answer, put: Put, encode: Callable[[str], list[int]]) -> None:
        self._endpoint, self._body, self._put, self._encode = endpoint, body_of(model, answer), put, encode
        self._id = answer.request.id
        self._socket: socket.socket | None = None
        self._is_stopped = False

    def run(self) -> None:
        if self._is_stopped:
            return
        try:
            self._socket, response = self._endpoint.send("POST", "/completions", self._body)
            for event in _events(response):
                delta = self._delta(event)
                self._put(delta)
                if delta.finish_reason is not None or self._is_stopped:
                    return
            self._put(MachineError(f"{self._endpoint.url} ended an answer without a reason"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException) as problem:
            self._put(MachineError(f"{self._endpoint.url} broke off: {problem or type(problem).__name__}"))
        except (MachineError, DataError, ConfigError) as problem:
            self._put(problem)
        finally:
            if self._socket is not None:
                self._socket.close()

    def stop(self) -> None:
        self._is_stopped = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    def _delta(self, event: dict[str, Any]) -> Delta:
        if "error" in event:
            raise MachineError(f"{self._endpoint.url}: {_message(json.dumps(event))}")
        if not event["choices"]:
            return Delta(id=self._id)
        (choice,) = event["choices"]
        text, reason = choice.get("text") or "", reason_of(choice.get("finish_reason"))
        ids = choice.get("token_ids")
        return Delta(
            id=self._id,
            text=text,
            token_ids=tuple(self._encode(text) if ids is None else ids),
            finish_reason=reason,
            stopped_by=choice.get("stop_reason") if reason == "stop" else None,
        )


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, up to [DONE]."""
    for line in response:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def _message(text: str) -> str:
    """What a server says of an error: the message inside OpenAI's form, or the beginning of the text."""
    try:
        said = json.loads(text)
        said = said.get("error", said)
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, AttributeError, TypeError):
        return text.strip()[:200] or "nothing more"


def read_key(given: str | None, option: str = "remote_api_key") -> str | None:
    """The key that ``option`` gives: itself, the first line of @FILE, or the environment variable of env:NAME."""
    if given is None:
        return None
    if given.startswith("@"):
        with explain_os_errors(Path(given[1:])):
            key = Path(given[1:]).read_text(encoding="utf-8").strip().split("\n")[0]
    else:
        key = os.environ.get(given[4:], "") if given.startswith("env:") else given
    if not key:
        raise ConfigError(f"--{option} {given} holds no key")
    return key


def make(source: Source) -> StreamedEngine:
    """As the options say. The model that they name gives tokenizer and chat template; its weights are not read."""
    config = source.config
    source.refuse_adapter("remote")
    url = config.remote_url.rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"--remote_url {url} is no http or https address", hint="such as http://127.0.0.1:8000/v1")
    endpoint = Endpoint(url, read_key(config.remote_api_key), config.remote_timeout_s)
    model = config.remote_model
    if model is None:
        names = endpoint.models()
        if len(names) != 1:
            raise ConfigError(f"{url} serves {len(names)} models: {', '.join(names[:5])}", hint="choose one with --remote_model")
        (model,) = names
    threads = ThreadPoolExecutor(config.max_batch_size or 16, thread_name_prefix="remote")
    tokenizer = source.tokenizer

    def encode(text: str) -> list[int]:
        """Tokens of a piece of text, where a server does not say them: their number is about right, no more."""
        return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def start(answer: Answer, put: Put) -> Callable[[], None]:
        reader = _Reader(endpoint, model, answer, put, encode)
        threads.submit(reader.run)
        return reader.stop

    taker = Taker("remote", source, KNOWN)
    return StreamedEngine(taker, source.max_model_len, start, lambda: threads.shutdown(wait=True, cancel_futures=True))
