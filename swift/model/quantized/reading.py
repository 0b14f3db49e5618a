"""Quantized checkpoints through transformers' own loader, layer by layer into QuantizedLinear, without a further package."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from swift.errors import ModelError
from swift.hub.safetensors_header import read_header
from swift.model.experts import find_names, separate_experts
from swift.model.quantized import FORMATS, format_of
from swift.model.quantized.base import BnbWeight, Settings, WeightFormat
from swift.model.quantized.linear import QuantizedLinear

METHOD = "swift"
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def config_for(path: Path, quantization: dict[str, Any], *, rounds_inputs: bool) -> Any:
    """The model's config with ``quantization`` handed to the reader here. ModelError if that cannot read it."""
    name = format_of(quantization) or "unknown"
    if name not in FORMATS:
        raise ModelError(f"{path}: weights in the format {name!r} are not supported", hint=f"supported are: {', '.join(FORMATS)}")
    try:
        FORMATS.get(name).settings(quantization)
    except ModelError as problem:
        raise ModelError(f"{path}: {problem.message}", hint=problem.hint) from None
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config.quantization_config = {"quant_method": METHOD, "original": quantization, "rounds_inputs": rounds_inputs}
    return config


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):
    def __init__(self, original: dict[str, Any], rounds_inputs: bool, quant_method: str = METHOD) -> None:
        self.quant_method: Any = quant_method
        self.original = original
        self.rounds_inputs = rounds_inputs


class _Held(nn.Module):
    """The tensors of a layer as they are in the file, until all are read."""

    bias: Tensor | None

    def __init__(self, parts: dict[str, tuple[torch.dtype, tuple[int, ...]]], shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.shape = shape
        for part, (dtype, size) in parts.items():
            self.register_parameter(part, nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


@register_quantizer(METHOD)
class _Reader(HfQuantizer):
    """Puts a _Held in the place of each quantized layer before weights are read, and a QuantizedLinear afterwards."""

    quantization_config: _Config

    def __init__(self, quantization_config: _Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        original = quantization_config.original
        self.format: WeightFormat = FORMATS.get(str(format_of(original)))
        self.settings: Settings = self.format.settings(original)
        self.dtype = torch.float32

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """Those of ``model`` whose joined weights are there: experts that were separated are read one by one."""
        names = "\n".join(name for name, _ in model.named_parameters())
        return [
            rule
            for rule in weight_conversions
            if isinstance(rule, WeightRenaming) or any(target in names for target in rule.target_patterns)
        ]

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        known = model.state_dict()
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        layers = _layers(checkpoint_files, self.format.markers)
        _, fused = find_names(model, [f"{stored}.weight" for stored in layers])
        separate_experts(model, "", fused)
        modules = dict(model.named_modules())
        for stored, parts in layers.items():
            key, _ = rename_source_key(f"{stored}.weight", renamings, [], model.base_model_prefix, known)
            name = key.removesuffix(".weight")
            module = modules.get(name)
            if not isinstance(module, nn.Linear | Conv1D):
                raise ModelError(f"{stored} is quantized and no linear layer of this model", hint="a newer transformers may know it")
            shape = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
            parts.pop("bias", None)
            model.set_submodule(name, _Held(parts, shape, module.bias))
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The precision of the model, for what is not quantized; whole numbers and those of 8 bits keep theirs."""
        is_fp8 = str(param.get_dtype() if hasattr(param, "get_dtype") else "").startswith("F8")
        return None if is_fp8 else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, _Held):
                model.set_submodule(name, self._layer(name, module))
        model.config.quantization_config = self.quantization_config.original
        return model

    def _layer(self, name: str, held: _Held) -> QuantizedLinear:
        def tensor(wanted: str) -> Tensor:
            part = held._parameters.get(wanted.removeprefix(f"{name}."))
            if part is None:
                raise KeyError(wanted)
            return part.detach()

        try:
            weight = self.format.read(name, tensor, self.settings)
        except KeyError as problem:
            raise ModelError(f"{name}: a part of its quantized weight is missing: {problem}", hint="fetch the model again") from problem
        assert not isinstance(weight, BnbWeight)
        if tuple(weight.codes.shape) != held.shape:
            raise ModelError(f"{name}: the file has {tuple(weight.codes.shape)} weights, the model {held.shape}")
        activations = self.settings.activations if self.quantization_config.rounds_inputs else None
        return QuantizedLinear(weight, held.bias, self.dtype, activations)


def _layers(files: list[str], markers: tuple[str, ...]) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """{layer: {end of a tensor's name: (type, shape)}} of the quantized layers in the ``files``."""
    header = {name: found for file in files for name, found in read_header(file).items()}
    layers: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
        name.removesuffix(f".{marker}"): {} for name in header for marker in markers if name.endswith(f".{marker}")
    }
    for name, (kind, shape) in header.items():
        layer, _, part = name.rpartition(".")
        if layer in layers:
            if kind not in DTYPES:
                raise ModelError(f"{name}: numbers of the kind {kind} are not supported")
            layers[layer][part] = DTYPES[kind], shape
    return layers
