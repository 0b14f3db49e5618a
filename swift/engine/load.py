"""A model that is ready to answer: base, adapters, tokenizer, sampling."""

import json
from pathlib import Path
from typing import Any

from swift import hub
from swift.config.generate import GenerateConfig
from swift.config.model import ModelConfig, QuantConfig
from swift.engine.text import Sampling
from swift.errors import ConfigError
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.device import DTYPES
from swift.model.load import Loaded, Quantization, load_model
from swift.model.template import read_template
from swift.tuner.adapter import ADAPTER_CONFIG, with_adapter


def base_reference(config: ModelConfig) -> str:
    """The model that ``config`` names, or that its adapter was trained on."""
    if config.model is not None:
        return model_reference(config.model)
    if not config.adapters:
        raise ConfigError("no model is given", hint="say --model PATH or --adapters RUN")
    settings = json.loads((adapter_folder(config.adapters[0]) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if not settings.get("base_model_name_or_path"):
        raise ConfigError(f"the adapter {config.adapters[0]} does not say which model it is for", hint="say --model too")
    return str(settings["base_model_name_or_path"])


def load_for_inference(config: ModelConfig, *, merge: bool = False) -> Loaded:
    """The model of ``config`` with its adapter, in evaluation mode."""
    if len(config.adapters) > 1:
        raise ConfigError(f"--adapters takes one adapter here, not {len(config.adapters)}", hint="run them one after the other")
    folder = adapter_folder(config.adapters[0]) if config.adapters else None
    snapshot = hub.resolve(
        base_reference(config), config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline
    )
    loaded = load_model(
        snapshot.path,
        torch_dtype=config.torch_dtype,
        attn_impl=config.attn_impl,
        device=config.device,
        quantization=quantization(config) if isinstance(config, QuantConfig) else None,
        chat_template=read_template(config.chat_template),
    )
    if folder is None:
        return loaded
    model = with_adapter(loaded.model, folder)
    if merge:
        model = model.merge_and_unload()
    return Loaded(model, loaded.tokenizer, loaded.device, loaded.dtype, loaded.dtype_reason)


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
        stop_words=list(config.stop_words),
        max_model_len=config.max_model_len,
    )


def adapter_or_model_path(config: ModelConfig) -> Path | None:
    """The local folder that results belong to: the adapter's, or the model's if it is local."""
    if config.adapters:
        return adapter_folder(config.adapters[0])
    path = Path(model_reference(config.model or ""))
    return path if path.is_dir() else None
