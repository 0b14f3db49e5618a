"""What answers: the model on disk that the options name, the engine for it, and its sampling."""

from pathlib import Path
from typing import Any

from swift import console, hub
from swift.config.generate import GenerateConfig
from swift.config.model import ModelConfig, QuantConfig
from swift.engine import ENGINES
from swift.engine.base import Engine, Sampling
from swift.engine.source import Source
from swift.errors import ConfigError, ModelError
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.device import DTYPES
from swift.model.load import Loaded, Quantization
from swift.tuner.adapter import base_reference


def source_of(config: Any, *, merge: bool = False) -> Source:
    """The model of ``config`` with its adapter, on disk; ``merge`` puts the adapter into the weights when they are loaded."""
    if len(config.adapters) > 1:
        raise ConfigError(f"--adapters takes one adapter here, not {len(config.adapters)}", hint="run them one after the other")
    folder = adapter_folder(config.adapters[0]) if config.adapters else None
    snapshot = hub.resolve(
        base_reference(config), config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline
    )
    return Source(snapshot.path, config, folder, merge, quantization(config) if isinstance(config, QuantConfig) else None)


def load_for_inference(config: ModelConfig, *, merge: bool = False) -> Loaded:
    """The model of ``config`` with its adapter, in torch, in evaluation mode."""
    return source_of(config, merge=merge).loaded


def quantization(config: Any) -> Quantization | None:
    """What --quant_method and --quant_bits ask for."""
    if config.quant_method is None:
        return None
    compute = config.bnb_4bit_compute_dtype or config.torch_dtype or "float32"
    return Quantization(config.quant_bits or 4, DTYPES[compute], config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)


def sampling(config: GenerateConfig) -> Sampling:
    return Sampling(
        max_new_tokens=config.max_new_tokens or 2048,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        num_beams=config.num_beams,
        stop_words=tuple(config.stop_words),
        logprobs=(config.top_logprobs or 0) if config.logprobs else None,
        max_model_len=config.max_model_len,
    )


def make_engine(source: Source) -> Engine:
    """The engine of --infer_backend; without it the native one, or transformers' where that cannot run the model or the request."""
    config = source.config
    if config.infer_backend is not None:
        return make_engine_of(config.infer_backend, source)
    if config.num_beams > 1:
        return make_engine_of("transformers", source)
    try:
        return make_engine_of("native", source)
    except ModelError as problem:
        console.notice(f"{problem}; transformers' generate is used")
        return make_engine_of("transformers", source)


def make_engine_of(name: str, source: Source) -> Engine:
    engine: Engine = ENGINES.get(name)(source)
    return engine


def make_native(source: Source) -> Engine:
    """The native engine, which computes with the weights in torch."""
    from swift.engine.native.make import make

    return make(source.loaded, source.config)


def make_transformers(source: Source) -> Engine:
    """transformers' generate, with the weights in torch."""
    from swift.engine.transformers import make

    return make(source.loaded, source.config)


def adapter_or_model_path(config: ModelConfig) -> Path | None:
    """The local folder that results belong to: the adapter's, or the model's if it is local."""
    if config.adapters:
        return adapter_folder(config.adapters[0])
    path = Path(model_reference(config.model or ""))
    return path if path.is_dir() else None
