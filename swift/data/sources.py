"""Rows, with their positions, from files, folders, data set ids and built-in data sets."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift import console
from swift.data import files
from swift.errors import DataError, near
from swift.files import visible_files

Row = tuple[str, Any]

BUILT_IN = {"snow-alerts": Path(__file__).parent / "snow_alerts"}
_HUBS = ("hf", "ms")
_SPLITS = {
    "train": re.compile(r"(^|[^a-z])(train|training)([^a-z]|$)"),
    "validation": re.compile(r"(^|[^a-z])(validation|valid|val|dev|eval)([^a-z]|$)"),
    "test": re.compile(r"(^|[^a-z])test([^a-z]|$)"),
}
_NOT_DATA = re.compile(r"^(\.|_|readme|license|licence|dataset_infos?\.json$|config\.json$|requirements)", re.IGNORECASE)


@dataclass(frozen=True)
class Spec:
    """``[hub::]name[:subset1/subset2][#n]``, the way in which ms-swift writes a data set."""

    name: str
    hub: str | None = None
    subsets: tuple[str, ...] = ()
    num_samples: int | None = None


def parse_spec(text: str) -> Spec:
    """Read a data set given as a file, a folder, an id or a built-in name; an existing path is never cut at ``:``."""
    name, num_samples = text, None
    sample = re.fullmatch(r"(.+)#(\d+)", text)
    if sample and not Path(text).expanduser().exists():
        name, num_samples = sample[1], int(sample[2])
        if num_samples == 0:
            raise DataError(f"{text}: a sample of 0 rows", hint="write #n with n of at least 1")
    hub = None
    prefix, separator, rest = name.partition("::")
    if separator:
        if prefix not in (*_HUBS, "swift"):
            raise DataError(
                f"{text}: unknown prefix {prefix}::",
                hint="use hf:: (Hugging Face), ms:: (ModelScope) or swift:: (built in)",
            )
        hub, name = prefix, rest
    subsets: tuple[str, ...] = ()
    if not Path(name).expanduser().exists():
        head, separator, tail = name.rpartition(":")
        if separator and head and not re.fullmatch(r"[A-Za-z]", head):
            name, subsets = head, tuple(part for part in tail.split("/") if part)
    return Spec(name, hub, subsets, num_samples)


def rows(spec: Spec, **hub_options: Any) -> Iterator[Row]:
    """Every row of the data set as (position, value), streamed where the format allows it.

    A position is ``file:line`` or ``file[index]``. The value is a dict unless the file holds something else.
    Raises DataError if there is no such data set, if it is empty, or if a file cannot be read as what it says it is.
    """
    is_empty = True
    for path in locate(spec, **hub_options):
        for row in files.read(path):
            is_empty = False
            yield row
    if is_empty:
        raise DataError(f"{spec.name} has no rows")


def locate(spec: Spec, **hub_options: Any) -> list[Path]:
    """The data files of ``spec``, sorted; an id is fetched by ``hub.resolve``, which gets ``hub_options``."""
    if spec.hub == "swift" or (spec.hub is None and spec.name in BUILT_IN and not Path(spec.name).exists()):
        if spec.name not in BUILT_IN:
            raise DataError(f"no built-in data set {spec.name!r}", hint=_suggest(spec.name, BUILT_IN))
        return _pick(BUILT_IN[spec.name], spec.subsets or ("train",))
    path = Path(spec.name).expanduser()
    if spec.hub is None and path.is_file():
        if spec.subsets:
            raise DataError(f"{path} is one file: it has no subset {'/'.join(spec.subsets)!r}")
        return [path]
    if spec.hub is None and path.is_dir():
        return _pick(path, spec.subsets)
    if spec.hub is None and (path.parent.is_dir() or not _looks_like_id(spec.name)):
        raise DataError(f"{spec.name} does not exist", hint=_suggest_path(path))
    from swift import hub

    reference = f"{spec.hub}::{spec.name}" if spec.hub else spec.name
    return _pick(Path(hub.resolve(reference, repo_type="dataset", **hub_options).path), spec.subsets)


def _looks_like_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name) is not None and files.suffix_of(Path(name)) is None


