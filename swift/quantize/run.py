"""Quantizes a model block by block. Read this first.

Of the model one block is in memory, of the calibration text one batch: the rest lies in files. For each block: which layers share
an input is found by a trial; the text is passed through it part by part, each layer quantized from inputs that its quantized
predecessors gave; the block's new tensors are written; what it gives is what the next block gets. A killed run goes on at the
block where it was.
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift import console
from swift.config.export import ExportConfig
from swift.errors import ModelError
from swift.files import write_json
from swift.hub.safetensors_header import read_entries
from swift.model.artifact import Artifact, ModelFolder
from swift.model.device import DTYPES, choose_device
from swift.model.quantized import FORMATS
from swift.model.quantized.base import Settings, Weight, WeightFormat
from swift.model.tokenizer import load_tokenizer
from swift.quantize import QUANTIZERS
from swift.quantize.base import Inputs, Plan, Quantizer
from swift.quantize.calibrate import documents
from swift.quantize.head import measure
from swift.quantize.measure import Measured
from swift.quantize.passes import BlockPasses, batches_of
from swift.quantize.plan import make_plan
from swift.quantize.progress import Progress, Stream
from swift.quantize.skeleton import Skeleton
from swift.quantize.tensors import FLOATS, Checkpoint, assemble, size_in_bytes

WORK = ".work"  # in the output folder, until it is whole
SKIPPED_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5"}
WORST = 8


def quantize(model: ModelFolder, config: ExportConfig, folder: Path) -> tuple[Artifact, Measured, tuple[tuple[str, float], ...]]:
    """Write ``model`` with quantized weights into ``folder``; what was lost, and the layers that lost most."""
    model.refuse_quantized()
    device = choose_device(config.device)
    skeleton = Skeleton(model, device)
    plan = make_plan(skeleton, config)
    quantizer: Quantizer = QUANTIZERS.get(str(config.quant_method))(config, plan.settings)
    found = documents(config, load_tokenizer(model.path), calibrates=bool(quantizer.needs))
    job = Job(skeleton, plan, quantizer, FORMATS.get(str(config.quant_format)), device)
    progress = Progress(folder / WORK, model, config, plan)
    with torch.inference_mode():
        calibration = Stream(
            progress, "calibration", batches_of(found.calibration or found.held_out[:1], config.quant_batch_size), skeleton
        )
        held_out = batches_of(found.held_out, 1)
        original, quantized = (Stream(progress, name, held_out, skeleton) for name in ("original", "quantized"))
        for index in range(progress.block, len(skeleton)):
            begin = time.monotonic()
            errors = one_block(job, index, calibration, original, quantized, progress)
            for stream in (calibration, original, quantized):
                stream.step()
            progress.done(index, errors)
            name, worst = max(errors.items(), key=lambda pair: pair[1])
            console.say(f"block {index + 1} of {len(skeleton)}: {time.monotonic() - begin:.1f} s, largest error {worst:.2g} ({name})")
        measured = Measured(None)
        if held_out:
            pieces = [batch.ids[0, : batch.lengths[0]].tolist() for batch in held_out]
            measured = measure(skeleton, pieces, original.hidden, quantized.hidden)
    files = _assemble(job, progress, config, folder)
    shutil.rmtree(progress.folder)
    worst_first = sorted(progress.errors.items(), key=lambda pair: -pair[1])
    return Artifact(folder, str(config.quant_format), files), measured, tuple(worst_first[:WORST])


@dataclass(frozen=True)
class Job:
    """What does not change from block to block."""

    skeleton: Skeleton
    plan: Plan
    quantizer: Quantizer
    format: WeightFormat
    device: torch.device


def one_block(job: Job, index: int, calibration: Stream, original: Stream, quantized: Stream, progress: Progress) -> dict[str, float]:
    """Quantize block ``index``, write its tensors, and let the streams pass it; relative squared errors of its layers."""
    block = job.skeleton.block(index)
    for batch in original.indices():
        original.write(batch, job.skeleton.run(block, original.read(batch), original.call(batch, index)))
    passes = BlockPasses(job.skeleton, block, calibration.batches, calibration.hidden, calibration.calls_of(index), progress.folder)
    made: dict[str, Weight] = {}
    errors: dict[str, float] = {}
    try:
        for level in passes.levels(lambda name: job.skeleton.key_of(index, name) in job.plan.skipped):
            for group, inputs in passes.inputs(level, job.quantizer.needs):
                layers: dict[str, Any] = {name: block.get_submodule(name) for name in group.layers}
                for name, weight in job.quantizer.quantize(layers, inputs).items():
                    dense = weight.dequantize()
                    errors[job.skeleton.key_of(index, name)] = relative_error(layers[name].weight, dense, inputs)
                    layers[name].weight = nn.Parameter(dense, requires_grad=False)
                    made[name] = weight
                passes.finish(group, layers[group.layers[-1]].weight)
        if job.quantizer.needs and index + 1 < len(job.skeleton):
            passes.outputs(calibration.next)
    finally:
        passes.close()
    for batch in quantized.indices():
        quantized.write(batch, job.skeleton.run(block, quantized.read(batch), quantized.call(batch, index)))
    progress.save(index, _tensors(job, index, block, made))
    return errors


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
        if not torch.equal(job.format.read(key, written.__getitem__, job.plan.settings).dequantize(), weight.dequantize()):
            raise ModelError(f"{key}: the format {job.plan.settings.method} does not give back what was put in; this is a bug")
        tensors |= written
    for name, parameter in block.named_parameters():
        if name.removesuffix(".weight") in made and name.endswith(".weight"):
            continue
        key = job.skeleton.keys[f"{job.skeleton.place}.{index}.{name}"]
        stored = job.skeleton.checkpoint.read(key)
        if not torch.equal(stored.float(), parameter.cpu()):
            tensors[key] = parameter.to("cpu", stored.dtype)
    return tensors


def _assemble(job: Job, progress: Progress, config: ExportConfig, folder: Path) -> tuple[str, ...]:
    """All files of the quantized model; the names of those with weights."""
    new = Checkpoint(progress.block_files(len(job.skeleton)))
    replaced = {f"{key}.weight" for key in progress.errors}
    parts = {name: source for name, source in job.skeleton.checkpoint.sources.items() if name not in replaced} | new.sources
    casts = {}
    if config.torch_dtype is not None:
        wanted = DTYPES[config.torch_dtype]
        casts = {name: wanted for name in parts if name not in new and job.skeleton.checkpoint.dtype(name) in FLOATS}
    files = assemble(folder, parts, size_in_bytes(config.max_shard_size), casts)
    for file in job.skeleton.folder.path.iterdir():
        if (
            file.is_file()
            and file.suffix not in SKIPPED_FILES
            and file.name not in ("config.json", "README.md")
            and ".index." not in file.name
        ):
            shutil.copyfile(file, folder / file.name)
    settings: Settings = replace(job.plan.settings, skipped=[*job.plan.skipped, *_others(job)])
    about = job.skeleton.folder.config | {"quantization_config": job.format.config(settings)}
    if config.torch_dtype is not None:
        about |= {"dtype": config.torch_dtype}
    write_json(folder / "config.json", about)
    for name in files:
        read_entries(folder / name)
    return files


def _others(job: Job) -> list[str]:
    """Linear layers outside of the blocks, as they are called in the files: the head and whatever else there is."""
    inside = f"{job.skeleton.place}."
    names = [name for name, module in job.skeleton.model.named_modules() if type(module) is nn.Linear and not name.startswith(inside)]
    return [
        job.skeleton.keys[f"{name}.weight"].removesuffix(".weight") if f"{name}.weight" in job.skeleton.keys else name for name in names
    ]
