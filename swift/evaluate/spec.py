"""A task as data: where its rows are, how they are asked, and how answers are judged. One YAML file a task.

Texts of a declaration are of two kinds. *Templates* give text (``description``, ``prompt``, ``target``, ``text``, ...), such as
``Question: {{ question }}``. *Expressions* give values (``fields``, ``choices``, ``gold``, ``when``, ``id``), such as
``choices.label.index(answerKey)``. Both are Jinja, run in a sandbox; they see the columns of the row, ``row`` itself, ``category``
and ``category_name``.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from swift.errors import ConfigError, near

FOLDER = Path(__file__).parent / "tasks"


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts of a declaration."""


class Layout(Part, frozen=True, kw_only=True):
    """One way in which the data are laid out in a folder: ``splits`` gives patterns of files, tried in order.

    In a pattern ``*`` is a part of a name, ``**`` any folders, and {category} the subject. ``header`` names the columns of CSV files
    that have no header line. ``fields`` are columns computed from those of the file; ``ignore`` lists categories that are none.
    """

    splits: dict[str, list[str]]
    header: list[str] = []
    fields: dict[str, str] = {}
    ignore: list[str] = []


class Source(Part, frozen=True, kw_only=True):
    """``hub`` names data sets (hf::ORG/NAME, ms::ORG/NAME), ``built_in`` one that comes along; ``layouts`` are tried in order."""

    layouts: list[Layout]
    hub: list[str] = []
    built_in: str | None = None


class Shots(Part, frozen=True, kw_only=True):
    """Solved examples: ``count`` of ``split`` (of the same category) after the first ``skip``, or of ``rows`` that are written out here."""

    count: int = 0
    split: str | None = None
    skip: int = 0
    rows: list[dict[str, Any]] = []


class Drop(Part, frozen=True, kw_only=True):
    """Rows that are left out and counted, ``because`` of a reason: those for which ``when`` is true. It sees ``split`` too."""

    when: str
    because: str


class Mode(Part, frozen=True, kw_only=True):
    """What all modes that ask a question share.

    The prompt is ``description``, then each solved example as question, ``delimiter``, answer and ``separator``, then the question.
    With a chat template the description is the system message, and questions and answers are turns.
    """

    prompt: str
    description: str = ""
    delimiter: str = " "
    separator: str = "\n\n"
    metrics: list[str] = msgspec.field(default_factory=lambda: ["acc"])


class Choosing(Mode, frozen=True, kw_only=True):
    """Modes letter and choice: the likeliest of ``choices`` (an expression, or their list) after the question.

    ``gold``: an expression for the index of the right one, its text, or a list of them. ``contexts``: an expression for one question
    a choice, after all of which the text ``ending`` is scored, where the choice stands in the question.
    """

    choices: str | list[str]
    gold: str
    contexts: str | None = None
    ending: str = ""


class Writing(Mode, frozen=True, kw_only=True):
    """Mode generate: an answer is written, up to one of ``stop`` or ``max_new_tokens``; ``extract`` finds in it what is compared.

    ``target`` is the answer of a solved example, ``gold`` an expression for what is right; ``prefix`` begins the answer.
    ``choices``: as above, or an expression for texts by their letters. ``extract`` and ``arguments`` are read by the module ``generated``.
    """

    target: str = ""
    gold: str = ""
    prefix: str = ""
    stop: list[str] = []
    max_new_tokens: int = 256
    choices: str | list[str] | None = None
    extract: str | list[str | dict[str, Any]] = []
    arguments: dict[str, Any] = {}


class Reading(Part, frozen=True, kw_only=True):
    """Mode perplexity: how likely the text is, after ``context`` (not scored), if there is one.

    Words and bytes are counted of ``original``, where the text was changed before it is scored.
    """

    text: str
    context: str = ""
    original: str | None = None
    metrics: list[str] = msgspec.field(default_factory=lambda: ["perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"])


AnyMode = Choosing | Writing | Reading
MODE_KINDS: dict[str, type[AnyMode]] = {"letter": Choosing, "choice": Choosing, "generate": Writing, "perplexity": Reading}


class TaskSpec(Part, frozen=True, kw_only=True):
    """A declaration; the first of ``modes`` is the default. ``groups`` lists categories, or maps them to what people call them.

    ``python`` names a member of the registry of tasks, which makes the task in place of the modes here.
    """

    name: str
    title: str
    licence: str
    source: Source
    split: str
    modes: dict[str, Any] = {}
    homepage: str = ""
    language: str = "en"
    about: str = ""
    aliases: list[str] = []
    shots: Shots = Shots()
    groups: dict[str, list[str] | dict[str, str]] = {}
    id: str | None = None
    category: str | None = None
    """An expression for the subject of a row, where the name of its file tells none."""
    fields: dict[str, str] = {}
    drop: list[Drop] = []
    cluster: str | None = None
    """An expression for the text that several examples share, such as a passage: they count as one draw when intervals are computed."""
    python: str | None = None

    @property
    def group_of(self) -> dict[str, str]:
        """Category -> group."""
        return {category: group for group, categories in self.groups.items() for category in categories}

    @property
    def category_names(self) -> dict[str, str]:
        """Category -> what people call it, of all that are declared."""
        names: dict[str, str] = {}
        for categories in self.groups.values():
            names |= categories if isinstance(categories, dict) else {category: category for category in categories}
        return names


