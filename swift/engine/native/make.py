"""The native engine for a model and the options of a command."""

from dataclasses import replace
from typing import Any

import torch

from swift import console
from swift.config.generate import GenerateConfig
from swift.engine.native.compiled import kernels
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.engine.native.mapped import layer_by_layer, lies_in_files
from swift.engine.native.packed import pack_quantized
from swift.errors import ConfigError, MachineError, ModelError
from swift.model.load import Loaded
from swift.model.quantized.linear import QuantizedLinear


def make(loaded: Loaded, config: GenerateConfig) -> NativeEngine:
    """As the options say. Without a C++ compiler torch's own kernels compute, unless --weight_format asks for others."""
    options = NativeOptions(
        weights=_weights(loaded, config.weight_format),
        kv_cache_bytes=int(config.kv_cache_gib * 2**30),
        max_num_seqs=config.max_batch_size or 64,
        max_num_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        shares_prefixes=config.enable_prefix_caching,
        num_guessed=config.num_speculative_tokens,
    )
    loaded = _merged(loaded)
    if options.weights is None:
        return NativeEngine(loaded, options)
    if config.scores_first and config.weight_format is None and lies_in_files(loaded.model):
        with layer_by_layer(loaded.model):
            return NativeEngine(loaded, replace(options, packs_late=True))
    pack_quantized(loaded.model, options.weights)  # first, for the trials that follow
    return NativeEngine(loaded, options)


def _merged(loaded: Loaded) -> Loaded:
    """With the adapter in the weights, unless these are quantized, which would lose of it. ModelError for one that cannot be."""
    model = loaded.model
    if not hasattr(model, "peft_config") or getattr(model, "is_quantized", False):
        return loaded
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ModelError("the native engine cannot run this model: its adapter puts tokens before the prompt")
    return replace(loaded, model=model.merge_and_unload().eval())


def _weights(loaded: Loaded, wanted: str | None) -> Any:
    if wanted == "torch":
        return None
    if loaded.device.type != "cpu" or loaded.dtype != torch.float32 or _is_foreign(loaded.model):
        if wanted is not None:
            kind = f"{str(loaded.dtype).removeprefix('torch.')} on {loaded.device}"
            raise ConfigError(
                f"--weight_format {wanted} is for a model in float32 on a CPU, not {kind}", hint="remove it, or say --torch_dtype float32"
            )
        return None
    try:
        kernels()
    except MachineError as problem:
        if wanted is not None:
            raise
        console.notice(f"{problem}; torch's own kernels are used, which are slower" + (f" ({problem.hint})" if problem.hint else ""))
        return None
    return wanted or "auto"


def _is_foreign(model: Any) -> bool:
    """Whether the weights are in few bits that another package alone can read."""
    return getattr(model, "is_quantized", False) and not any(isinstance(module, QuantizedLinear) for module in model.modules())
