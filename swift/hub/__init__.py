"""Where models and data sets come from: one function, ``resolve``, whatever names them."""

from pathlib import Path

from swift.errors import ConfigError, HubError
from swift.hub.reference import Reference, parse, with_revision
from swift.hub.snapshot import Hub, Snapshot
from swift.registry import Registry

__all__ = ["HUBS", "Hub", "Reference", "Snapshot", "parse", "push", "resolve"]

HUBS = Registry(
    "hub",
    {
        "local": "swift.hub.local:HUB",
        "pkg": "swift.hub.package:HUB",
        "hf": "swift.hub.huggingface:HUB",
        "ms": "swift.hub.modelscope:HUB",
    },
    group="swift.hub",
)


def resolve(
    reference: str,
    revision: str | None = None,
    *,
    use_hf: bool | None = None,
    token: str | None = None,
    offline: bool = False,
    repo_type: str = "model",
    refresh: bool = False,
) -> Snapshot:
    """The model (or data set: ``repo_type="dataset"``) that ``reference`` names, on this machine; fetched if it is not cached.

    What is cached is used without asking the hub again, unless ``refresh``; ``offline`` never asks. ``revision`` is the
    same as ``@REVISION`` after the reference. Raises HubError if it cannot be found or fetched, ModelError if it is
    no usable model, MachineError if the disk or its permissions are in the way.
    """
    found = with_revision(parse(reference, use_hf=use_hf), revision)
    return _hub(found).resolve(found.name, found.revision, token=token, offline=offline, repo_type=repo_type, refresh=refresh)


def push(
    path: str | Path,
    reference: str,
    *,
    use_hf: bool | None = None,
    token: str | None = None,
    private: bool = False,
    commit_message: str = "Upload",
) -> str:
    """Upload the folder ``path`` to ``reference`` (made if it does not exist); returns the address of what was uploaded."""
    found = parse(reference, use_hf=use_hf)
    hub = _hub(found)
    if hub.push is None:
        raise ConfigError(f"{reference}: one cannot push to {hub.title}", hint="name hf::ORG/NAME or ms::ORG/NAME")
    if not Path(path).is_dir():
        raise HubError(f"{path} is no folder: there is nothing to upload")
    return str(hub.push(Path(path), found.name, token=token, private=private, commit_message=commit_message, revision=found.revision))


def _hub(reference: Reference) -> Hub:
    hub = HUBS.get(reference.kind)
    assert isinstance(hub, Hub), f"the hub {reference.kind!r} must be a swift.hub.Hub"
    return hub
