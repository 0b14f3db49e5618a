"""The one cache of models and data sets: ``ROOT/models/KIND/NAME/REVISION/``, each with a manifest that is written last.

ROOT is the environment variable SWIFT_CACHE, or ~/.cache/swift. A folder without its manifest is no snapshot. Beside the
revisions lies ``refs.json``: which revision a branch, a tag or "latest" meant when it was asked for.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from swift import console
from swift.errors import HubError
from swift.files import explain_os_errors, machine_error, sha256_file, write_json
from swift.hub.snapshot import Snapshot

MANIFEST = "swift-snapshot.json"
REFS = "refs.json"
_PARTIAL = ".partial-"


def cache_root() -> Path:
    """SWIFT_CACHE, or ~/.cache/swift; made by whoever writes first."""
    return Path(os.environ.get("SWIFT_CACHE") or Path.home() / ".cache" / "swift").expanduser()


def repo_folder(repo_type: str, kind: str, name: str) -> Path:
    """The folder of ``name``, in the spelling under which it is cached already, if it is: ids ignore case."""
    folder = cache_root() / f"{repo_type}s" / kind
    for part in name.split("/"):
        folder = _child(folder, part)
    return folder


def find(repo_type: str, kind: str, name: str, revision: str) -> Snapshot | None:
    """The cached snapshot of ``name`` at ``revision``, a revision or something that was resolved to one; None if there is none."""
    folder = repo_folder(repo_type, kind, name)
    for candidate in (_read_refs(folder).get(revision), revision):
        if candidate is not None and (snapshot := read_manifest(folder / _flat(candidate))) is not None:
            return snapshot
    return None


def read_manifest(folder: Path) -> Snapshot | None:
    """The snapshot in ``folder``, or None if it has no whole manifest or a file of it is gone or has another size."""
    facts = manifest(folder)
    if facts is None:
        return None
    files = {str(name): int(size) for name, size in facts["files"].items()}
    if any(not _has_size(folder / name, size) for name, size in files.items()):
        return None
    return Snapshot(folder, facts["reference"], facts["revision"], files, dict(facts["sha256"]))


def manifest(folder: Path) -> dict[str, Any] | None:
    """The facts in the manifest of ``folder``: reference, revision, files, sha256, and those that the hub added."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as problem:
        raise machine_error(problem, folder / MANIFEST) from problem
    return facts if isinstance(facts, dict) and {"reference", "revision", "files", "sha256"} <= facts.keys() else None


def add(
    repo_type: str,
    kind: str,
    name: str,
    revision: str,
    fill: Callable[[Path], dict[str, Any]],
    *,
    refs: tuple[str, ...] = (),
    can_resume: bool = False,
) -> Snapshot:
    """Make the snapshot of ``name`` at ``revision`` of the files that ``fill(folder)`` writes; ``refs`` mean it from now on.

    ``fill`` returns facts for the manifest: ``sha256`` holds digests that it knows already, ``reference`` another name
    than KIND::NAME, the others are kept as they are. The caller holds the lock of the repository. What fails leaves
    nothing behind, and a killed process nothing that is found. With ``can_resume``, ``fill`` may find the files of an
    attempt that was cut, interrupted or killed, and must check them; an error of the machine still leaves nothing.
    """
    folder = repo_folder(repo_type, kind, name)
    partial = folder / f"{_PARTIAL}{_flat(revision)}"
    _drop_partials(folder, except_for=partial if can_resume else None)
    try:
        with explain_os_errors(folder):
            partial.mkdir(parents=True, exist_ok=True)
            facts = fill(partial)
            known = facts.pop("sha256", {})
            files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files_in(partial)}
            sha256 = {file: known.get(file) or sha256_file(partial / file) for file in files}
            reference = facts.setdefault("reference", f"{kind}::{name}")
            write_json(partial / MANIFEST, {"revision": revision, "files": files, "sha256": sha256, **facts})
            _replace(partial, folder / _flat(revision))
            _write_refs(folder, dict.fromkeys(refs, _flat(revision)))
    except BaseException as problem:
        if not (can_resume and isinstance(problem, HubError | KeyboardInterrupt)):
            shutil.rmtree(partial, ignore_errors=True)
            _drop_empty(folder)
        raise
    return Snapshot(folder / _flat(revision), reference, revision, files, sha256)


def remember(repo_type: str, kind: str, name: str, ref: str, revision: str) -> None:
    """Note that ``ref`` (a branch, "latest") means ``revision`` now."""
    folder = repo_folder(repo_type, kind, name)
    with explain_os_errors(folder):
        _write_refs(folder, {ref: _flat(revision)})


