"""``swift models list | pull | show | rm``."""

from pathlib import Path
from typing import Any

from swift import console, hub
from swift.errors import HubError
from swift.hub import cache
from swift.hub.facts import count_text, model_facts, size_text
from swift.hub.reference import LOCAL, Reference, parse, with_revision
from swift.hub.snapshot import Snapshot

CATALOG = Path(__file__).parent / "catalog" / "models.yaml"


def models_list(config: Any) -> list[Snapshot]:
    """Print what is cached, then what the catalog knows."""
    return list_models()


def models_pull(config: Any) -> Snapshot:
    """Fetch a model, or see whether its branch has moved on."""
    return pull_model(config.model, config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline)


def models_show(config: Any) -> Snapshot:
    """Print what a model is."""
    return show_model(config.model, config.model_revision, use_hf=config.use_hf)


def models_rm(config: Any) -> int:
    """Remove a model from the cache."""
    return remove_model(config.model, config.model_revision, use_hf=config.use_hf)


def list_models() -> list[Snapshot]:
    """Print the cached models and the catalog; returns the cached ones."""
    snapshots = cache.list_snapshots()
    rows = [(snapshot.reference, snapshot.revision[:12], size_text(sum(snapshot.files.values()))) for snapshot in snapshots]
    console.table(("model", "revision", "size"), rows, title=f"cached in {cache.cache_root()}")
    have = {snapshot.reference.lower() for snapshot in snapshots}
    known = [
        (
            entry["reference"],
            entry["parameters"],
            entry["size"],
            entry["licence"],
            "yes" if entry["reference"].lower() in have else "",
            entry["note"],
        )
        for entry in catalog()
    ]
    console.table(("model", "parameters", "fetch", "licence", "cached", "note"), known, title="good to begin with")
    return snapshots


def pull_model(
    reference: str, revision: str | None = None, *, use_hf: bool | None = None, token: str | None = None, offline: bool = False
) -> Snapshot:
    """Fetch ``reference``; a branch that is cached is asked for again, unless ``offline``."""
    snapshot = hub.resolve(reference, revision, use_hf=use_hf, token=token, offline=offline, refresh=_may_move(reference, offline))
    cache.verify(snapshot)
    size = size_text(sum(snapshot.files.values()))
    console.say(f"{snapshot.reference} is whole", revision=snapshot.revision[:12], size=size, path=snapshot.path)
    return snapshot


def show_model(reference: str, revision: str | None = None, *, use_hf: bool | None = None) -> Snapshot:
    """Print what the model ``reference``, cached or local, is; HubError if it is not on this machine."""
    snapshot = _on_this_machine(reference, revision, use_hf=use_hf)
    facts = model_facts(snapshot)
    total = max(facts.parameters, 1)
    rows = [
        ("reference", snapshot.reference),
        ("revision", snapshot.revision),
        ("path", snapshot.path),
        ("architecture", facts.architecture or "unknown"),
        ("parameters", f"{count_text(facts.parameters)} ({facts.parameters:,})"),
        ("dtype", ", ".join(dtype if share == total else f"{dtype} {share / total:.1%}" for dtype, share in facts.dtypes.items())),
        *([("converted from", ", ".join(facts.quantized))] if facts.quantized else []),
        ("context length", facts.context_length or "unknown"),
        ("vocabulary", facts.vocabulary or "unknown"),
        ("chat template", "yes" if facts.has_chat_template else "no"),
        ("licence", facts.licence or "unknown"),
        ("size", size_text(sum(snapshot.files.values()))),
    ]
    console.table(("what", "value"), rows)
    files = [(name, size_text(size), snapshot.sha256.get(name, "")[:12]) for name, size in snapshot.files.items()]
    console.table(("file", "size", "sha256"), files)
    return snapshot


def remove_model(reference: str, revision: str | None = None, *, use_hf: bool | None = None) -> int:
    """Remove ``reference`` from the cache, all revisions unless one is named; returns the bytes freed."""
    found = with_revision(parse(reference, use_hf=use_hf), revision)
    kind, name, what = found.kind, _cached_name(found), found.revision
    if kind == LOCAL:
        converted = [snapshot for snapshot in cache.list_snapshots() if snapshot.reference == str(Path(name).expanduser().resolve())]
        if not converted:
            raise HubError(f"{reference} is not in the cache: a local model is used where it lies", hint="swift models list shows what is")
        kind, name, what = "gguf", converted[0].path.parent.name, converted[0].revision
    freed = cache.remove("model", kind, name, what)
    console.say(f"removed {found} from the cache", freed=size_text(freed))
    return freed


def catalog() -> list[dict[str, str]]:
    """The entries of the catalog."""
    import yaml

    entries: list[dict[str, str]] = yaml.safe_load(CATALOG.read_text(encoding="utf-8"))
    return entries


def _may_move(reference: str, offline: bool) -> bool:
    return not offline and parse(reference).kind in ("hf", "ms")


def _on_this_machine(reference: str, revision: str | None, *, use_hf: bool | None) -> Snapshot:
    found = with_revision(parse(reference, use_hf=use_hf), revision)
    if found.kind == LOCAL:
        return hub.resolve(reference)
    default = {"hf": "main", "ms": "master", "pkg": "latest"}.get(found.kind, "main")
    snapshot = cache.find("model", found.kind, _cached_name(found), found.revision or default)
    if snapshot is None:
        raise HubError(f"{found} is not in the cache", hint=f"swift models pull {found} fetches it")
    return snapshot


def _cached_name(found: Reference) -> str:
    from swift.hub.wheels import normalized

    return normalized(found.name) if found.kind == "pkg" else found.name
