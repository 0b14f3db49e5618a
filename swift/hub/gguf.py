"""GGUF files become folders that transformers loads: weights dequantized once, tokenizer and chat template kept."""

from pathlib import Path
from typing import Any

from swift import console, deps
from swift.errors import ModelError


def convert(file: Path, folder: Path) -> None:
    """Write config, tokenizer and float32 safetensors of the GGUF ``file`` into ``folder``.

    float32, because a dequantized weight d * q + m needs more bits than any 16-bit format has: stored so, the values
    are exactly those that the file means.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    deps.require("gguf", extra="gguf")
    hf_logging.disable_progress_bar()
    console.say(f"converting {file.name} to safetensors; this is done once")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as problem:
        raise ModelError(f"{file} cannot be converted: {str(problem).splitlines()[0]}") from problem
    _name_tokens(tokenizer, read_metadata(file))
    model = _without_quantization(loaded)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _without_quantization(loaded: Any) -> Any:
    """The same weights in a model that can be saved: transformers refuses to save one that it read from GGUF."""
    import copy

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model


def read_metadata(file: Path) -> dict[str, Any]:
    """The key-value part of a GGUF file, without its arrays; ModelError if it is no GGUF."""
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError) as problem:
        raise ModelError(f"{file} is no readable GGUF file: {problem}") from None
    return {key: field.contents() for key, field in reader.fields.items() if field.types and field.types[0] != GGUFValueType.ARRAY}


def _name_tokens(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Special tokens and the chat template as the file's metadata says, where the conversion left them out."""
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(index)))
    template = metadata.get("tokenizer.chat_template")
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
