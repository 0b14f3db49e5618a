"""Whether DeepSpeed knows each of the settings: asked of its own reader of them."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from swift.errors import ConfigError, first_line, near
from swift.parallel.deepspeed import package
from swift.parallel.deepspeed.settings import autos, stage, value_at

BATCH = "train_micro_batch_size_per_gpu"
WHOLE = ("adafactor", "lbfgs", "sparseadam")  # torch has them, and DeepSpeed would give each a part, flattened
SIZES = (BATCH, "train_batch_size", "gradient_accumulation_steps")  # which are filled in, and fit each other


def check(settings: dict[str, Any], name: str) -> None:
    """ConfigError for a setting that DeepSpeed does not know, or a value that it does not take. ``name`` tells whose they are.

    Its reader is run on a dictionary that notes which keys are looked for: what nobody looks for is unknown. Sections that
    are pydantic models refuse unknown keys themselves.
    """
    for key, value in settings.items():
        noting = _read({BATCH: 1, key: value} if key not in SIZES else {BATCH: 1}, name, key)
        if key not in noting.asked:
            raise _unknown(name, "", key, noting.asked)
        section = dict.__getitem__(noting, key) if key in noting else None
        if isinstance(section, _Noting) and section.asked and not _refuses_unknown_keys(key):
            for inner in value:
                if inner not in section.asked:
                    raise _unknown(name, f"{key}.", inner, section.asked)
    for key in autos(settings):
        if "." not in key or key.startswith("optimizer."):
            raise ConfigError(f'{name}: {key} cannot be "auto"', hint="write a value, or leave it away")
    _check_optimizer(settings, name)
    _read({key: value for key, value in settings.items() if key not in SIZES} | {BATCH: 1}, name, "")


class _Noting(dict[str, Any]):
    """A dictionary that notes the keys it is asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: _Noting(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    """The keys of a dictionary that notes."""

    def __init__(self, owner: _Noting) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Iterator[str]:
        return iter(self.owner)


def _read(settings: dict[str, Any], name: str, section: str) -> _Noting:
    noting = _Noting(settings)
    try:
        package.part("deepspeed.runtime.config").DeepSpeedConfig(noting)
    except Exception as problem:  # the reader raises what comes: AssertionError, KeyError, TypeError, ValueError, its own
        raise _explained(problem, name, section) from None
    return noting


def _refuses_unknown_keys(section: str) -> bool:
    with contextlib.suppress(ConfigError):
        _read({BATCH: 1, section: {"no such key": 0}}, "", section)
        return False
    return True


def _explained(problem: Exception, name: str, section: str) -> ConfigError:
    """One line for what the reader says of ``section``."""
    if not hasattr(problem, "errors"):
        return ConfigError(f"{name}: {section}{': ' if section else ''}{first_line(problem)}")
    first = problem.errors()[0]  # of pydantic
    *outer, last = [part for part in (section, *map(str, first["loc"])) if part]
    if first["type"] == "extra_forbidden":
        return _unknown(name, "".join(f"{part}." for part in outer), last, _fields())
    value = first.get("input")
    shown = f"not {value!r}" if not isinstance(value, dict) else "is wrong"
    return ConfigError(f"{name}: {'.'.join([*outer, last])} {shown}: {first['msg']}")


def _unknown(name: str, prefix: str, key: str, known: Iterable[str]) -> ConfigError:
    match = near(key, known)
    return ConfigError(f"{name}: DeepSpeed does not know {prefix}{key}", hint=f"did you mean {match}?" if match else "remove it")


def _fields() -> set[str]:
    """The keys of all sections that are pydantic models."""
    models, found = [package.part("deepspeed.runtime.config_utils").DeepSpeedConfigModel], set()
    while models:
        model = models.pop()
        models += model.__subclasses__()
        found |= {field.alias or each for each, field in model.model_fields.items()}
    return found


def _check_optimizer(settings: dict[str, Any], name: str) -> None:
    """ConfigError for an optimizer that neither DeepSpeed nor torch has, or one of Adam's arguments that it does not take."""
    kind = value_at(settings, "optimizer.type")
    if kind is None:
        return
    import torch

    own = package.part("deepspeed.runtime.config").DEEPSPEED_OPTIMIZERS
    if kind.lower() not in own and not isinstance(getattr(torch.optim, kind, None), type):
        raise _unknown(name, "optimizer.type ", kind, {*own, "AdamW", "Adam", "SGD", "Adagrad", "RMSprop"})
    if kind.lower() in WHOLE and stage(settings):
        raise ConfigError(
            f"{name}: optimizer.type {kind} looks at whole matrices, of which each process has a part", hint="use AdamW, or stage 0"
        )
    if kind.lower() in ("adam", "adamw"):
        adam = package.part("deepspeed.ops.adam")
        known = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
        for each in (torch.optim.AdamW, adam.DeepSpeedCPUAdam, adam.FusedAdam):
            known |= set(inspect.signature(each.__init__).parameters)
        for key in settings["optimizer"].get("params", {}):
            if key not in known:
                raise _unknown(name, "optimizer.params.", key, known)
