"""A model or data set as it lies on disk."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Snapshot:
    """Files in one folder at one revision. ``sha256`` is empty for local folders, which are not hashed unasked."""

    path: Path
    reference: str  # as a user may write it: pkg::NAME, hf::ORG/NAME, or a path
    revision: str
    files: dict[str, int]  # name -> size in bytes
    sha256: dict[str, str] = field(default_factory=dict)


def files_in(folder: Path) -> dict[str, int]:
    """Sizes of all files below ``folder`` by relative name; hidden ones and the manifest are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts) and name != MANIFEST:
            found[name] = path.stat().st_size
    return found


MANIFEST = "swift-snapshot.json"
