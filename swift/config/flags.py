"""Flags: an argparse parser made from a config class, and a command line read into a config."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from swift.config import compat
from swift.config.options import Config, build, default_of, is_bool, is_list, of_checkpoint, options_of, refuse_unless_inert, type_name
from swift.errors import ConfigError

C = TypeVar("C", bound=Config)


def make_parser(cls: type[Config], command: str, summary: str) -> argparse.ArgumentParser:
    """The parser of ``command``; values stay strings, ``build`` converts them."""
    parser = argparse.ArgumentParser(
        prog=f"swift {command}",
        usage=_usage(cls, command),
        epilog="Every other option of ms-swift and of transformers.TrainingArguments is known, and refused with its reason.",
        description=summary,
        allow_abbrev=False,
        formatter_class=_formatter(),
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[type[Config], Any] = {}
    for field in options_of(cls):
        owner = _owner(cls, field.name)
        if owner not in groups:
            title = (owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip(".")
            groups[owner] = parser.add_argument_group(title)
        _add(groups[owner], field)
    return parser


def _usage(cls: type[Config], command: str) -> str:
    named = [field.name.upper() for field in options_of(cls) if field.metadata["positional"]]
    return " ".join(["swift", command, *(named or ["[RECIPE.yaml]"]), "[OPTIONS]"])


def _add(group: Any, field: Any) -> None:
    kind, default = field.type, default_of(field)
    shown = "" if default in (None, [], {}, "") else f" (default: {str(default).lower() if is_bool(kind) else default})"
    help_text = (field.metadata["help"] + shown).replace("%", "%%")
    names = field.metadata["choices"]
    metavar = "|".join(names) if names and len("|".join(names)) < 40 else type_name(kind).upper().replace(" OR ", "|")
    if field.metadata["positional"]:
        nargs = "*" if is_list(kind) else "?"
        group.add_argument(field.name, nargs=nargs, help=help_text, metavar=field.name.upper())
        return
    if is_list(kind):
        group.add_argument(f"--{field.name}", nargs="*", help=help_text, metavar="VALUE")
    elif is_bool(kind):
        group.add_argument(f"--{field.name}", nargs="?", const="true", help=help_text, metavar="true|false")
    else:
        group.add_argument(f"--{field.name}", help=help_text, metavar=metavar)


def _owner(cls: type[Config], name: str) -> type[Config]:
    """The group class that declares ``name``: the last one in the order of inheritance that has it."""
    return [base for base in cls.__mro__ if name in getattr(base, "__annotations__", {})][-1]


def _formatter() -> Any:
    if sys.stdout.isatty():
        from rich_argparse import RichHelpFormatter

        return RichHelpFormatter
    return argparse.HelpFormatter


def parse(
    cls: type[C],
    command: str,
    summary: str,
    argv: Sequence[str],
    *,
    checkpoint: Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]] | None] | None = None,
) -> C:
    """The config that ``argv`` describes; a first argument that ends in .yaml or .json is the recipe.

    ``checkpoint`` is asked, with what the user said, for the values that a checkpoint has saved.
    """
    words = list(argv)
    recipe: tuple[str, Mapping[str, Any]] = ("recipe", {})
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        path = words.pop(0)
        recipe = (f"recipe {path}", read_recipe(path))
    parser = make_parser(cls, command, summary)
    given = vars(_parse(parser, normalise(cls, words)))
    said = {**recipe[1], **given}
    layers = [recipe, ("flag", given)]
    saved = checkpoint(said) if checkpoint else None
    if saved:
        layers.insert(0, (saved[0], of_checkpoint(cls, saved[1])))
    return build(cls, *layers)


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    def fail(message: str) -> Any:
        raise ConfigError(message, hint=f"{parser.prog} --help shows how it is used")

    parser.error = fail  # type: ignore[method-assign]
    namespace, rest = parser.parse_known_args(list(words))
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}", hint=f"{parser.prog} --help shows how it is used")
    return namespace


def normalise(cls: type[Config], words: Sequence[str]) -> list[str]:
    """``words`` with today's option names, one token a name or value; refused options raise or, inert, go."""
    from swift import console

    out: list[str] = []
    seen: set[str] = set()
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "--":  # what follows is not ours to read
            return [*out, *words[index - 1 :]]
        if not word.startswith("--") or word == "--help":
            out.append(word)
            continue
        name, equals, inline = word[2:].partition("=")
        values = [inline] if equals else []
        while not equals and index < len(words) and not _is_flag(words[index]):
            values.append(words[index])
            index += 1
        raw: Any = (values[0] if len(values) == 1 else values) if values else "true"
        name, raw, note = compat.modern(name.replace("-", "_"), raw)
        if note:
            console.notice(note)
        if name not in cls.__dataclass_fields__:
            refuse_unless_inert(cls, name, raw)
            continue
        if name in seen:
            raise ConfigError(f"--{name} is given twice", hint="give it once, with all its values")
        seen.add(name)
        values = (list(raw) if isinstance(raw, list) else [str(raw)]) if values else []
        out += (
            [f"--{name}={values[0]}"] if len(values) == 1 and not is_list(cls.__dataclass_fields__[name].type) else [f"--{name}", *values]
        )
    return out


def _is_flag(word: str) -> bool:
    return word.startswith("--") or word == "-h"


def read_recipe(path: str) -> Mapping[str, Any]:
    """The mapping in a YAML or JSON file; ConfigError if it cannot be read or is no mapping."""
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read the recipe {path}: {problem}") from None
    except yaml.YAMLError as problem:
        raise ConfigError(f"the recipe {path} is not YAML: {' '.join(str(problem).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"the recipe {path} must be a mapping of option names to values")
    return loaded
