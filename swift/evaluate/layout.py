"""Where the files of a task lie: a folder or file that the user names, archives in it, or a data set of a hub."""

import functools
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from swift import hub
from swift.data.sources import BUILT_IN
from swift.errors import DataError, HubError, near
from swift.evaluate.settings import Settings
from swift.evaluate.spec import Layout, TaskSpec, names_of, normal, task_names
from swift.files import visible_files
from swift.hub.reference import default_hub


class File(NamedTuple):
    """A file of a split; ``category`` is "" where the pattern has none."""

    category: str
    path: Path


@dataclass(frozen=True)
class Located:
    """The files of the splits that are used, and what named them, for the report.

    ``num_unread`` counts files of a user's folder that other patterns of the layout would match: the first that matches is taken.
    """

    layout: Layout
    splits: dict[str, list[File]]
    source: str
    num_unread: int = 0


def locate(spec: TaskSpec, settings: Settings, splits: Sequence[str]) -> Located:
    """The files of ``splits``. DataError or HubError says where they were looked for, and what would be found."""
    if settings.local_path is not None:
        return _local(spec, Path(settings.local_path).expanduser(), splits, f"local_path of {spec.name}")
    if settings.data_dir is not None:
        folder = Path(settings.data_dir).expanduser()
        named = _own_folder(spec, folder)
        if named is not None and (found := _find(spec, named, splits)) is not None:
            return found
        if spec.source.built_in is None:
            return _local(spec, folder, splits, "--eval_data_dir")
    if spec.source.built_in is not None:
        return _local(spec, BUILT_IN[spec.source.built_in], splits, f"built-in data of {spec.name}")
    if not spec.source.hub:
        raise DataError(
            f"task {spec.name} needs your data", hint=f'--eval_dataset_args \'{{"{spec.name}": {{"local_path": "FILE or FOLDER"}}}}\''
        )
    return _from_hub(spec, settings, splits)


def _local(spec: TaskSpec, place: Path, splits: Sequence[str], option: str) -> Located:
    if place.is_file() and place.suffix != ".zip":
        layout = next((one for one in spec.source.layouts if _suffixes(one) & {place.suffix}), spec.source.layouts[0])
        return Located(layout, {spec.split: [File(_subject_of(spec, layout, place), place)]}, str(place))
    if not place.exists():
        siblings = [child.name for child in place.parent.iterdir()] if place.parent.is_dir() else []
        match = near(place.name, siblings)
        raise DataError(f"{option}: {place} does not exist", hint=f"did you mean {place.parent / match}?" if match else None)
    found = _find(spec, place, splits)
    if found is None:
        raise _not_found(spec, place, option)
    return found


def _suffixes(layout: Layout) -> set[str]:
    return {Path(pattern).suffix for patterns in layout.splits.values() for pattern in patterns}


def _subject_of(spec: TaskSpec, layout: Layout, file: Path) -> str:
    """The declared subject that the name of a single file tells; "" if it tells none."""
    for pattern in layout.splits.get(spec.split, ()):
        for part in (pattern, pattern.rpartition("/")[2]):
            name = "/".join(file.parts[-part.count("/") - 1 :])
            match = _regex(part).fullmatch(name)
            if match is not None and (found := match.groupdict().get("category")) in spec.category_names:
                return found
    return ""


def _own_folder(spec: TaskSpec, folder: Path) -> Path | None:
    """The folder or archive in ``folder`` that is named like the task."""
    names = names_of(spec)
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    named = [child for child in inside if normal(child.name if child.is_dir() else child.stem) in names]
    return next((child for child in named if child.is_dir() or child.suffix == ".zip"), None)


def _from_hub(spec: TaskSpec, settings: Settings, splits: Sequence[str]) -> Located:
    preferred = default_hub(settings.hub.get("use_hf"))
    problems: list[HubError] = []
    for reference in sorted(spec.source.hub, key=lambda one: not one.startswith(f"{preferred}::")):
        try:
            snapshot = hub.resolve(reference, repo_type="dataset", **settings.hub)
        except HubError as problem:
            problems.append(problem)
            continue
        found = _find(spec, Path(snapshot.path), splits)
        if found is None:
            raise _not_found(spec, Path(snapshot.path), reference)
        return Located(found.layout, found.splits, f"{reference}@{snapshot.revision}")
    where = f" ({spec.homepage})" if spec.homepage else ""
    raise HubError(
        f"the data of task {spec.name} are not on this machine: {problems[0].message}",
        hint=f"give what its authors publish{where} with --eval_data_dir FOLDER",
    )


