"""Answers from a server with OpenAI's API, to questions as they are written: messages that the server renders, or plain text."""

import contextlib
import http.client
import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from swift import console
from swift.engine.base import Delta, Request, Sampling
from swift.engine.outside import reason_of
from swift.engine.remote import NAMES, Endpoint, read_key
from swift.errors import ConfigError, DataError, MachineError, SwiftError, near

WAIT_S = 0.02  # that a step waits for an answer
PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # before each further try
MOST_STOP_WORDS = 4  # that OpenAI's API takes


@dataclass(frozen=True, kw_only=True)
class Written(Request):
    """A request without token ids: ``messages`` for /chat/completions, or ``text`` for /completions."""

    prompt: tuple[int, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None


def body_of(model: str, request: Written) -> tuple[str, dict[str, Any]]:
    """(path, body) of the request; what the sampling leaves open is left to the server."""
    sampling, fresh = request.sampling, Sampling()
    body: dict[str, Any] = {"model": model, "max_tokens": sampling.max_new_tokens}
    for ours, theirs in NAMES.items():
        if (value := getattr(sampling, ours)) != getattr(fresh, ours):
            body[theirs] = value
    if sampling.stop_words:
        body["stop"] = list(sampling.stop_words[:MOST_STOP_WORDS])
    if request.text is not None:
        return "/completions", body | {"prompt": request.text}
    return "/chat/completions", body | {"messages": list(request.messages)}


class UrlEngine:
    """Has ``num_proc`` requests under way. A server that does not answer, or is overloaded, is asked again.

    A refusal ends the evaluation with what the server said, unless it has answered others before: then it is this request's alone,
    which has no answer. ``pauses_s`` are waited before further tries.
    """

    def __init__(self, endpoint: Endpoint, model: str, num_proc: int, pauses_s: tuple[float, ...] = PAUSES_S) -> None:
        self.model = model
        self._endpoint, self._pauses_s = endpoint, pauses_s
        self._threads = ThreadPoolExecutor(num_proc, thread_name_prefix="eval-url")
        self._arrived: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._under_way: set[str] = set()
        self._closed = threading.Event()
        self._has_answered = self._has_waited = False

    def add(self, request: Request) -> None:
        """See Engine. Takes Written requests alone."""
        assert isinstance(request, Written) and request.id not in self._under_way
        self._under_way.add(request.id)
        self._threads.submit(self._answer, request)

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return not self._under_way

    def step(self) -> list[Delta]:
        """See Engine."""
        deltas: list[Delta] = []
        while self._under_way:
            try:
                delta = self._arrived.get(timeout=0 if deltas else WAIT_S)
            except queue.Empty:
                break
            if delta.id in self._under_way:
                self._under_way.discard(delta.id)
                deltas.append(delta)
        return deltas

    def abort(self, id: str) -> None:
        """See Engine. What the server computes already is not read."""
        self._under_way.discard(id)

    def close(self) -> None:
        """See Engine."""
        self._under_way.clear()
        self._closed.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _answer(self, request: Written) -> None:
        if request.id not in self._under_way:
            return
        try:
            delta = _delta(request, self._ask(*body_of(self.model, request)))
            self._has_answered = True
        except DataError as problem:
            if self._has_answered:
                console.warn(f"a question has no answer: {problem}")
                delta = Delta(id=request.id, finish_reason="abort", stopped_by=str(problem))
            else:
                delta = Delta(id=request.id, finish_reason="abort", problem=problem)
        except SwiftError as problem:
            delta = Delta(id=request.id, finish_reason="abort", problem=problem)
        except Exception as problem:  # unseen, the answer would never end
            text = f"{self._endpoint.url} gave no answer that can be read: {type(problem).__name__}: {problem}"
            delta = Delta(id=request.id, finish_reason="abort", problem=MachineError(text))
        self._arrived.put(delta)

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        """The answer's JSON. The last MachineError if all tries fail."""
        for pause in (*self._pauses_s, None):
            try:
                return self._once(path, body)
            except MachineError as problem:
                if pause is None:
                    raise
                if not self._has_waited:  # said once, whatever many requests wait
                    self._has_waited = True
                    console.notice(f"{problem}; it is asked again, after pauses of up to {self._pauses_s[-1]:g} s")
                if self._closed.wait(pause):
                    raise
        raise AssertionError

    def _once(self, path: str, body: dict[str, Any]) -> Any:
        own, response = self._endpoint.send("POST", path, body)
        try:
            return json.load(response)
        except (OSError, ValueError, http.client.HTTPException) as problem:
            raise MachineError(f"{self._endpoint.url} broke off: {problem or type(problem).__name__}") from None
        finally:
            with contextlib.suppress(OSError):
                own.close()


def _delta(request: Written, said: Any) -> Delta:
    """The whole answer. Only the number of its tokens is known, which stands for them."""
    choice = said["choices"][0]
    message = choice["message"] if request.text is None else {"content": choice.get("text")}
    text, thinking = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
    reason = reason_of(choice.get("finish_reason")) or "stop"
    if cuts := [text.index(word) for word in request.sampling.stop_words if word in text]:
        text, reason = text[: min(cuts)], "stop"
    if thinking:  # which goes on past stop words
        text = f"<think>{thinking}</think>{text}"
    tokens = (-1,) * int((said.get("usage") or {}).get("completion_tokens") or 0)
    return Delta(id=request.id, text=text, token_ids=tokens, finish_reason=reason)


def remote_engine(config: Any) -> UrlEngine:
    """What asks the server of --eval_url; raises as ``served_at``."""
    return UrlEngine(*served_at(config), config.eval_num_proc)


def served_at(config: Any) -> tuple[Endpoint, str]:
    """The server of --eval_url, and which of its models is asked. ConfigError if it serves several others than the one that is named."""
    url = config.eval_url.rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(f"--eval_url {url} is no http or https address", hint="such as http://127.0.0.1:8000/v1")
    for end in ("/chat/completions", "/completions"):
        url = url.removesuffix(end)
    endpoint = Endpoint(url, read_key(config.eval_api_key, "eval_api_key"), config.remote_timeout_s, "eval")
    return endpoint, _served(endpoint, config)


def _served(endpoint: Endpoint, config: Any) -> str:
    wanted = config.models[0] if config.models else config.model
    names = endpoint.models()
    if wanted in names:
        return str(wanted)
    if len(names) == 1:
        if wanted is not None:
            console.notice(f"{endpoint.url} serves {names[0]}, which is asked as {wanted}")
        return names[0]
    match = near(wanted or "", names)
    what = f"not {wanted}" if wanted else f"{len(names)} models"
    raise ConfigError(
        f"{endpoint.url} serves {what}: there are {', '.join(names[:5])}",
        hint=f"did you mean {match}?" if match else "name one of them with --model",
    )
