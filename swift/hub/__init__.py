"""Where models and data sets come from: one function, ``resolve``, whatever names them."""

from pathlib import Path

from swift.errors import ConfigError, HubError
from swift.hub.reference import Reference, default_hub, parse, with_revision
from swift.hub.snapshot import Hub, Snapshot
from swift.registry import Registry

__all__ = ["HUBS", "Hub", "Reference", "Snapshot", "check_push", "parse", "push", "resolve"]

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
    found = _named(reference, use_hf)
    hub = _hub(found)
    assert hub.push is not None
    if not Path(path).is_dir():
        raise HubError(f"{path} is no folder: there is nothing to upload")
    return str(hub.push(Path(path), found.name, token=token, private=private, commit_message=commit_message, revision=found.revision))


def check_push(reference: str, *, use_hf: bool | None = None, token: str | None = None) -> None:
    """Raise HubError if ``push`` to ``reference`` would: its hub cannot be reached, or refuses the token."""
    found = _named(reference, use_hf)
    if check := _hub(found).check_push:
        check(found.name, token=token)


def _named(reference: str, use_hf: bool | None) -> Reference:
    """Where to push; ConfigError for what is no ORG/NAME of a hub. A folder of the same name is not meant."""
    if "::" not in reference:
        reference = f"{default_hub(use_hf)}::{reference}"
    found = parse(reference, use_hf=use_hf)
    if _hub(found).push is None or "/" not in found.name:
        raise ConfigError(f"{reference}: one cannot push there", hint="name ORG/NAME, hf::ORG/NAME or ms::ORG/NAME")
    return found


def _hub(reference: Reference) -> Hub:
    hub = HUBS.get(reference.kind)
    assert isinstance(hub, Hub), f"the hub {reference.kind!r} must be a swift.hub.Hub"
    return hub
