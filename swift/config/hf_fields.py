"""The fields of transformers.TrainingArguments, read from the installed source without importing it."""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from swift.errors import DependencyError

_INSTALL = "pip install -U transformers"


@dataclass(frozen=True)
class HfField:
    """One field: ``type`` as the source spells it, ``default`` as one would write it on a command line."""

    name: str
    type: str
    default: str
    help: str


@cache
def training_arguments() -> dict[str, HfField]:
    """The fields by name, in the order of the source, inherited ones first.

    A default that depends on the installation (``optim``) is the last one that the source assigns.
    Raises DependencyError if transformers, or the class in it, is not there.
    """
    return _fields_of("TrainingArguments", _source_path("training_args"))


def _source_path(module: str) -> Path:
    """The file of ``transformers.<module>``; finding a top-level package does not import it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None:
        raise DependencyError("the package transformers is not installed", hint=_INSTALL)
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / f"{module}.py"
        if path.is_file():
            return path
    raise DependencyError(f"the installed transformers has no module {module}", hint=_INSTALL)


def _fields_of(class_name: str, path: Path) -> dict[str, HfField]:
    tree = _parse(path)
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    if not found:
        raise DependencyError(f"the installed transformers has no class {class_name} in {path.name}", hint=_INSTALL)
    fields: dict[str, HfField] = {}
    for base in reversed(found[0].bases):
        if isinstance(base, ast.Name):
            fields |= _fields_of_base(base.id, tree, path)
    constants = _constants(found[0])
    for statement in found[0].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = _field(statement.target.id, statement, constants)
            if field is not None:
                fields[field.name] = field
    return fields


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _fields_of_base(name: str, tree: ast.Module, path: Path) -> dict[str, HfField]:
    """The fields of a base class of the same file or of a neighbour; other bases bring no option."""
    if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
        return _fields_of(name, path)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _fields_of(alias.name, _source_path(node.module))
    return {}


def _constants(owner: ast.ClassDef) -> dict[str, ast.expr]:
    """What the body of ``owner``, its ``if`` blocks included, assigns to plain names."""
    values: dict[str, ast.expr] = {}
    pending: list[ast.stmt] = list(owner.body)
    while pending:
        statement = pending.pop(0)
        if isinstance(statement, ast.If):
            pending = [*statement.body, *pending]
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = statement.value
    return values


def _field(name: str, statement: ast.AnnAssign, constants: dict[str, ast.expr]) -> HfField | None:
    """The field that ``statement`` declares, or None for a class variable or a field without ``init``."""
    kind = ast.unparse(statement.annotation)
    if kind.startswith(("ClassVar", "typing.ClassVar")):
        return None
    default, help_text = statement.value, ""
    if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
        given = {keyword.arg: keyword.value for keyword in default.keywords}
        if "init" in given and ast.unparse(given["init"]) == "False":
            return None
        default = given.get("default", given.get("default_factory"))
        help_text = _help(given.get("metadata"))
    if isinstance(default, ast.Name):
        default = constants.get(default.id, default)
    return HfField(name=name, type=kind, default=_spelled(default), help=help_text)


def _help(metadata: ast.expr | None) -> str:
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
                return " ".join(str(value.value).replace("%%", "%").split())
    return ""


def _spelled(default: ast.expr | None) -> str:
    """A default as one would write it on a command line; an empty list or dict is an empty text."""
    if default is None:
        return ""
    try:
        value = ast.literal_eval(default)
    except ValueError:
        source = ast.unparse(default)
        return "" if source in ("list", "dict") else source
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "" if value in ([], {}) else str(value)