def normal(name: str) -> str:
    """The form in which names of tasks are compared."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def names_of(spec: TaskSpec) -> set[str]:
    """What the task may be called, in the form in which names are compared."""
    return {normal(name) for name in (spec.name, *spec.aliases)}


def task_names() -> list[str]:
    """All declared tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_task(name: str) -> TaskSpec:
    """The task of this name or alias, or of a YAML file. ConfigError with a near match if there is none."""
    if name.endswith((".yaml", ".yml")):
        return load_task(Path(name).expanduser())
    wanted = normal(name)
    if wanted in task_names():
        return _built_in(wanted)
    aliases = _aliases()
    if wanted in aliases:
        return _built_in(aliases[wanted])
    match = near(wanted, [*task_names(), *aliases])
    hint = f"did you mean {match!r}?" if match else "swift eval --list_tasks true shows all; a YAML file declares one of your own"
    raise ConfigError(f"unknown task {name!r}", hint=hint)


def task_table() -> tuple[list[str], list[list[str]]]:
    """What ``--list_tasks`` shows: the heads of columns, and a row a task. The first mode is the default."""
    heads = ["name", "modes", "shots", "language", "licence", "what it is"]
    specs = [_built_in(name) for name in task_names()]
    return heads, [
        [spec.name, " ".join(spec.modes), str(spec.shots.count), spec.language, spec.licence, _what(spec.title)] for spec in specs
    ]


def _what(title: str) -> str:
    """A title without the name before it and the authors behind it."""
    return re.sub(r"^[^,]*, | \(.*", "", title)


@functools.cache
def _aliases() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in task_names():
        for alias in _built_in(name).aliases:
            assert found.setdefault(normal(alias), name) == name, f"two tasks have the alias {alias}"
    return found


@functools.cache
def _built_in(name: str) -> TaskSpec:
    return load_task(FOLDER / f"{name}.yaml")


def load_task(path: Path) -> TaskSpec:
    """The declaration in a YAML file; ConfigError names the file and what is wrong in it."""
    raw = _read_yaml(path)
    modes = raw.get("modes")
    if not isinstance(modes, dict):
        modes = {}
    _check_names(path, "modes", modes, MODE_KINDS)
    made = {name: _convert(path, f"modes.{name}", value, MODE_KINDS[name]) for name, value in modes.items()}
    spec = _convert(path, "", {**raw, "modes": {}}, TaskSpec)
    if not made and spec.python is None:
        raise ConfigError(f"{path}: no mode is declared", hint=f"declare one of {', '.join(MODE_KINDS)} under modes:")
    if not re.fullmatch(r"\w[\w.-]*", spec.name):
        raise ConfigError(f"{path}: name is {spec.name!r}", hint="files are named by it: use letters, digits, _, - and .")
    if none := next((name for name, mode in made.items() if not mode.metrics), None):
        raise ConfigError(f"{path}: modes.{none} has no metrics", hint="leave metrics out for those that the mode has by default")
    whole: TaskSpec = msgspec.structs.replace(spec, modes=made)
    _check_splits(path, whole)
    return whole


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as problem:
        raise ConfigError(f"{path}: {problem.strerror}", hint="name a YAML file that declares a task") from None
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path} is not UTF-8 (byte {problem.start})", hint="save it as UTF-8") from None
    except yaml.YAMLError as problem:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} declares no task", hint="a task has name, title, licence, source, split and modes")
    return raw


def _convert(path: Path, place: str, raw: Any, kind: Any) -> Any:
    if isinstance(raw, dict):
        _check_fields(path, place, raw, kind)
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as problem:
        where = f": {place}" if place else ""
        raise ConfigError(f"{path}{where}: {problem}") from None


def _check_fields(path: Path, place: str, raw: Mapping[str, Any], kind: type[msgspec.Struct]) -> None:
    """ConfigError with a near match for the first field that ``kind``, or a part of it, does not have."""
    _check_names(path, place, raw, kind.__struct_fields__)
    below: Any = {"source": Source, "shots": Shots, "layouts": Layout, "drop": Drop}
    for name, value in raw.items():
        if name not in below:
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _check_fields(path, f"{place}.{name}".lstrip("."), part, below[name])


def _check_names(path: Path, place: str, given: Mapping[str, Any], known: Any) -> None:
    for name in given:
        if name not in known:
            match = near(str(name), known)
            where = f" in {place}" if place else ""
            raise ConfigError(
                f"{path}: unknown field {str(name)!r}{where}", hint=f"did you mean {match!r}?" if match else f"known: {', '.join(known)}"
            )


def _check_splits(path: Path, spec: TaskSpec) -> None:
    known: Sequence[str] = sorted({split for layout in spec.source.layouts for split in layout.splits})
    for what, split in (("split", spec.split), ("shots.split", spec.shots.split)):
        if split is not None and split not in known:
            match = near(split, known)
            hint = f"did you mean {match!r}?" if match else f"declared: {', '.join(known)}"
            raise ConfigError(f"{path}: {what} is {split!r}, which no layout has", hint=hint)
    if spec.shots.count > len(spec.shots.rows) and spec.shots.split is None:
        raise ConfigError(f"{path}: shots.count is {spec.shots.count}, but there is no shots.split to take them from")
