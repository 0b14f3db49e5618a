"""``hf::ID``: the Hugging Face Hub, or any server that speaks its protocol (HF_ENDPOINT), through huggingface_hub."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swift.errors import HubError
from swift.hub import cache, download
from swift.hub.download import RemoteFile
from swift.hub.snapshot import Hub, Snapshot

_MAIN = "main"


def resolve(
    name: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    offline: bool = False,
    repo_type: str = "model",
    refresh: bool = False,
) -> Snapshot:
    """The model or data set ``name`` at ``revision`` (a branch, a tag or a commit; main if None).

    What is cached is used as it is; ``refresh`` asks whether the branch has moved on. Every file is checked against the
    digest that the hub lists. Raises HubError if it cannot be found, reached, or does not arrive whole.
    """
    wanted = revision or _MAIN

    def fetch() -> Snapshot:
        return _fetch(name, wanted, token=token, repo_type=repo_type)

    return download.cached_or(fetch, "hf", name, wanted, offline=offline, repo_type=repo_type, refresh=refresh)


def _fetch(name: str, wanted: str, *, token: str | None, repo_type: str) -> Snapshot:
    api = _client(name, wanted, token)
    with _explained(api, name, wanted):
        info = api.repo_info(name, revision=wanted, repo_type=repo_type, timeout=10)
        name, commit = info.id or name, str(info.sha)
        if snapshot := cache.find(repo_type, "hf", name, commit):
            cache.remember(repo_type, "hf", name, wanted, commit)
            return snapshot
        listed = [
            RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, None if entry.lfs else entry.blob_id)
            for entry in api.list_repo_tree(name, recursive=True, revision=commit, repo_type=repo_type)
            if hasattr(entry, "size")  # folders have none
        ]
    files = download.wanted_files(f"hf::{name}", listed, repo_type)

    def fill(folder: Path) -> dict[str, Any]:
        return _download(api, name, commit, folder, files, repo_type)

    return cache.add(repo_type, "hf", name, commit, fill, refs=(wanted,), can_resume=True)


def _download(api: Any, name: str, commit: str, folder: Path, files: list[RemoteFile], repo_type: str) -> dict[str, Any]:
    # A killed process leaves *.incomplete files, which the client never takes up again.
    for orphan in (folder / ".cache").rglob("*.incomplete"):
        orphan.unlink()

    def get(file: RemoteFile) -> None:
        with _explained(api, name, commit):
            api.hf_hub_download(name, file.path, revision=commit, repo_type=repo_type, local_dir=folder)

    with download.quiet_bars():
        sha256 = download.fetch_all(f"hf::{name}@{commit[:12]}", folder, files, get)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"sha256": sha256}


def push(
    path: Path,
    name: str,
    *,
    token: str | None = None,
    private: bool = False,
    commit_message: str = "Upload",
    revision: str | None = None,
) -> str:
    """Upload the folder ``path`` to the model repository ``name``, made if need be; returns the address of the commit."""
    api = _client(name, revision or _MAIN, token, uploads=True)
    with _explained(api, name, revision or _MAIN), download.quiet_bars():
        made = api.create_repo(name, private=private, exist_ok=True)
        what = {"folder_path": path, "ignore_patterns": download.NOT_PUSHED}
        try:
            commit = api.upload_folder(repo_id=made.repo_id, commit_message=commit_message, revision=revision, **what)
        except RuntimeError as problem:  # how the client reports that a large file did not arrive
            raise HubError(f"hf::{name}: {str(problem).splitlines()[0]}", hint="try again later") from problem
    return str(commit.commit_url)


def check_push(name: str, *, token: str | None = None) -> None:
    """HubError if the token is none, or may not write to ``name``; whether a new repository may be made shows only then."""
    from huggingface_hub import errors

    api = _client(name, _MAIN, token, uploads=True)
    with _explained(api, name, _MAIN):
        try:
            api.whoami()
        except errors.LocalTokenNotFoundError as problem:
            raise HubError(f"hf::{name}: an upload needs a token", hint="say --hub_token TOKEN, or set HF_TOKEN") from problem
        with contextlib.suppress(errors.RepositoryNotFoundError):
            api.auth_check(name, write=True)


def _client(name: str, wanted: str, token: str | None, *, uploads: bool = False) -> Any:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE and uploads:
        raise HubError(f"hf::{name}: HF_HUB_OFFLINE is set, and an upload needs the hub", hint="unset HF_HUB_OFFLINE")
    if constants.HF_HUB_OFFLINE:
        raise download.not_cached("hf", name, wanted, because="HF_HUB_OFFLINE is set")
    api = HfApi(token=token, library_name="swift")
    download.check_reachable(f"hf::{name}", api.endpoint)
    return api


@contextlib.contextmanager
def _explained(api: Any, name: str, revision: str) -> Iterator[None]:
    """Errors of the client and of HTTP as one HubError each."""
    from huggingface_hub import errors

    # The client's HTTP library is httpx in some versions and httpx2 in others; its errors all have this base.
    http_error: Any = errors.HfHubHTTPError.__mro__[1]
    try:
        yield
    except errors.GatedRepoError as problem:
        raise HubError(f"hf::{name} is gated", hint="accept its terms on the hub's page, then give a token: --hub_token") from problem
    except errors.RevisionNotFoundError as problem:
        raise HubError(f"hf::{name} has no revision {revision!r}", hint="name a branch, a tag or a whole commit after the @") from problem
    except errors.RepositoryNotFoundError as problem:
        hint = f"check the spelling; a private one needs --hub_token; on ModelScope it would be ms::{name}"
        raise HubError(f"hf::{name} does not exist on {api.endpoint}, or is private", hint=hint) from problem
    except errors.HfHubHTTPError as problem:
        status = problem.response.status_code if problem.response is not None else "no"
        hint = "the token is wrong or lacks the right: --hub_token" if status in (401, 403) else "try again later"
        raise HubError(f"hf::{name}: {api.endpoint} answered with status {status}", hint=hint) from problem
    except errors.HFValidationError as problem:
        raise HubError(f"hf::{name} is no id of the hub", hint="ids look like ORG/NAME") from problem
    except (http_error, ConnectionError, errors.LocalEntryNotFoundError, errors.FileMetadataError) as problem:
        raise download.unreachable(f"hf::{name}", api.endpoint, problem.__cause__ or problem) from problem


HUB = Hub("Hugging Face", resolve, push, check_push)
