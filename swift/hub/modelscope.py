"""``ms::ID``: ModelScope, or any server that speaks its protocol (MODELSCOPE_ENDPOINT), through its own client."""

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swift.deps import require
from swift.errors import HubError, first_line
from swift.hub import cache, download
from swift.hub.download import RemoteFile
from swift.hub.snapshot import Hub, Snapshot

_MASTER = "master"


def resolve(
    name: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    offline: bool = False,
    repo_type: str = "model",
    refresh: bool = False,
) -> Snapshot:
    """The model or data set ``name`` at ``revision`` (a branch or a tag; master if None).

    What is cached is used as it is; ``refresh`` asks whether the branch has moved on, and then replaces it. Every file is
    checked against the sha256 that the hub lists. Raises HubError if it cannot be found, reached, or does not arrive whole.
    """
    wanted = revision or _MASTER

    def fetch() -> Snapshot:
        return _fetch(name, wanted, token=token, repo_type=repo_type)

    return download.cached_or(fetch, "ms", name, wanted, offline=offline, repo_type=repo_type, refresh=refresh)


def _fetch(name: str, wanted: str, *, token: str | None, repo_type: str) -> Snapshot:
    api, endpoint = _client(name, token)
    with _explained(endpoint, name, wanted):
        entries = api.list_repo_files(name, repo_type, revision=wanted)
    listed = [RemoteFile(entry.path, entry.size, entry.sha256 or None) for entry in entries if not entry.is_dir]
    files = download.wanted_files(f"ms::{name}", listed, repo_type)
    cached = cache.find(repo_type, "ms", name, wanted)
    if cached and {file.path: file.sha256 for file in files} == {path: cached.sha256.get(path) for path in cached.files}:
        return cached

    def fill(folder: Path) -> dict[str, Any]:
        locks = folder / ".locks"

        def get(file: RemoteFile) -> None:
            known = {"expected_sha256": file.sha256, "file_size": file.size}
            with _explained(endpoint, name, wanted):
                api.download_file(name, repo_type, file.path, revision=wanted, local_dir=folder, cache_dir=locks, **known)

        sha256 = download.fetch_all(f"ms::{name}@{wanted}", folder, files, get)
        shutil.rmtree(locks, ignore_errors=True)
        return {"sha256": sha256}

    return cache.add(repo_type, "ms", name, wanted, fill, can_resume=True)


def push(
    path: Path,
    name: str,
    *,
    token: str | None = None,
    private: bool = False,
    commit_message: str = "Upload",
    revision: str | None = None,
) -> str:
    """Upload the folder ``path`` to the model repository ``name``, made if need be; returns its address.

    What has arrived is noted in the cache and not sent again when the same upload is tried again.
    """
    api, endpoint = _client(name, token)
    arrived = cache.cache_root() / "uploads" / f"ms-{name.replace('/', '--')}.json"
    arrived.parent.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []

    def note(event: dict[str, Any]) -> None:
        if event.get("error"):
            faults.append(first_line(event["error"]))

    with _explained(endpoint, name, revision or _MASTER, faults), contextlib.redirect_stdout(io.StringIO()):  # the client prints a summary
        if not api.repo_exists(name, "model"):
            api.create_repo(name, "model", visibility="private" if private else "public")
        api.upload_folder(
            name,
            "model",
            path,
            commit_message=commit_message,
            revision=revision or _MASTER,
            ignore_patterns=download.NOT_PUSHED,
            disable_tqdm=True,
            use_cache=True,
            tracker_path=arrived,
            progress_callback=note,
        )
    arrived.unlink(missing_ok=True)
    return f"{endpoint}/models/{name}"


def check_push(name: str, *, token: str | None = None) -> None:
    """HubError if the token is none; whether it may write to ``name`` shows only then."""
    api, endpoint = _client(name, token)
    with _explained(endpoint, name, _MASTER):
        api.whoami()


def _client(name: str, token: str | None) -> tuple[Any, str]:
    hub = require("modelscope_hub", extra="modelscope", package="modelscope-hub")
    config = hub.HubConfig(**({"token": token} if token else {}))
    endpoint = str(config.endpoint)
    download.check_reachable(f"ms::{name}", endpoint)
    return hub.HubApi(config), endpoint


@contextlib.contextmanager
def _explained(endpoint: str, name: str, revision: str, faults: Sequence[str] = ()) -> Iterator[None]:
    """Errors of the client and of HTTP as one HubError each; ``faults`` say more of the end of an upload."""
    import requests
    from modelscope_hub import errors

    try:
        yield
    except (errors.NotExistError, errors.NotFoundError) as problem:
        hint = f"check the spelling; a private one needs --hub_token; on Hugging Face it would be hf::{name}"
        raise HubError(f"ms::{name} does not exist on {endpoint} at revision {revision!r}, or is private", hint=hint) from problem
    except (errors.AuthenticationError, errors.PermissionDeniedError) as problem:
        raise HubError(f"ms::{name}: {endpoint} refuses access", hint="the token is wrong or lacks the right: --hub_token") from problem
    except errors.FileIntegrityError as problem:
        raise HubError(
            f"ms::{name}: a file arrived damaged: {str(problem).splitlines()[0]}",
            hint="try again; if it happens again, the server or a proxy changes the file",
        ) from problem
    except (errors.NetworkError, requests.RequestException) as problem:
        raise download.unreachable(f"ms::{name}", endpoint, problem) from problem
    except (errors.HubError, RuntimeError) as problem:  # a RuntimeError ends an upload of which several parts failed
        raise HubError(f"ms::{name}: {faults[0] if faults else first_line(problem)}", hint="try again later") from problem


HUB = Hub("ModelScope", resolve, push, check_push)
