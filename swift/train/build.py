"""From options to a model that is ready to be tuned."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from swift import console
from swift.config.commands import ModelOptions, SftConfig
from swift.engine.load import quantization
from swift.errors import ConfigError
from swift.model.device import choose_device
from swift.model.load import Loaded, load_model, quantization_of
from swift.model.mapped import MappedWeights
from swift.model.noise import add_noise
from swift.model.policy import packing_fault
from swift.model.quantized import format_of
from swift.model.template import read_template
from swift.train.activations import checkpoint_activations
from swift.train.compile import check_backend
from swift.train.liger import check_device, use_liger_kernels
from swift.tuner.base import parameter_counts


def load_for_training(
    config: SftConfig | ModelOptions, path: Path, *, device: str | None = None, weights: MappedWeights | None = None
) -> Loaded:
    """The model with gradient checkpointing, quantization and noise as ``config`` says; on ``device`` if it is another than --device.

    What loading computes lies in ``weights``, if there are any.

    Weights that are trained themselves are float32 when the step computes in float16: their updates are too small for it.
    """
    stored = quantization_of(path)
    if stored:
        _check_tuner(config, path, str(stored.get("quant_method")))
    if config.use_liger_kernel:
        check_device(choose_device(config.device))
    if config.torch_compile:
        check_backend(config.torch_compile_backend or "inductor")
    if config.full_determinism:
        torch.use_deterministic_algorithms(True)
    torch_dtype = config.torch_dtype
    if not config.trains_adapter and (config.fp16 or (torch_dtype == "float16" and config.fp16 is None)):
        if torch_dtype == "float16":
            console.notice("full tuning in float16 keeps the weights in float32 and computes in float16")
            config.derive("fp16", True, "torch_dtype float16")
        torch_dtype = "float32"
    with weights.watching() if weights is not None else contextlib.nullcontext():
        loaded = load_model(
            path,
            torch_dtype=torch_dtype,
            attn_impl=config.attn_impl,
            device=device or config.device,
            quantization=quantization(config),
            chat_template=read_template(config.chat_template),
        )
    model = loaded.model
    if config.use_liger_kernel:
        use_liger_kernels(model)
    if config.quant_method is not None or format_of(stored) == "bnb":
        from peft import prepare_model_for_kbit_training

        tell_unquantized(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_gradients(model)
    if weights is not None:
        weights.keep(model)
    if config.gradient_checkpointing is None and isinstance(config, ModelOptions):  # a run chooses from its rows
        is_on = loaded.device.type != "cpu"
        config.derive("gradient_checkpointing", is_on, "off on a CPU, where memory is cheap" if not is_on else "saves memory")
    if config.gradient_checkpointing:
        checkpoint_activations(model, config.gradient_checkpointing_kwargs)
    if config.neftune_noise_alpha:
        add_noise(model, config.neftune_noise_alpha)
    return loaded


def _check_tuner(config: SftConfig | ModelOptions, path: Path, method: str) -> None:
    """ConfigError for a tuner that would change the frozen weights of the quantized checkpoint in ``path``."""
    said = f"the weights of {path} are quantized ({method})"
    if not config.trains_adapter:
        raise ConfigError(f"{said}: --tuner_type {config.tuner_type} cannot train them", hint="say --tuner_type lora")
    if config.takes_from_base or config.init_weights == "loftq":
        raise ConfigError(
            f"{said}: --init_weights {config.init_weights} changes the frozen weights, which these cannot follow",
            hint="say --init_weights true",
        )


def choose_flat(config: SftConfig, model: Any) -> bool:
    """Whether rows are computed without padding, each document by itself: wherever ``model`` passes the trial.

    Raises ConfigError if --packing or --padding_free true is asked of a model that does not.
    """
    if config.padding_free is False:
        return False
    fault = packing_fault(model)
    if fault is None:
        return True
    for name in ("packing", "padding_free"):
        if getattr(config, name):
            raise ConfigError(f"--{name} cannot be used with this model: {fault}", hint=f"leave --{name} away; rows are then padded")
    console.notice(f"rows are padded to one length: without padding this model would compute something else ({fault})")
    return False


def tell_unquantized(model: Any) -> None:
    """Warn if most weights of the blocks are still whole: bitsandbytes quantizes linear layers, and experts may be none."""
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None}
    whole = {name: weight for name, weight in model.named_parameters() if weight.dtype.is_floating_point and id(weight) not in ends}
    count, total = sum(weight.numel() for weight in whole.values()), parameter_counts(model)[1]
    if 2 * count > total:
        largest = max(whole, key=lambda name: whole[name].numel())
        dtype = str(whole[largest].dtype).removeprefix("torch.")
        console.warn(
            f"--quant_method bnb leaves {count / total:.0%} of the weights in {dtype}, such as {largest}: it quantizes linear layers alone"
        )


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep bitsandbytes 0.50 from packing 4-bit weights in place at the first evaluation.

    It does on a CPU with AVX512-BF16, and no gradient goes through packed weights, nor does anything that reads them find
    what it expects.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def autocast_dtype(config: SftConfig, weights: torch.dtype) -> torch.dtype | None:
    """The precision in which the step computes where it is safe, or None for that of the weights."""
    if config.fp16 or (config.fp16 is None and not config.bf16 and weights == torch.float16):
        return torch.float16
    if config.bf16 or (config.bf16 is None and weights == torch.bfloat16):
        return torch.bfloat16
    return None
