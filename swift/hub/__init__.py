"""Hubs: from a reference to files on disk."""


from swift.errors import HubError
from swift.hub.reference import Reference, parse
from swift.hub.snapshot import Snapshot
from swift.registry import Registry

HUBS = Registry(
    "hub",
    {
        "local": "swift.hub.local:resolve",
        "package": "swift.hub.package:resolve",
        "huggingface": "swift.hub.huggingface:resolve",
        "modelscope": "swift.hub.modelscope:resolve",
    },
    group="swift.hub",
)

__all__ = ["HUBS", "Reference", "Snapshot", "parse", "resolve"]


def resolve(
    reference: str,
    revision: str | None = None,
    *,
    repo_type: str = "model",
    use_hf: bool | None = None,
    token: str | None = None,
    offline: bool = False,
) -> Snapshot:
    """The files that ``reference`` (see reference.parse) names, fetched if they are not cached.

    ``repo_type`` is "model" or "dataset". Raises HubError if there is no such thing, or no way to fetch it.
    """
    named = parse(reference, use_hf=use_hf)
    if revision is not None and named.revision not in (None, revision):
        raise HubError(f"{reference} and the revision {revision} contradict each other", hint="give one revision")
    found: Snapshot = HUBS.get(named.kind)(named.name, revision or named.revision, repo_type=repo_type, token=token, offline=offline)
    return found
