"""Load a language model and its tokenizer, or its processor if it reads images too, from a snapshot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swift import deps
from swift.errors import ModelError, first_line
from swift.model.device import DTYPES, choose_device, choose_dtype
from swift.model.files import read_config
from swift.model.quantized import FORMATS, format_of
from swift.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Quantization:
    """Quantization of the frozen weights on load, by bitsandbytes."""

    bits: int
    compute_dtype: torch.dtype
    quant_type: str = "nf4"
    double_quant: bool = True


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its tokenizer, and why it has the precision it has; its processor if it reads images."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    processor: Any = None


def checkpoint_dtype(path: Path) -> torch.dtype:
    """The precision that config.json states; float32 if it states none."""
    config = read_config(path)
    name = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype") or "float32"
    return DTYPES.get(str(name).removeprefix("torch."), torch.float32)


def context_length(path: Path) -> int | None:
    """The longest sequence in tokens that config.json allows, or None if it does not say."""
    config = read_config(path)
    for place in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"):
            if isinstance(place.get(key), int):
                return int(place[key])
    return None


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's and those of the model's generation_config."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None})


def load_model(
    path: Path,
    *,
    torch_dtype: str | None = None,
    attn_impl: str | None = None,
    device: str | None = None,
    quantization: Quantization | None = None,
    chat_template: str | None = None,
    processor: Any = None,
    dense: bool = False,
    rounds_inputs: bool = False,
) -> Loaded:
    """The model in ``path`` in evaluation mode on its device, with its tokenizer; with a ``processor``, as one that reads images.

    Layers of a quantized checkpoint keep their few bits (QuantizedLinear); with ``dense`` they become floating-point numbers.
    Their inputs are rounded to 8 bits, where the checkpoint asks for it, with ``rounds_inputs`` alone: it gives what an engine
    that multiplies in 8 bits computes, while inputs as they are give better answers and gradients.
    Raises ModelError for a damaged or unknown model, MachineError for a device that is not there.
    """
    target = choose_device(device)
    dtype, reason = choose_dtype(torch_dtype, checkpoint_dtype(path), target)
    tokenizer = load_tokenizer(path, chat_template=chat_template) if processor is None else processor.tokenizer
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    if attn_impl is not None:
        arguments["attn_implementation"] = attn_impl
    stored = quantization_of(path)
    if stored and quantization is not None:
        raise ModelError(f"{path}: its weights are quantized already ({stored.get('quant_method')})", hint="leave --quant_method away")
    if quantization is not None:
        arguments["quantization_config"] = _bitsandbytes(quantization)
    elif stored:
        arguments |= _as_stored(path, stored, dtype, rounds_inputs)
    on_device = quantization is not None or format_of(stored) == "bnb"
    if on_device:
        arguments["device_map"] = {"": str(target)}
    model = _from_pretrained(path, arguments, reads_images=processor is not None)
    if dense and stored:
        model = _densified(model, dtype)
    if not on_device:
        model.to(target)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings")
    return Loaded(model.eval(), tokenizer, target, dtype, reason, processor)


def _from_pretrained(path: Path, arguments: dict[str, Any], *, reads_images: bool) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    kind: Any = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    try:
        loaded: Any = kind.from_pretrained(path, output_loading_info=True, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as problem:
        hint = "it is damaged or not supported by the installed transformers; load it there to see more (or use --debug)"
        raise ModelError(f"{path}: the model cannot be loaded: {first_line(problem)}", hint=hint) from problem
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} weights are missing, the first is {missing[0]}", hint="fetch the model again; a shard may be absent"
        )
    return model


def quantization_of(path: Path) -> dict[str, Any]:
    """What config.json says of the quantization of the weights; empty if they are not quantized."""
    config = read_config(path)
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    return found if isinstance(found, dict) else {}


def _as_stored(path: Path, stored: dict[str, Any], dtype: torch.dtype, rounds_inputs: bool) -> dict[str, Any]:
    """Arguments that read a quantized checkpoint: our formats here, that of bitsandbytes by its package, others as transformers can."""
    kind = format_of(stored)
    if kind == "bnb":
        from transformers import AutoConfig

        deps.require("bitsandbytes", extra="bnb")
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        config.quantization_config = stored | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        return {"config": config}
    if kind not in FORMATS and _is_known_to_transformers(stored.get("quant_method")):
        return {}
    from swift.model.quantized.reading import config_for

    return {"config": config_for(path, stored, rounds_inputs=rounds_inputs)}


def _is_known_to_transformers(method: Any) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return method != "gptq" and method in AUTO_QUANTIZATION_CONFIG_MAPPING


def _densified(model: Any, dtype: torch.dtype) -> Any:
    from swift.model.quantized.linear import QuantizedLinear, densify

    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        densify(model)
        model.hf_quantizer.remove_quantization_config(model)
        return model
    return model.dequantize(dtype)


def _bitsandbytes(quantization: Quantization) -> Any:
    deps.require("bitsandbytes", extra="bnb")
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=quantization.compute_dtype,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
    )
