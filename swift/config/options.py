"""The bridge between a config class and its three front ends: flags, YAML recipe, Python arguments.

A config is a keyword-only dataclass whose fields are made by ``opt``. ``build`` turns raw values, each
with the place it came from, into a checked config. Precedence: flag > recipe > checkpoint > default.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from swift.config import compat
from swift.errors import ConfigError, near

C = TypeVar("C", bound="Config")


def opt(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    refused: Mapping[str, str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
    saved: bool = True,
) -> Any:
    """A field of a config: ``help`` says what it does and its unit, ``minimum``/``maximum`` are inclusive.

    ``refused`` are values that users know from elsewhere, each with the reason why it is none of ``choices``.
    ``saved`` is False for options that say how to run rather than what to do; a run does not save them.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "refused": refused or {},
        "minimum": minimum,
        "maximum": maximum,
        "positional": positional,
        "saved": saved,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Config:
    """Base of all configs. ``sources`` says for each field given by somebody where its value came from."""

    def __post_init__(self) -> None:
        self.sources: dict[str, str] = {}

    def check(self) -> None:
        """Raise ConfigError for values that cannot go together. Groups extend it and call super().check()."""

    @classmethod
    def takes_of_checkpoint(cls, name: str) -> bool:
        """Whether what a checkpoint has saved as ``name`` fills an option here, where it means the same."""
        return name in cls.__dataclass_fields__

    def given(self, name: str) -> bool:
        """Whether the user set ``name``, now and here, to something other than its default."""
        return self.said(name) and bool(getattr(self, name) != default_of(field_named(type(self), name)))

    def said(self, name: str) -> bool:
        """Whether the user set ``name``, now and here, to anything."""
        return not self.sources.get(name, "derived").startswith(("derived", "checkpoint"))

    def refuse_without_effect(self, names: Sequence[str], because: str) -> None:
        """ConfigError for the first of ``names`` that was given, since it would have no effect."""
        for name in names:
            if self.given(name):
                raise ConfigError(f"--{name} has no effect {because}", hint=f"remove --{name}")

    def derive(self, name: str, value: Any, reason: str) -> None:
        """Fill an option that was left open, and remember why."""
        setattr(self, name, value)
        self.sources[name] = f"derived: {reason}"


def options_of(cls: type[Config]) -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(cls))


def field_named(cls: type[Config], name: str) -> dataclasses.Field[Any]:
    return cls.__dataclass_fields__[name]


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def is_list(kind: Any) -> bool:
    return any(get_origin(part) is list or part is list for part in _parts(kind))


def is_bool(kind: Any) -> bool:
    return bool in _parts(kind)


def type_name(kind: Any) -> str:
    names = [getattr(part, "__name__", str(part)) for part in _parts(kind) if part is not NoneType]
    return " or ".join(names)


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is UnionType or isinstance(kind, UnionType) else (kind,)


