"""Quantizes a model block by block. Read this first.

Of the model one block is in memory, of the calibration text one batch: the rest lies in files. For each block: which layers share
an input is found by a trial; the text is passed through it part by part, each layer quantized from inputs that its quantized
predecessors gave; the block's new tensors are written; what it gives is what the next block gets. A killed run goes on at the
block where it was.
"""

import contextlib
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from swift import console
from swift.config.export import ExportConfig
from swift.files import write_json
from swift.hub.safetensors_header import read_entries
from swift.model.artifact import Artifact, ModelFolder
from swift.model.device import DTYPES, choose_device
from swift.model.quantized import FORMATS
from swift.model.quantized.base import Settings
from swift.model.tokenizer import load_tokenizer
from swift.quantize import QUANTIZERS
from swift.quantize.base import Quantizer
from swift.quantize.block import Job, one_block
from swift.quantize.calibrate import documents
from swift.quantize.head import measure
from swift.quantize.measure import Measured
from swift.quantize.passes import batches_of
from swift.quantize.plan import joined_weights, make_plan
from swift.quantize.progress import Progress, Stream
from swift.quantize.skeleton import Skeleton
from swift.quantize.tensors import FLOATS, Checkpoint, assemble, size_in_bytes

WORK = ".work"  # in the output folder, until it is whole
WORST = 8
NO_TEXT = [list(range(16))]  # finds out which layers there are


def quantize(model: ModelFolder, config: ExportConfig, folder: Path) -> tuple[Artifact, Measured, tuple[tuple[str, float], ...]]:
    """Write ``model`` with quantized weights into ``folder``; what was lost, and the layers that lost most."""
    model.refuse_quantized()
    device = choose_device(config.device)
    skeleton = Skeleton(model, device)
    plan = make_plan(skeleton, config)
    quantizer: Quantizer = QUANTIZERS.get(str(config.quant_method))(config, plan.settings)
    found = documents(config, load_tokenizer(model.path), calibrates=bool(quantizer.needs))
    cast = DTYPES[config.torch_dtype] if config.torch_dtype else None
    job = Job(skeleton, plan, quantizer, FORMATS.get(str(config.quant_format)), device, cast)
    progress = Progress(folder / WORK, model, config, plan, found, device)
    with torch.inference_mode(), contextlib.ExitStack() as open_streams:
        calibration = Stream(
            progress, "calibration", batches_of(found.calibration or found.held_out[:1] or NO_TEXT, config.quant_batch_size), skeleton
        )
        held_out = batches_of(found.held_out, 1)
        original, quantized = (Stream(progress, name, held_out, skeleton) for name in ("original", "quantized"))
        for stream in (calibration, original, quantized):
            open_streams.callback(stream.close)
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


def _assemble(job: Job, progress: Progress, config: ExportConfig, folder: Path) -> tuple[str, ...]:
    """All files of the quantized model; the names of those with weights."""
    new = Checkpoint(progress.block_files(len(job.skeleton)))
    replaced = {f"{key}.weight" for key in progress.errors}
    parts = {name: source for name, source in job.skeleton.checkpoint.sources.items() if name not in replaced} | new.sources
    casts = {}
    if job.cast is not None:
        casts = {name: job.cast for name in parts if name not in new and job.skeleton.checkpoint.dtype(name) in FLOATS}
    files = assemble(folder, parts, size_in_bytes(config.max_shard_size), casts)
    job.skeleton.folder.copy_around(folder)
    settings: Settings = replace(job.plan.settings, skipped=_left(job, progress))
    about = job.skeleton.folder.config | {"quantization_config": job.format.config(settings)}
    if config.torch_dtype is not None:
        about |= {"dtype": config.torch_dtype}
    write_json(folder / "config.json", about)
    for name in files:
        read_entries(folder / name)
    return files


def _left(job: Job, progress: Progress) -> list[str]:
    """Modules with a matrix that was not quantized, as they are called in the files: engines would look for few bits in them.

    Beside layers that were skipped these are the head, routers, experts in one tensor, and layers that no trial saw.
    """
    skeleton = job.skeleton
    tied = dict(getattr(skeleton.model, "all_tied_weights_keys", None) or {})  # the file has no weights of that name
    outside = [
        f"{name}.weight"
        for name, module in skeleton.model.named_modules()
        if type(module) is nn.Linear and not name.startswith(f"{skeleton.place}.")
    ]
    inside = [
        f"{skeleton.place}.{index}.{name}"
        for index in range(len(skeleton))
        for name, parameter in skeleton.empty_block(index).named_parameters()
        if parameter.dim() == 2 and name.endswith(".weight")
    ]
    names = [name if name in tied else skeleton.keys[name] for name in (*inside, *outside)]
    layers = [layer for name in names if (layer := name.removesuffix(".weight")) not in progress.errors]
    return layers + list(dict.fromkeys(name.rpartition(".")[0] for name in joined_weights(skeleton)))
