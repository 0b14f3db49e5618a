"""LLaMA-Pro: new layers between those of the model, which alone are trained."""

import copy
from typing import Any

import torch
from torch import nn

from swift.config.tuner import TunerConfig
from swift.errors import ConfigError
from swift.tuner.blocks import blocks_of
from swift.tuner.full import FullTuner

PROBE = 8


class LlamaProTuner(FullTuner):
    """Block expansion (Wu et al. 2024, arXiv:2401.02415).

    The layers are cut into groups, and copies of a group's last layer follow it. Their output projections start at zero, so
    that the model computes what it did. Checkpoints are whole models with more layers, which transformers loads.
    """

    def apply(self, model: Any, config: TunerConfig, *, total_steps: int | None = None) -> Any:
        """``model`` with the new layers; ConfigError if they would change what it computes."""
        self.config = config
        layers = blocks_of(model)
        places = places_of_new_layers(len(layers), config.llamapro_num_new_blocks, config.llamapro_num_groups)
        with _evaluating(model), torch.no_grad():
            before, projections = _logits_and_projections(model, layers)
            new = _insert(model, layers, places, projections)
            after = _logits(model)
        if not torch.equal(before, after):
            raise ConfigError("LLaMA-Pro cannot be used with this model: new layers would change it", hint="use --tuner_type lora or full")
        model.requires_grad_(False)
        for layer in new:
            layer.requires_grad_(True)
        return model


def places_of_new_layers(count: int, new: int, groups: int | None) -> list[int]:
    """For each new layer, the old one (from 0) that it copies and follows.

    ``count`` layers are cut into ``groups`` of the same size, by default as many as there are new ones.
    """
    groups = groups or new
    if count % groups:
        fits = [str(number) for number in range(1, count + 1) if count % number == 0 and new % number == 0]
        raise ConfigError(
            f"{count} layers cannot be cut into {groups} equal groups", hint=f"--llamapro_num_groups can be {', '.join(fits)}"
        )
    return [(group + 1) * (count // groups) - 1 for group in range(groups) for _ in range(new // groups)]


def _insert(model: Any, layers: nn.ModuleList, places: list[int], projections: dict[int, list[str]]) -> list[nn.Module]:
    """Put the copies in, count all layers anew, and tell the config. Returns the copies."""
    order, new = list[int](), list[nn.Module]()
    grown = list[nn.Module]()
    for number, layer in enumerate(layers):
        order.append(number)
        grown.append(layer)
        for _ in range(places.count(number)):
            added = copy.deepcopy(layer)
            for name in projections[number]:
                for parameter in added.get_submodule(name).parameters(recurse=False):
                    parameter.zero_()
            order.append(number)
            grown.append(added)
            new.append(added)
    old_count = len(layers)
    del layers[:]
    layers.extend(grown)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):  # what the config says layer by layer, such as layer_types
        if isinstance(value, list) and len(value) == old_count:
            setattr(config, name, [value[number] for number in order])
    config.num_hidden_layers = len(layers)
    return new


def _logits_and_projections(model: Any, layers: nn.ModuleList) -> tuple[torch.Tensor, dict[int, list[str]]]:
    """The model's logits, and the names within each layer of the linear modules that its parts end with.

    A part is a child of the layer (attention, feed-forward); linear modules right below the layer are one part. What ends a
    part is the linear module that computes last, whatever its name.
    """
    last: dict[int, dict[str, str]] = {number: {} for number in range(len(layers))}
    handles = []
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if _is_linear(module):
                part = name.rpartition(".")[0].split(".")[0]

                def note(*_: Any, number: int = number, part: str = part, name: str = name) -> None:
                    last[number][part] = name

                handles.append(module.register_forward_hook(note))
    try:
        logits = _logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return logits, {number: list(parts.values()) for number, parts in last.items()}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer


def _logits(model: Any) -> torch.Tensor:
    count = min(PROBE, model.get_input_embeddings().weight.shape[0])
    logits: torch.Tensor = model(input_ids=torch.arange(count, device=model.device)[None], use_cache=False).logits
    return logits


class _evaluating:
    """Within, ``model`` is in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)