def _suggest(name: str, known: Any) -> str:
    match = near(name, known)
    return f"did you mean {match!r}?" if match else f"known: {', '.join(known)}"


def _suggest_path(path: Path) -> str:
    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    match = near(path.name, siblings)
    if match is not None:
        return f"did you mean {path.parent / match}?"
    if path.parent == Path(".") and (match := near(path.name, BUILT_IN)):
        return f"did you mean the built-in data set {match}?"
    if path.parent != Path(".") and not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    return "give a file, a folder, an id such as hf::owner/name, or the built-in name snow-alerts"


def _pick(folder: Path, subsets: tuple[str, ...]) -> list[Path]:
    """The data files below ``folder`` of ``subsets``; without subsets all, or the train split if there are splits."""
    found = sorted(
        path
        for path in visible_files(folder)
        if files.suffix_of(path) is not None and not any(_NOT_DATA.match(part) for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder} holds no data file", hint=f"known formats: {', '.join(files.READERS)}")
    if subsets:
        configs = _card_configs(folder)
        return [path for subset in subsets for path in _subset(folder, found, subset, configs)]
    splits = {path: _split_of(path.relative_to(folder)) for path in found}
    if len(set(splits.values())) > 1 and "train" in splits.values():
        kept = [path for path in found if splits[path] == "train"]
        others = sorted({split or "other" for split in splits.values()} - {"train"})
        console.notice(f"{folder}: reading the train split ({len(kept)} of {len(found)} files; not read: {', '.join(others)})")
        return kept
    return found


def _split_of(relative: Path) -> str | None:
    name = relative.as_posix().lower()
    return next((split for split, pattern in _SPLITS.items() if pattern.search(name)), None)


def _subset(folder: Path, found: list[Path], subset: str, configs: dict[str, list[Path]]) -> list[Path]:
    """Files of one subset: named in the data set card, in a folder of that name, of that split, or so named."""
    tests: list[Callable[[Path], bool]] = [
        lambda path: path in configs.get(subset, ()),
        lambda path: subset in path.relative_to(folder).parts[:-1],
        lambda path: subset in _SPLITS and _split_of(path.relative_to(folder)) == subset,
        lambda path: re.split(r"\.", path.name)[0] == subset,
        lambda path: re.match(re.escape(subset) + r"[-_.]", path.name) is not None,
    ]
    for test in tests:
        kept = [path for path in found if test(path)]
        if kept:
            return kept
    names = sorted({*configs, *(split for path in found if (split := _split_of(path.relative_to(folder))))})
    names += sorted({path.name.split(".")[0] for path in found} - set(names))
    raise DataError(f"{folder} has no subset {subset!r}", hint=_suggest(subset, names))


def _card_configs(folder: Path) -> dict[str, list[Path]]:
    """Configuration name -> its train files, as the ``configs:`` block of a Hugging Face data set card says."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    if header is None:
        return {}
    import yaml

    try:
        block = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        console.warn(f"{card}: its header is not YAML, so its configurations are not read ({str(error).splitlines()[0]})")
        return {}
    configs: dict[str, list[Path]] = {}
    for entry in (block or {}).get("configs") or []:
        data_files = entry.get("data_files") or []
        if isinstance(data_files, str):
            data_files = [data_files]
        patterns: list[str] = []
        for item in data_files:
            if isinstance(item, dict) and item.get("split", "train") != "train":
                continue
            path = item["path"] if isinstance(item, dict) else item
            patterns += path if isinstance(path, list) else [path]
        configs[entry["config_name"]] = sorted({match for pattern in patterns for match in folder.glob(pattern)})
    return configs
