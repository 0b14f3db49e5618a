"""The routes. What they do with a request is in the module of each."""

import asyncio
import base64
import contextlib
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from swift.engine.base import Delta, Request
from swift.engine.logprobs import speller
from swift.serve import chat, completions, limits, responses
from swift.serve.adapters import AdapterShelf
from swift.serve.bodies import read_body
from swift.serve.chat import ChatRenderer
from swift.serve.errors import ApiError, of_runtime, unsupported
from swift.serve.fields import SamplingFields
from swift.serve.grammars import GrammarCheck
from swift.serve.guard import Guard
from swift.serve.images import check_media, images_of
from swift.serve.metrics import Clock, Metrics
from swift.serve.openapi import document
from swift.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    prompts_of,
)
from swift.serve.responses import ResponsesRequest
from swift.serve.runtime import REASONS, Overloaded, Runtime

T = TypeVar("T")
K = TypeVar("K")


class Api:
    """The state behind the routes. ``models``: the names of the model itself; adapters have names of their own."""

    def __init__(
        self,
        runtime: Runtime,
        renderer: ChatRenderer,
        *,
        models: Sequence[str],
        owned_by: str,
        request_timeout_s: float,
        has_keys: bool = False,
        adapter_root: Path | None = None,
    ) -> None:
        self.runtime = runtime
        self.renderer = renderer
        self.tokenizer = renderer.tokenizer
        self.models = list(models)
        self.shelf = AdapterShelf(runtime, models=self.models, root=adapter_root, describe=self._model)
        self.owned_by = owned_by
        self.request_timeout_s = request_timeout_s
        self.metrics = Metrics()
        self.has_keys = has_keys
        self.created = int(time.time())
        self.grammars = GrammarCheck()
        self._thread = ThreadPoolExecutor(1, "long-requests")  # one, so that many of them hold up each other alone
        self._images = ThreadPoolExecutor(1, "images")
        self._num_seeing = 0  # requests whose images are made ready, or wait for it
        self._media_bytes = 0  # of images of requests under way
        self._num_tokens = len(self.tokenizer)
        self.spell = speller(self.tokenizer)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.one_model, methods=["GET"]),
            *self.shelf.routes(),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.is_ready, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]

    async def chat(self, http: HttpRequest) -> Response:
        asked, size = await read_body(http, ChatRequest)
        adapter = self._adapter(asked.model)
        self._check(asked, asked.n or 1)
        made = await self._aside(size, lambda: self.renderer.ready(asked, adapter=adapter), sees=bool(images_of(asked.messages)))
        deltas = await self._begin(made.requests)
        if not asked.stream:
            return _json(await self._until_gone(http, chat.whole(made, deltas, self.spell)))
        begun = await self._begun(http, deltas)
        return _events(chat.chunks(made, begun, self.spell, includes_usage=asked.includes_usage))

    async def completions(self, http: HttpRequest) -> Response:
        asked, size = await read_body(http, CompletionRequest)
        adapter = self._adapter(asked.model)
        self._check(asked, asked.num_drawn * len(prompts_of(asked.prompt)))
        made = await self._aside(size, lambda: completions.ready(asked, self._to_ids, adapter=adapter))
        deltas = await self._begin(made.requests)
        if not asked.stream:
            return _json(await self._until_gone(http, completions.whole(made, deltas, self.tokenizer, self.spell)))
        begun = await self._begun(http, deltas)
        return _events(completions.chunks(made, begun, self.spell, includes_usage=asked.includes_usage))

    async def responses(self, http: HttpRequest) -> Response:
        asked, size = await read_body(http, ResponsesRequest)
        adapter = self._adapter(asked.model)
        try:
            as_chat = asked.as_chat()
        except ValueError as problem:
            raise unsupported(str(problem)) from None
        self._check(as_chat, 1)
        made = await self._aside(size, lambda: self.renderer.ready(as_chat, adapter=adapter), sees=bool(images_of(as_chat.messages)))
        writer, deltas = responses.Writer(asked, made), await self._begin(made.requests)
        if not asked.stream:
            return _json(await self._until_gone(http, responses.whole(writer, deltas)))
        begun = await self._begun(http, deltas)
        return _events(responses.events(writer, begun), names=True)

    async def embeddings(self, http: HttpRequest) -> Response:
        asked, size = await read_body(http, EmbeddingRequest)
        self._adapter(asked.model)
        self._check(None, 1)
        prompts = await self._aside(size, lambda: [self._to_ids(prompt, True, "input") for prompt in prompts_of(asked.input)])
        try:
            async with asyncio.timeout(self.request_timeout_s):
                vectors = await self._until_gone(http, self.runtime.embed(prompts))
        except TimeoutError:
            raise ApiError(504, f"the answer took longer than {self.request_timeout_s:g} s", code="timeout") from None
        except REASONS as problem:
            raise of_runtime(problem) from None
        listed = []
        for index, vector in enumerate(vectors):
            coded: Any = vector
            if asked.encoding_format == "base64":
                coded = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            listed.append({"object": "embedding", "index": index, "embedding": coded})
        count = sum(map(len, prompts))
        return _json({"object": "list", "data": listed, "model": asked.model, "usage": {"prompt_tokens": count, "total_tokens": count}})

    async def list_models(self, http: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in [*self.models, *self.runtime.adapters]]})

    async def one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["model"]
        self._adapter(name)
        return _json(self._model(name))

    async def tokenize(self, http: HttpRequest) -> Response:
        asked, size = await read_body(http, TokenizeRequest)
        if asked.model is not None:
            self._adapter(asked.model)

        def tokenized() -> Sequence[int]:
            if asked.prompt is not None:
                return self.renderer.to_ids(asked.prompt, "prompt", add_special_tokens=asked.add_special_tokens is not False)
            assert asked.messages is not None
            opens = asked.add_generation_prompt is not False
            return self.renderer.prompt(asked.messages, asked.tools, kwargs=asked.chat_template_kwargs, opens_answer=opens)[0]

        ids = await self._aside(size, tokenized, sees=bool(images_of(asked.messages or ())))
        made: dict[str, Any] = {"tokens": list(ids), "count": len(ids), "max_model_len": self.runtime.facts.get("max_model_len")}
        if asked.return_token_strs:
            made["token_strs"] = self.tokenizer.convert_ids_to_tokens(list(ids))
        return _json(made)

    async def detokenize(self, http: HttpRequest) -> Response:
        asked, size = await read_body(http, DetokenizeRequest)
        if asked.model is not None:
            self._adapter(asked.model)
        self._check_tokens("tokens", asked.tokens)
        return _json({"prompt": await self._aside(size, lambda: self.tokenizer.decode(asked.tokens))})

    async def openapi(self, http: HttpRequest) -> Response:
        return _json(
            document(
                [*self.models, *self.runtime.adapters],
                vocab_size=self._vocabulary,
                has_keys=self.has_keys,
                loads_adapters=self.shelf.root is not None,
            )
        )

    async def health(self, http: HttpRequest) -> Response:
        """200 while the engine computes or could."""
        facts = {"status": self.runtime.state, "restarts": self.runtime.num_restarts, "requests": self.runtime.num_requests}
        return _json({**facts, **self.runtime.facts}, 200 if self.runtime.is_healthy else 503)

    async def is_ready(self, http: HttpRequest) -> Response:
        """200 while another request would be taken."""
        is_full = self.runtime.num_requests >= self.runtime.max_requests
        return _json({"status": "full" if is_full else self.runtime.state}, 200 if self.runtime.is_healthy and not is_full else 503)

    async def show_metrics(self, http: HttpRequest) -> Response:
        runtime = self.runtime
        text = self.metrics.text(runtime.engine_facts, restarts=runtime.num_restarts, requests=runtime.num_requests)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def _adapter(self, model: str) -> str | None:
        """The adapter that the name of a model stands for; None for the model itself."""
        if model in self.models:
            return None
        if model not in self.runtime.adapters:
            known = ", ".join([*self.models, *self.runtime.adapters])
            raise ApiError(404, f"no model {model!r} is served: {known}", param="model", code="model_not_found")
        return model

    def _model(self, name: str) -> dict[str, Any]:
        made = {"id": name, "object": "model", "created": self.created, "owned_by": self.owned_by}
        return {
            **made,
            "max_model_len": self.runtime.facts.get("max_model_len"),
            "parent": self.models[0] if name in self.runtime.adapters else None,
        }

    async def _aside(self, size: int, work: Callable[[], T], *, sees: bool = False) -> T:
        """The result of ``work``; in a thread if it is about a body of a ``size`` that may take seconds, or ``sees`` images."""
        if size < limits.LONG_BODY_BYTES and not sees:
            return work()
        loop = asyncio.get_running_loop()
        if not sees:
            return await loop.run_in_executor(self._thread, work)
        if self._num_seeing >= limits.MOST_IMAGE_REQUESTS:
            raise of_runtime(Overloaded(f"{self._num_seeing} requests with images wait", 1))
        self._num_seeing += 1
        try:
            return await loop.run_in_executor(self._images, work)
        finally:
            self._num_seeing -= 1

    def _check(self, asked: SamplingFields | None, count: int) -> None:
        """Before the work of reading prompts: whether ``count`` more answers are possible now, and about tokens that exist."""
        try:
            self.runtime.check_room(count)
        except REASONS as problem:
            raise of_runtime(problem) from None
        if asked is not None:
            self._check_tokens("logit_bias", map(int, asked.logit_bias or ()))
            self._check_tokens("stop_token_ids", asked.stop_token_ids or ())

    def _check_tokens(self, param: str, tokens: Iterable[int]) -> None:
        most = max(tokens, default=0)
        if most >= self._vocabulary:
            raise unsupported(f"{param} has token {most}, the model {self._vocabulary} tokens", param=param)

    @property
    def _vocabulary(self) -> int:
        """Tokens that both the tokenizer and the weights have."""
        return min(self._num_tokens, int(self.runtime.facts.get("vocab_size", self._num_tokens)))

    def _to_ids(self, prompt: str | Sequence[int], add_special_tokens: bool, param: str = "prompt") -> tuple[int, ...]:
        """Token ids of a prompt that is a text or ids already, if it can fit the context at all."""
        if isinstance(prompt, str):
            ids = self.renderer.to_ids(prompt, param, add_special_tokens=add_special_tokens)
        else:
            self._check_tokens(param, prompt)
            ids = tuple(prompt)
        if not ids:
            raise unsupported("a prompt has no tokens", param=param)
        if (most := self.runtime.facts.get("max_model_len")) is not None and len(ids) > most:
            message = f"the prompt has {len(ids)} tokens, the model's context {most}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return ids

    async def _begin(self, requests: Sequence[Request]) -> AsyncGenerator[Delta]:
        """The deltas of ``requests``, whose grammar was found harmless."""
        if (grammar := requests[0].sampling.grammar) is not None:
            await self.grammars.check(grammar)
        check_media(requests[0], held_bytes=self._media_bytes, max_model_len=self.runtime.facts.get("max_model_len"))
        return self._generate(requests)

    async def _generate(self, requests: Sequence[Request]) -> AsyncGenerator[Delta]:
        """Deltas, timed and counted. Raises ApiError."""
        prompts = {request.id.rpartition(":")[0]: len(request.prompt) for request in requests}  # answers of one prompt share that part
        clock = Clock(self.metrics, sum(prompts.values()))
        media_bytes = 0 if requests[0].media is None else requests[0].media.size_bytes
        self._media_bytes += media_bytes
        try:
            async with aclosing(self.runtime.generate(requests, self.request_timeout_s)) as deltas:
                async for delta in deltas:
                    clock.note(delta)
                    if delta.finish_reason == "abort":
                        raise unsupported(f"the answer was given up: {delta.stopped_by}")
                    yield delta
        except REASONS as problem:
            raise of_runtime(problem) from None
        finally:
            self._media_bytes -= media_bytes

    async def _begun(self, http: HttpRequest, deltas: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
        """``deltas`` whose first one has come, so that what fails at once fails with its own status."""
        first = await self._until_gone(http, anext(deltas))

        async def rest() -> AsyncGenerator[Delta]:
            async with aclosing(deltas):
                yield first
                async for delta in deltas:
                    yield delta

        return rest()

    async def _until_gone(self, http: HttpRequest, work: Awaitable[T]) -> T:
        """The result of ``work``, which is cancelled when the client leaves."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ApiError(499, "the client left")
            return await task
        finally:
            for one in (task, gone):
                one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


class _EventStream(StreamingResponse):
    """Closes what it was fed from, however it ends, so that the engine stops when the client leaves."""

    async def stream_response(self, send: Any) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


def _events(chunks: AsyncIterator[dict[str, Any]], *, names: bool = False) -> Response:
    """Server-sent events; an error that comes late is an event of its own. ``names``: each event has the name of its type."""

    async def lines() -> AsyncGenerator[bytes]:
        async with aclosing(chunks):  # type: ignore[type-var]
            try:
                async for chunk in chunks:
                    name = f"event: {chunk['type']}\n".encode() if names else b""
                    yield name + b"data: " + msgspec.json.encode(chunk) + b"\n\n"
            except ApiError as problem:
                yield b"data: " + msgspec.json.encode(problem.body()) + b"\n\n"
                return
            if not names:
                yield b"data: [DONE]\n\n"

    return _EventStream(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def create_app(api: Api, *, keys: tuple[str, ...], max_body: int) -> Any:
    """The ASGI application. The runtime starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await api.runtime.start()
        try:
            yield
        finally:
            api.grammars.close()
            await api.runtime.stop()

    async def of_api(_: HttpRequest, problem: Exception) -> Response:
        assert isinstance(problem, ApiError)
        return problem.response()

    async def of_http(_: HttpRequest, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        message = {404: "there is no such route", 405: "the route does not take this method"}.get(problem.status_code, str(problem.detail))
        return ApiError(problem.status_code, message, headers=dict(problem.headers or {})).response()

    async def of_bug(_: HttpRequest, problem: Exception) -> Response:
        return JSONResponse(ApiError(500, "the server has made a mistake", code="internal_error").body(), 500)

    handlers: dict[Any, Any] = {ApiError: of_api, HTTPException: of_http, Exception: of_bug}
    app = Starlette(routes=api.routes(), exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False  # another path is another route, and a redirect would name the host that the client made up
    return Guard(app, keys=keys, max_body=max_body, metrics=api.metrics, paths=[route.path for route in api.routes()])
