"""The one cache: whole, verified snapshots only."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from swift import audit
from swift.errors import HubError
from swift.files import explain_os_errors, new_folder, write_json
from swift.hub.reference import Reference
from swift.hub.snapshot import MANIFEST, Snapshot, files_in


def cache_root() -> Path:
    """SWIFT_CACHE, or .cache/swift in the home folder."""
    return Path(os.environ.get("SWIFT_CACHE") or Path.home() / ".cache" / "swift")


def folder_of(reference: Reference, repo_type: str = "model") -> Path:
    """Where snapshots of ``reference`` are kept, one folder a revision. Ids that differ in case only share it."""
    name = reference.name.lower().replace("/", "--")
    return cache_root() / f"{repo_type}s" / reference.kind / name


def find(reference: Reference, repo_type: str = "model") -> Snapshot | None:
    """The cached snapshot of ``reference``: of its revision, or the newest if it names none."""
    folder = folder_of(reference, repo_type)
    manifests = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for manifest in manifests:
        snapshot, aliases = _read(manifest)
        if reference.revision is None or reference.revision in (snapshot.revision, *aliases):
            return snapshot
    return None


@contextlib.contextmanager
def new_snapshot(reference: Reference, revision: str, *, repo_type: str = "model", aliases: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to be filled; when the block ends well it is hashed and becomes the snapshot, else it vanishes."""
    target = folder_of(reference, repo_type) / revision
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        with new_folder(target) as folder:
            yield folder
            files = files_in(folder)
            if not files:
                raise HubError(f"{reference} holds no files that can be used")
            facts = {
                "reference": str(reference),
                "revision": revision,
                "aliases": [alias for alias in aliases if alias],
                "files": files,
                "sha256": {name: audit.sha256_file(folder / name) for name in files},
            }
            write_json(folder / MANIFEST, facts)


@contextlib.contextmanager
def locked(reference: Reference, repo_type: str = "model") -> Iterator[None]:
    """Only one process at a time fetches ``reference``; the others wait, and then find it cached."""
    folder = folder_of(reference, repo_type)
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for remains in folder.glob(".*.tmp"):
            shutil.rmtree(remains, ignore_errors=True)
        yield


def list_snapshots(repo_type: str = "model") -> list[Snapshot]:
    """All snapshots in the cache."""
    manifests = sorted((cache_root() / f"{repo_type}s").glob(f"*/*/*/{MANIFEST}"))
    return [_read(manifest)[0] for manifest in manifests]


def remove(reference: Reference, repo_type: str = "model") -> list[Snapshot]:
    """Remove the cached snapshots of ``reference`` (of its revision, if it names one), and return them."""
    doomed = []
    for manifest in sorted(folder_of(reference, repo_type).glob(f"*/{MANIFEST}")):
        snapshot, aliases = _read(manifest)
        if reference.revision in (None, snapshot.revision, *aliases):
            doomed.append(snapshot)
            manifest.unlink()  # first: a kill here leaves no snapshot that looks whole
            shutil.rmtree(snapshot.path)
    return doomed


def verify(snapshot: Snapshot) -> None:
    """HubError if a file of ``snapshot`` is not as it was fetched."""
    for name, digest in snapshot.sha256.items():
        path = snapshot.path / name
        if not path.is_file() or audit.sha256_file(path) != digest:
            raise HubError(f"{path} is not the file that was fetched", hint=f"swift models rm {snapshot.reference}, then fetch it again")


def _read(manifest: Path) -> tuple[Snapshot, list[str]]:
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        return Snapshot(manifest.parent, raw["reference"], raw["revision"], raw["files"], raw["sha256"]), raw["aliases"]
    except (ValueError, KeyError) as problem:
        raise HubError(f"{manifest} is damaged: {problem}", hint=f"remove the folder {manifest.parent}") from None


