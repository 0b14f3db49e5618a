"""What a hub returns: a folder of files at one revision, and how a hub is described to the registry."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Snapshot:
    """A model or data set on this machine.

    ``path`` is the folder, ``reference`` names it so that ``resolve`` finds it again (``hf::Qwen/Qwen-7B``), ``revision``
    is what was fetched (a commit, a version, or "local"). ``files`` maps names relative to ``path`` to sizes in bytes,
    ``sha256`` maps them to hexadecimal digests; it is empty for a local folder, which is not hashed at each start.
    """

    path: Path
    reference: str
    revision: str
    files: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hub:
    """One place where models come from.

    ``resolve(name, revision, *, token, offline, repo_type, refresh) -> Snapshot`` fetches ``name``; ``refresh`` asks the
    hub again although the cache has an answer. ``push(path, name, *, token, private, commit_message, revision) -> str``
    uploads the folder ``path`` and returns the address of what it made; ``check_push(name, *, token)`` raises HubError if
    it could not. Both are None if one cannot push to this hub.
    """

    title: str
    resolve: Callable[..., Snapshot]
    push: Callable[..., str] | None = None
    check_push: Callable[..., None] | None = None
