"""swift deploy: the server in this process, the engine in another."""

import contextlib
import copy
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swift import console, deps, hub
from swift.config.deploy import DeployConfig
from swift.errors import ConfigError, MachineError
from swift.files import explain_os_errors
from swift.model.checkpoints import named_adapters
from swift.model.template import read_template
from swift.model.tokenizer import load_tokenizer
from swift.model.vision import load_processor, reads_images
from swift.serve import limits
from swift.tuner.adapter import base_reference


def run_deploy(config: DeployConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are finished first."""
    deps.require("uvicorn", extra="serve")
    from swift.serve.runtime import Runtime

    listening = _listen(config.host, config.port)
    config, adapters = _apart(config)
    reference = base_reference(config)
    snapshot = hub.resolve(reference, config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline)
    names = config.served_model_name or [_name_of(reference)]
    if taken := sorted(set(names) & set(adapters)):
        raise ConfigError(f"the model and an adapter are both called {taken[0]}", hint="say another --served_model_name")
    if config.adapter_root is not None and not Path(config.adapter_root).is_dir():
        raise ConfigError(f"--adapter_root {config.adapter_root} is no folder")
    keys = read_keys(config.api_key)
    runtime = Runtime(
        config, adapters=adapters, max_requests=(config.max_batch_size or 64) + config.max_queue, hang_s=config.engine_timeout_s
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until uvicorn has its own
    try:
        runtime.launch()  # its imports take the seconds that those of the server take
        _serve(config, runtime, snapshot.path, names, keys, listening)
    finally:
        runtime.kill()


def _serve(config: DeployConfig, runtime: Any, path: Path, names: list[str], keys: tuple[str, ...], listening: socket.socket) -> None:
    import uvicorn

    from swift.serve.app import Api, create_app
    from swift.serve.chat import ChatRenderer
    from swift.serve.connection import Connection

    chat_template = read_template(config.chat_template)
    processor = load_processor(path, chat_template=chat_template) if reads_images(path) else None
    with _without_torch():
        tokenizer = load_tokenizer(path, chat_template=chat_template) if processor is None else processor.tokenizer
    renderer = ChatRenderer(
        tokenizer,
        chat_template=None,
        processor=processor,
        max_images=(config.limit_mm_per_prompt or {}).get("image", limits.MOST_IMAGES),
        max_pixels=config.max_pixels,
    )
    api = Api(
        runtime,
        renderer,
        models=names,
        owned_by=config.owned_by,
        request_timeout_s=config.request_timeout_s,
        has_keys=bool(keys),
        adapter_root=None if config.adapter_root is None else Path(config.adapter_root),
    )
    if config.access_log:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    else:
        logging.getLogger("swift.access").disabled = True
    app = create_app(api, keys=keys, max_body=int(config.max_body_mib * 2**20))
    options = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(config.drain_timeout_s),
        server_header=False,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        lifespan="on",
        ws="none",
        http=Connection,
    )
    scheme = "https" if config.ssl_certfile else "http"
    console.say(
        f"{names[0]} at {scheme}://{config.host}:{listening.getsockname()[1]}/v1 ({'with' if keys else 'without'} a key); Ctrl-C ends it"
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done; that is no failure
    uvicorn.Server(options).run(sockets=[listening])


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """transformers is imported as if torch were not installed. Tokenizers do without it, and importing it takes this process
    240 MB and 3 s (torch 2.13, transformers 5.24).

    Nothing is done where torch is imported already, as by a processor of images, or by the conversion of a model.
    """
    if "torch" in sys.modules:
        yield
        return
    advice = logging.getLogger("transformers")  # which says that there will be no models
    advice.addFilter(_is_no_advice)
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own sign of a module that is not there
    try:
        yield
    finally:
        del sys.modules["torch"]
        advice.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def _apart(config: DeployConfig) -> tuple[DeployConfig, dict[str, Path]]:
    """``config`` of the model alone, and the adapters that are served beside it, by name."""
    plain, named = named_adapters(config.adapters)
    if named and config.model is None and not plain:
        first = copy.copy(config)
        first.adapters = [str(next(iter(named.values())))]
        config.model = base_reference(first)
    config.adapters = plain
    return config, named


def read_keys(given: list[str]) -> tuple[str, ...]:
    """The keys that --api_key gives, or that stand in the file behind an @, one a line."""
    keys: list[str] = []
    for key in given:
        if not key.startswith("@"):
            keys.append(key)
            continue
        path = Path(key[1:])
        with explain_os_errors(path):
            keys += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if given and not all(keys):
        raise ConfigError("--api_key holds an empty key", hint="remove it")
    if given and not keys:
        raise ConfigError(f"{given[0][1:]} holds no key", hint="write one key a line")
    return tuple(keys)


def _listen(host: str, port: int) -> socket.socket:
    """The socket, before anything is loaded: a port that is taken is said at once, and no other is used in its place."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as problem:
        listening.close()
        raise MachineError(f"{host}:{port} cannot be listened on: {problem.strerror or problem}", hint="choose another --port") from None
    listening.listen(2048)
    return listening


def _name_of(reference: str) -> str:
    """The name by which a model is asked for: as it was given, or the folder's."""
    path = Path(reference)
    return path.name if path.is_dir() else reference.removeprefix("pkg::")