def of_checkpoint(cls: type[Config], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a checkpoint has ``saved`` the values that ``cls`` takes."""
    return {name: value for name, value in saved.items() if cls.takes_of_checkpoint(name)}


def build(cls: type[C], *layers: tuple[str, Mapping[str, Any]]) -> C:
    """A checked ``cls`` from ``layers`` of (source, values), the strongest last.

    Names may be old spellings; unknown names raise ConfigError with a near match. ``None`` in a layer
    means "not said". Values may be strings as typed on a command line.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for name, raw in resolve_names(cls, layer).items():
            values[name] = convert(field_named(cls, name), raw)
            sources[name] = source
    config = cls(**values)
    config.sources = sources
    config.check()
    return config


def resolve_names(cls: type[Config], layer: Mapping[str, Any]) -> dict[str, Any]:
    """``layer`` with today's names; inert refused options are dropped, others raise ConfigError."""
    from swift import console

    resolved: dict[str, Any] = {}
    for old, raw in layer.items():
        name, value, note = compat.modern(old.replace("-", "_"), raw)
        if note:
            console.notice(note)
        if name in cls.__dataclass_fields__:
            if name in resolved and resolved[name] != value:
                raise ConfigError(f"--{name} is given twice, with different values", hint=f"--{old} is its old name")
            resolved[name] = value
            continue
        refuse_unless_inert(cls, name, value)
    return resolved


def refuse_unless_inert(cls: type[Config], name: str, value: Any) -> None:
    """ConfigError for a name that ``cls`` does not have, unless ``value`` asks for what happens anyway.

    That is an accepted value of a refused option, or the default of one that belongs to another command.
    """
    refusal = compat.refusal(name)
    if refusal is not None:
        if refusal.is_inert(value):
            return
        raise ConfigError(f"option --{name} is not available: {refusal.reason}", hint=_hint_for(refusal.accepts, name))
    elsewhere = {other.__dataclass_fields__[name] for other in _descendants(Config) if name in other.__dataclass_fields__}
    if elsewhere:
        if all(_is_default(field, value) for field in elsewhere):
            return
        hint = compat.elsewhere(name) or f"remove --{name}"
        raise ConfigError(f"option --{name} has no effect here: it belongs to another command", hint=hint)
    match = near(name, cls.__dataclass_fields__)
    hint = f"did you mean --{match}?" if match else "see --help for all options"
    raise ConfigError(f"unknown option --{name}", hint=hint)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    try:
        return bool(convert(field, value) == default_of(field))
    except ConfigError:
        return False


def _descendants(cls: type[Config]) -> Iterator[type[Config]]:
    """The configs of all commands and groups that are loaded."""
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


def _hint_for(accepts: Sequence[str], name: str) -> str:
    return f"remove it, or say --{name} {accepts[0]}" if accepts else "remove it"


def convert(field: dataclasses.Field[Any], raw: Any) -> Any:
    """``raw`` as the type of ``field``; ConfigError says what was expected."""
    import msgspec

    kind = field.type
    if isinstance(raw, list) and len(raw) == 1 and not is_list(kind):
        raw = raw[0]
    if isinstance(raw, str):
        if raw.lower() in ("none", "null") and NoneType in _parts(kind):
            return None
        if dict in [get_origin(part) or part for part in _parts(kind)]:
            raw = _json(field.name, raw)
        elif is_list(kind):
            raw = [raw]
        elif is_bool(kind):
            raw = raw.lower()
    if isinstance(raw, int | float) and not isinstance(raw, bool) and str in _parts(kind) and not {int, float} & set(_parts(kind)):
        raw = str(raw)
    if isinstance(raw, bool) and str in _parts(kind) and bool not in _parts(kind):
        raw = str(raw).lower()  # YAML reads true as a truth value where an option takes the word
    if isinstance(raw, os.PathLike):
        raw = os.fspath(raw)
    try:
        value = msgspec.convert(raw, kind, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"--{field.name} takes {type_name(kind)}, not {raw!r}") from None
    _check_range(field, value)
    return value


def _json(name: str, text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise ConfigError(f"--{name} takes a JSON object; {text!r} is not JSON: {problem}") from None


def _check_range(field: dataclasses.Field[Any], value: Any) -> None:
    choices, low, high = (field.metadata[key] for key in ("choices", "minimum", "maximum"))
    if value is None:
        return
    if choices is not None:
        for item in value if isinstance(value, list) else [value]:
            if item in field.metadata["refused"]:
                reason = field.metadata["refused"][item]
                raise ConfigError(f"--{field.name} {item} is not available: {reason}", hint=f"choose from: {', '.join(choices)}")
            if item not in choices:
                match = near(str(item), choices)
                hint = f"did you mean {match!r}?" if match else f"choose from: {', '.join(choices)}"
                raise ConfigError(f"--{field.name} does not know {item!r}", hint=hint)
    is_outside = isinstance(value, int | float) and (
        value != value or (low is not None and value < low) or (high is not None and value > high)
    )
    if is_outside:
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
        raise ConfigError(f"--{field.name} takes {bounds}, not {value}")


def to_dict(config: Config) -> dict[str, Any]:
    """What a run saves: all options that say what is done. Secrets are left out."""
    return {field.name: getattr(config, field.name) for field in options_of(type(config)) if field.metadata["saved"]}
