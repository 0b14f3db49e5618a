"""Adapters that come and go while the server runs: LoRA weights below one folder, asked for by name like models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from swift.errors import SwiftError
from swift.model.checkpoints import adapter_folder
from swift.serve.bodies import read_body
from swift.serve.errors import ApiError, of_runtime
from swift.serve.protocol import LoadAdapterRequest, UnloadAdapterRequest
from swift.serve.runtime import REASONS, Runtime


class AdapterShelf:
    """What may be loaded, and under which names. ``root`` is the folder below which adapters lie; None lets nothing be loaded."""

    def __init__(self, runtime: Runtime, *, models: Sequence[str], root: Path | None, describe: Callable[[str], Any]) -> None:
        self.runtime = runtime
        self._describe = describe
        self.models = models
        self.root = root

    def routes(self) -> list[Route]:
        return [
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
        ]

    async def _load(self, http: HttpRequest) -> Response:
        asked, _ = await read_body(http, LoadAdapterRequest)
        await self.load(asked.lora_name, asked.lora_path)
        return _json(self._describe(asked.lora_name))

    async def _unload(self, http: HttpRequest) -> Response:
        asked, _ = await read_body(http, UnloadAdapterRequest)
        await self.unload(asked.lora_name)
        return _json({"id": asked.lora_name, "object": "model", "deleted": True})

    async def load(self, name: str, path: str) -> None:
        """Raises ApiError: 403 if nothing may be loaded, 400 for a path or a name that cannot be."""
        if self.root is None:
            raise ApiError(403, "the server was started without --adapter_root, so it loads no adapters", code="not_allowed")
        if name in self.models or name in self.runtime.adapters:
            raise ApiError(400, f"the name {name!r} is taken", param="lora_name", code="invalid_value")
        folder = (self.root / path).resolve()
        if not folder.is_relative_to(self.root.resolve()):
            raise ApiError(400, "the path leaves the folder of --adapter_root", param="lora_path", code="invalid_value")
        try:
            folder = adapter_folder(str(folder))
        except SwiftError:
            raise ApiError(
                400, f"{path} is no folder with an adapter below --adapter_root", param="lora_path", code="invalid_value"
            ) from None
        try:
            await self.runtime.load_adapter(name, folder)
        except REASONS as problem:
            raise of_runtime(problem) from None

    async def unload(self, name: str) -> None:
        """Raises ApiError: 403 as above, 404 for a name that no adapter has, 400 for one in use."""
        if self.root is None:
            raise ApiError(403, "the server was started without --adapter_root, so its adapters stay", code="not_allowed")
        if name not in self.runtime.adapters:
            raise ApiError(404, f"no adapter {name!r} is loaded", param="lora_name", code="model_not_found")
        try:
            await self.runtime.unload_adapter(name)
        except REASONS as problem:
            raise of_runtime(problem) from None


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