def _find(spec: TaskSpec, place: Path, splits: Sequence[str]) -> Located | None:
    """The first layout whose patterns match: in the folder, below the one folder in it that all files lie in, in its archives."""
    for listing in _listings(place):
        for layout in spec.source.layouts:
            if found := _matched(layout, listing):
                _check_splits(spec, place, layout, found, splits)
                num_unread = 0 if spec.source.hub else _num_unread(layout, listing, found)
                return Located(layout, {split: found[split] for split in splits}, str(place), num_unread)
    return None


Listing = Sequence[tuple[str, Path]]


def _listings(place: Path) -> Iterator[Listing]:
    files = [place] if place.is_file() else visible_files(place)
    plain = [(path.relative_to(place).as_posix(), path) for path in files if path.suffix != ".zip"]
    yield from _with_and_without_top(plain)
    for archive in files:
        if archive.suffix == ".zip":
            yield from _with_and_without_top(_members(archive))


def _members(archive: Path) -> Listing:
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as problem:
        raise DataError(f"{archive} is no whole archive: {problem}", hint="fetch it again") from None
    names = [name for name in opened.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    # A member of an archive offers what readers use of a path: open, name, suffix, suffixes, str.
    return sorted((name, cast(Path, zipfile.Path(opened, name))) for name in names)


def _with_and_without_top(listing: Listing) -> Iterator[Listing]:
    yield listing
    tops = {name.partition("/")[0] for name, _ in listing if "/" in name}
    if len(tops) == 1 and tops.isdisjoint(task_names()):
        yield [(name.partition("/")[2], path) for name, path in listing if "/" in name]


def _matched(layout: Layout, listing: Listing) -> dict[str, list[File]]:
    """Split -> files, of the splits for which a pattern matches anything."""
    found: dict[str, list[File]] = {}
    for split, patterns in layout.splits.items():
        for pattern in patterns:
            matches = [(match, path) for name, path in listing if (match := _regex(pattern).fullmatch(name))]
            files = [File(match.groupdict().get("category") or "", path) for match, path in matches]
            files = [file for file in files if file.category not in layout.ignore]
            if files:
                found[split] = files
                break
    return found


def _num_unread(layout: Layout, listing: Listing, found: dict[str, list[File]]) -> int:
    patterns = [_regex(pattern) for patterns in layout.splits.values() for pattern in patterns]
    matching = {path for name, path in listing if any(pattern.fullmatch(name) for pattern in patterns)}
    return len(matching - {file.path for files in found.values() for file in files})


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern of file names as a regular expression."""
    parts = re.split(r"(\*\*/|\*|\{category\})", pattern)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "{category}": "(?P<category>[^/]+?)"}
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))


def _check_splits(spec: TaskSpec, place: Path, layout: Layout, found: dict[str, list[File]], splits: Sequence[str]) -> None:
    for split in splits:
        if split not in layout.splits:
            raise DataError(f"{place} has no split {split} of task {spec.name}", hint="give --eval_num_fewshot 0")
        if split not in found:
            hint = "give --eval_num_fewshot 0, or add the files" if split != spec.split else None
            raise DataError(f"{place} has no split {split} of task {spec.name}: no file {' or '.join(layout.splits[split])}", hint=hint)


def _not_found(spec: TaskSpec, place: Path, option: str) -> DataError:
    wanted = [pattern for layout in spec.source.layouts for pattern in layout.splits.get(spec.split, ())]
    names = [name for listing in [next(_listings(place))] for name, _ in listing]
    held = f"it holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "it is empty"
    where = f"; they are published at {spec.homepage}" if spec.homepage else ""
    return DataError(f"{option}: {place} has no data of task {spec.name}; {held}", hint=f"wanted: {' or '.join(wanted[:4])}{where}")