@contextlib.contextmanager
def locked(repo_type: str, kind: str, name: str) -> Iterator[None]:
    """Let one process at a time, of all on this machine, fetch ``name``; the others wait and are told so."""
    from filelock import FileLock, Timeout

    path = cache_root() / "locks" / f"{repo_type}-{kind}-{_flat(name).lower()}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            console.say(f"waiting for another process that fetches {name}")
            lock.acquire()
    except OSError as problem:
        raise machine_error(problem, path) from problem
    try:
        yield
    finally:
        lock.release()


def list_snapshots(repo_type: str = "model") -> list[Snapshot]:
    """Every whole snapshot in the cache, sorted by reference and revision."""
    found = []
    for path in (cache_root() / f"{repo_type}s").glob(f"**/{MANIFEST}"):
        is_partial = any(part.startswith(".") for part in path.relative_to(cache_root()).parts)
        if not is_partial and (snapshot := read_manifest(path.parent)) is not None:
            found.append(snapshot)
    return sorted(found, key=lambda snapshot: (snapshot.reference.lower(), snapshot.revision))


def remove(repo_type: str, kind: str, name: str, revision: str | None = None) -> int:
    """Remove ``name`` from the cache, or only its ``revision``; returns the bytes freed, HubError if it is not cached."""
    with locked(repo_type, kind, name):
        folder = repo_folder(repo_type, kind, name)
        target = folder if revision is None else folder / _read_refs(folder).get(revision, _flat(revision))
        if not (target.is_dir() and (revision is None or (target / MANIFEST).is_file())):
            what = f"{kind}::{name}" + (f"@{revision}" if revision else "")
            raise HubError(f"{what} is not in the cache {cache_root()}", hint="swift models list shows what is")
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        with explain_os_errors(target):
            doomed = target.with_name(f"{_PARTIAL}removed-{target.name}")
            os.replace(target, doomed)
            shutil.rmtree(doomed)
            if revision is not None and folder.is_dir():
                kept = {ref: to for ref, to in _read_refs(folder).items() if to != target.name}
                write_json(folder / REFS, kept)
                if not any(path.is_dir() for path in folder.iterdir()):
                    shutil.rmtree(folder)
        _drop_empty(folder)
    return size


def verify(snapshot: Snapshot) -> None:
    """Read every file of ``snapshot`` again; HubError names the first one that differs from its recorded sha256."""
    for name, digest in snapshot.sha256.items():
        path = snapshot.path / name
        try:
            actual = sha256_file(path)
        except FileNotFoundError:
            raise HubError(f"{path} is missing", hint=f"swift models rm {snapshot.reference}, then pull it again") from None
        except OSError as problem:
            raise machine_error(problem, path) from problem
        if actual != digest:
            raise HubError(
                f"{path} has changed since it was fetched: sha256 {actual[:12]}, expected {digest[:12]}",
                hint=f"swift models rm {snapshot.reference}, then pull it again",
            )


def files_in(folder: Path) -> list[Path]:
    """The files of a snapshot: all but the manifest and what lies in hidden folders at its top (a client's notes)."""
    hidden = {path for path in folder.iterdir() if path.name.startswith(".") and path.is_dir()}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST and not hidden.intersection(path.parents))


def _child(folder: Path, name: str) -> Path:
    exact = folder / name
    try:
        if exact.exists() or not folder.is_dir():
            return exact
        return next((path for path in folder.iterdir() if path.name.lower() == name.lower()), exact)
    except OSError as problem:
        raise machine_error(problem, folder) from problem


def _flat(name: str) -> str:
    return name.replace("/", "--")


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _replace(partial: Path, final: Path) -> None:
    """Put ``partial`` at ``final``; what was there goes only after the new one stands."""
    for path in files_in(partial):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        old = final.with_name(f"{_PARTIAL}old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, final)


def _read_refs(folder: Path) -> dict[str, str]:
    try:
        refs = json.loads((folder / REFS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(ref): str(revision) for ref, revision in refs.items()} if isinstance(refs, dict) else {}


def _write_refs(folder: Path, new: dict[str, str]) -> None:
    refs = _read_refs(folder)
    if new and refs | new != refs:
        write_json(folder / REFS, refs | new)


def _drop_partials(folder: Path, *, except_for: Path | None) -> None:
    for path in folder.glob(f"{_PARTIAL}*") if folder.is_dir() else ():
        if path != except_for:
            shutil.rmtree(path, ignore_errors=True)


def _drop_empty(folder: Path) -> None:
    """Remove ``folder`` and its parents below the root as far as they are empty."""
    while folder != cache_root() and cache_root() in folder.parents:
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        folder = folder.parent
