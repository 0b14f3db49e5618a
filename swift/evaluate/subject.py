"""What is evaluated: models, runs and checkpoints as the command names them, each with options of its own."""

import copy
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swift.config.backends import BackendsConfig
from swift.config.evaluate import EvalConfig
from swift.config.model import QuantConfig
from swift.config.options import default_of, of_checkpoint, options_of
from swift.config.saved import saved_options
from swift.engine.base import Engine
from swift.engine.load import make_engine, source_of
from swift.engine.source import Source
from swift.errors import CheckpointError, ConfigError
from swift.evaluate.written import remote_engine
from swift.files import sha256_file
from swift.model.checkpoints import adapter_folder

NO_PART_OF_ANSWERS = ("remote_api_key", "remote_timeout_s")
SAMPLES, SAMPLE = 256, 4096  # parts of a file of weights that tell it from others, and their bytes


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: ``name`` is what the user called it, ``config`` the options that hold for it."""

    name: str
    config: EvalConfig

    @property
    def is_remote(self) -> bool:
        """Whether a server answers, of which neither weights nor tokenizer are here."""
        return self.config.eval_url is not None

    @cached_property
    def source(self) -> Source:
        return source_of(self.config)

    @property
    def reader(self) -> Any:
        """The tokenizer, or the processor of a model that reads images."""
        return self.source.processor or self.source.tokenizer

    def engine(self) -> Engine:
        """What answers; weights are loaded here."""
        return remote_engine(self.config) if self.is_remote else make_engine(self.source)

    def engine_facts(self, engine: Engine) -> dict[str, Any]:
        """What computes."""
        if self.is_remote:
            return {"engine": self.config.eval_url}
        return {"engine": type(engine).__name__.removesuffix("Engine").lower(), **self.source.facts()}

    def free(self) -> None:
        """Let go of weights, if they were loaded; the next model gets their memory."""
        self.__dict__.pop("source", None)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What identifies it: name, a name for files, digest of its weights and settings."""
        slug = re.sub(r"[^\w.-]+", "-", Path(self.name).name or "model").strip("-") or "model"
        return {"name": self.name, "slug": slug, "digest": _digest_of_server(self.config) if self.is_remote else _digest(self.source)}


def subjects(config: EvalConfig) -> list[Subject]:
    """The models of ``config``, in their order. ConfigError if one is named twice."""
    if not config.models:
        name = config.adapters[0] if config.adapters else config.model or str(config.eval_url)
        return [Subject(name, config)]
    twice = [name for index, name in enumerate(config.models) if name in config.models[:index]]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice", hint="name each model once")
    return [Subject(name, _own(config, name)) for name in config.models]


def _own(config: EvalConfig, name: str) -> EvalConfig:
    """``config`` for the model ``name`` alone, with what a run has saved of how it is loaded and asked."""
    own = copy.copy(config)
    own.sources = dict(config.sources)
    if is_adapter(name):
        own.adapters = [name]
        said: dict[str, Any] = {"adapters": [name]}
    else:
        own.model = name
        said = {"model": name}
    saved = saved_options(said) if config.load_args else None
    if saved is not None:
        for option, value in of_checkpoint(EvalConfig, saved[1]).items():
            if not config.said(option) and option not in said:
                setattr(own, option, value)
                own.sources[option] = saved[0]
    return own


def is_adapter(name: str) -> bool:
    """Whether ``name`` is a run or checkpoint whose result is an adapter."""
    if not Path(name).is_dir() or (Path(name) / "config.json").is_file():
        return False
    try:
        return adapter_folder(name).is_dir()
    except CheckpointError:
        return False


def _digest_of_server(config: EvalConfig) -> str:
    """Of address and name: what is behind them cannot be seen."""
    return hashlib.sha256(f"{config.eval_url} {config.models or config.model}".encode()).hexdigest()


def _digest(source: Source) -> str:
    """Of settings and tokenizer, of an adapter, and of parts of the weights that lie all over their files."""
    made = hashlib.sha256()
    for file in sorted(source.path.iterdir()):
        if file.suffix in (".json", ".jinja", ".model") and file.is_file():
            made.update(f"{file.name} {sha256_file(file)}\n".encode())
        elif file.suffix == ".safetensors":
            made.update(f"{file.name} {_sampled(file)}\n".encode())
    if source.adapter is not None:
        for file in sorted(source.adapter.glob("adapter_*")):
            made.update(f"{file.name} {sha256_file(file)}\n".encode())
    config = source.config
    asked = [config.torch_dtype, config.weight_format, config.infer_backend, config.chat_template, config.max_model_len]
    made.update(repr([*asked, *_changed(config)]).encode())
    return made.hexdigest()


def _changed(config: EvalConfig) -> list[tuple[str, Any]]:
    """Options of quantizing and of engines that are not as by default, with their values: most of them change answers."""
    fields = [field for kind in (QuantConfig, BackendsConfig) for field in options_of(kind) if field.name not in NO_PART_OF_ANSWERS]
    return [(field.name, found) for field in fields if (found := getattr(config, field.name)) != default_of(field)]


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    made = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for number in range(SAMPLES):
            opened.seek(max(0, size - SAMPLE) * number // (SAMPLES - 1))
            made.update(opened.read(SAMPLE))
    return made.hexdigest()
