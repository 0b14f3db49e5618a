"""One block: its layers are quantized one group after the other, its new tensors written, the text passed on."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ModelError
from swift.model.load import checkpoint_dtype
from swift.model.quantized.base import BnbWeight, Settings, Weight, WeightFormat
from swift.model.quantized.linear import QuantizedLinear
from swift.quantize.base import Inputs, Plan, Quantizer, ScalingQuantizer
from swift.quantize.folds import Fold, Known, find_folds
from swift.quantize.passes import BlockPasses
from swift.quantize.progress import Progress, Stream
from swift.quantize.skeleton import Call, Skeleton
from swift.quantize.trial import Group

TRIAL = 8  # tokens that find out what can take a scale


@dataclass
class Job:
    """What does not change from block to block."""

    skeleton: Skeleton
    plan: Plan
    quantizer: Quantizer
    format: WeightFormat
    device: torch.device
    cast: torch.dtype | None
    """In which what is not quantized is stored, if not as it was."""
    trial_calls: dict[tuple[int, int], list[Call]] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which what is not quantized is stored."""
        return self.cast or checkpoint_dtype(self.skeleton.folder.path)

    @cached_property
    def as_read(self) -> Settings:
        """What a reader of the checkpoint takes from its config.json."""
        return self.format.settings(self.format.config(self.plan.settings))


def one_block(job: Job, index: int, calibration: Stream, original: Stream, quantized: Stream, progress: Progress) -> dict[str, float]:
    """Quantize block ``index``, write its tensors, and let the streams pass it; relative squared errors of its layers."""
    block = job.skeleton.block(index)
    for batch in original.indices():
        original.write(batch, job.skeleton.run(block, original.read(batch), original.call(batch, index)))
    passes = BlockPasses(job.skeleton, block, calibration.batches, calibration.hidden, calibration.calls_of(index), progress.folder)
    made: dict[str, Weight] = {}
    errors: dict[str, float] = {}
    try:
        levels = passes.levels(lambda name: job.skeleton.key_of(index, name) in job.plan.skipped)
        folds = _folds(job, index, block, [group for level in levels for group in level], calibration, progress.folds)
        for level in levels:
            for group, inputs in passes.inputs(level, job.quantizer.needs):
                layers: dict[str, Any] = {name: block.get_submodule(name) for name in group.layers}
                found, scale = _quantize(job, block, layers, inputs, folds.get(group), made)
                for name, weight in found.items():
                    dense = weight.dequantize()
                    errors[job.skeleton.key_of(index, name)] = relative_error(layers[name].weight / scale, dense / scale, inputs)
                    layers[name].weight = nn.Parameter(dense, requires_grad=False)
                    made[name] = weight
                passes.finish(group, layers[group.layers[-1]].weight / scale)  # the inputs that it keeps are those before scaling
        if index + 1 < len(job.skeleton):
            passes.outputs(calibration.next)
    finally:
        passes.close()
    if job.plan.settings.activations is not None:
        for name, weight in made.items():
            assert not isinstance(weight, BnbWeight)  # whose activations are not rounded
            linear: Any = block.get_submodule(name)
            block.set_submodule(name, QuantizedLinear(weight, linear.bias, torch.float32, job.plan.settings.activations))
    for batch in quantized.indices():
        quantized.write(batch, job.skeleton.run(block, quantized.read(batch), quantized.call(batch, index)))
    progress.save(index, _tensors(job, index, block, made))
    return errors


def _folds(job: Job, index: int, block: nn.Module, groups: list[Group], text: Stream, known: Known) -> dict[Group, Fold]:
    """What can take a scale from the inputs of each group, for a quantizer that wants it: found by a trial on a few tokens."""
    if not isinstance(job.quantizer, ScalingQuantizer):
        return {}
    states = text.read(0)[:1, :TRIAL]
    together, alone = ((1, states.shape[1]), (states.shape[1], 1))
    calls = {shape: job.trial_calls.setdefault(shape, job.skeleton.calls(shape)) for shape in (together, alone)}
    found = find_folds(
        block,
        [group.layers for group in groups],
        lambda: job.skeleton.run(block, states, calls[together][index]),
        lambda: job.skeleton.run(block, states.transpose(0, 1), calls[alone][index]),
        known,
    )
    return {group: fold for group, fold in zip(groups, found, strict=True) if fold is not None}


def _quantize(
    job: Job, block: nn.Module, layers: dict[str, Any], inputs: Inputs, fold: Fold | None, made: dict[str, Weight]
) -> tuple[dict[str, Weight], Tensor]:
    """Weights of ``layers``, and the scale (K,) by which their inputs were divided: 1 without a ``fold``."""
    if fold is not None and isinstance(job.quantizer, ScalingQuantizer):
        return job.quantizer.quantize_scaled(block, layers, inputs, fold, made, job.dtype)
    return job.quantizer.quantize(layers, inputs), torch.ones((), device=job.device)


def relative_error(weight: Tensor, dense: Tensor, inputs: Inputs) -> float:
    """Mean squared error of the layer's output over the calibration text, by the mean square of the output."""
    gap = dense - weight
    if inputs.hessian is None:
        return float(gap.square().sum() / weight.square().sum().clamp(min=1e-30))
    return float(((gap @ inputs.hessian) * gap).sum() / ((weight @ inputs.hessian) * weight).sum().clamp(min=1e-30))


def _tensors(job: Job, index: int, block: nn.Module, made: dict[str, Weight]) -> dict[str, Tensor]:
    """The block's tensors that differ from those in the files, by their names there; ModelError if they are not read back equal."""
    tensors: dict[str, Tensor] = {}
    for name, weight in made.items():
        key = job.skeleton.key_of(index, name)
        written = job.format.write(key, weight, job.plan.settings)
        if not torch.equal(job.format.read(key, written.__getitem__, job.as_read).dequantize(), weight.dequantize()):
            raise ModelError(f"{key}: the format {job.plan.settings.method} does not give back what was put in; this is a bug")
        tensors |= written
    for name, parameter in block.named_parameters():
        if name.removesuffix(".weight") in made and name.endswith(".weight"):
            continue
        key = job.skeleton.keys[f"{job.skeleton.place}.{index}.{name}"]
        stored = job.skeleton.checkpoint.read(key)
        if not torch.equal(stored.float(), parameter.cpu()):
            tensors[key] = parameter.to("cpu", job.cast or stored.dtype)
    return tensors
