"""TensorRT: a decoder in ONNX with its cache, and the engine of it where one can be built."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift import console, deps
from swift.config.export import ExportConfig
from swift.errors import ConfigError, ModelError
from swift.export import onnx, onnx_trace, onnx_weights
from swift.export.tensorrt import build_engine, operators, profiles
from swift.files import write_json, write_text
from swift.model.artifact import Artifact, ModelFolder
from swift.quantize.measure import Measured, Reference

FORMAT = "tensorrt"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST_KL = 0.05  # nats a token; rounding to 16 bits loses about 1e-5
TRTEXEC = "trtexec.sh"


def check(model: ModelFolder, config: ExportConfig) -> None:
    """DependencyError if ONNX cannot be written, or TensorRT for RTX is asked for and not installed; ConfigError for a GPU it lacks."""
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        deps.require(name, extra="onnx")
    if config.tensorrt_library == "rtx":
        capabilities(config, _library("rtx"))


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """Write the ONNX model, what builds an engine of it, and the engine if this machine can build it."""
    _write_onnx(model, DTYPES[config.tensorrt_precision], folder)
    unknown = operators.unknown(folder / build_engine.ONNX)
    if unknown:
        raise ModelError(
            f"TensorRT does not know {', '.join(unknown)}, which {model.name} needs", hint="--to onnx writes it for onnxruntime"
        )
    ranges = profiles.profiles(config, profiles.input_shapes(folder / build_engine.ONNX))
    write_json(folder / build_engine.PROFILES, ranges)
    shutil.copyfile(build_engine.__file__, folder / Path(build_engine.__file__).name)
    write_text(folder / TRTEXEC, f'#!/bin/sh\ncd "$(dirname "$0")"\n{shlex.join(profiles.trtexec_arguments(ranges))}\n')
    model.copy_around(folder)
    note = _build(config, ranges, folder)
    files = (build_engine.ENGINE,) if (folder / build_engine.ENGINE).exists() else tuple(file.name for file in folder.glob("model.onnx*"))
    return Artifact(folder, FORMAT, files, {"note": note})


def verify(artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
    """Compute with the ONNX model in onnxruntime, in parts, with its cache. The engine itself runs on a GPU only."""
    notes: tuple[str, ...] = (artifact.facts["note"], "the engine was not run")
    if config.tensorrt_precision == "bf16":
        return Measured(None, notes=(*notes, "onnxruntime has no bfloat16 arithmetic on a CPU, so the loss was not measured"))
    session = onnx.Session(artifact.path)

    def logits(piece: list[int]) -> Any:
        return session.logits(np.array([piece]), onnx.parts_of(len(piece)))[0]

    version = deps.require("onnxruntime", extra="onnx").__version__
    measured = reference.compare(f"onnxruntime {version}, of the ONNX model that the engine is built of", logits)
    if measured.kl is None or not measured.kl <= LARGEST_KL:
        raise ModelError(
            f"what was written computes another model: {measured.kl:.3g} nats a token away in {config.tensorrt_precision}",
            hint="try --tensorrt_precision fp32; nothing was written",
        )
    return Measured(**{**vars(measured), "notes": notes})


def _write_onnx(model: ModelFolder, dtype: torch.dtype, folder: Path) -> None:
    """The traced model computing in ``dtype``: TensorRT's networks are strongly typed, so the file says where which is used."""
    loaded = onnx_trace.load(model).to(dtype)
    for name, weight in loaded.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{name} holds numbers too large for 16 bits", hint="say --tensorrt_precision bf16; nothing was written")
    trial = onnx_trace.Trial(loaded, model.name)  # in torch: onnxruntime on a CPU computes with 32 bits inside, where nothing overflows
    if not bool(torch.isfinite(trial.wanted[trial.mask > 0]).all()):
        raise ModelError(
            f"{model.name} computes numbers too large for {str(dtype).removeprefix('torch.')}",
            hint="say --tensorrt_precision bf16; nothing was written",
        )
    graph, _ = onnx_trace.trace(loaded, model.name)
    onnx_weights.write(graph, loaded, "fp32", folder)  # weights as they are


def _build(config: ExportConfig, ranges: list[build_engine.Profile], folder: Path) -> str:
    """Build the engine if that can be here, else at least let a parser of TensorRT read the model; what was done, in words."""
    wanted = config.tensorrt_library
    can_build = wanted == "rtx" or (torch.cuda.is_available() and _is_installed("tensorrt"))
    parser = wanted if can_build else next((name for name in ("rtx",) if _is_installed(name)), None)
    script = Path(build_engine.__file__).name
    if parser is None:
        return f"no engine was built: that needs an NVIDIA GPU and the package tensorrt; {script} in the folder builds it there"
    library = _library(parser)
    version = f"TensorRT{' for RTX' if parser == 'rtx' else ''} {library.__version__}"
    try:
        network = build_engine.Network(library, folder / build_engine.ONNX)
        if not can_build:
            return f"the parser of {version} accepts the model; no engine was built: {script} in the folder builds it where the GPU is"
        console.say(f"building an engine with {version}")
        engine = network.build(ranges, capabilities(config, library))
        with (folder / build_engine.ENGINE).open("wb") as file:
            file.write(memoryview(engine))
    except build_engine.BuildError as problem:
        raise ModelError(f"{version} does not take the model: {problem}", hint="--to onnx writes it for onnxruntime") from None
    return f"the engine was built by {version}"


def capabilities(config: ExportConfig, library: Any) -> list[str]:
    """Compute capabilities to build for: those that are asked for, the GPU's own, or all without a GPU. Empty for TensorRT."""
    if config.tensorrt_library != "rtx":
        return []
    known = [f"{name[2:-1]}.{name[-1]}" for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    for name in config.tensorrt_compute_capability:
        if name not in known:
            raise ConfigError(f"--tensorrt_compute_capability {name} is not known to TensorRT for RTX", hint=f"it knows {', '.join(known)}")
    if config.tensorrt_compute_capability or torch.cuda.is_available():
        return config.tensorrt_compute_capability
    return known


def _library(name: str) -> Any:
    """TensorRT or TensorRT for RTX, or DependencyError."""
    if not _is_installed(name):
        if name == "rtx":
            deps.require("onnxruntime_ep_nv_tensorrt_rtx", extra="tensorrt-rtx")
            deps.require("tensorrt_rtx_bindings", extra="tensorrt-rtx")
        else:
            deps.require("tensorrt", extra="tensorrt")
    return build_engine.library(name)


def _is_installed(name: str) -> bool:
    try:
        build_engine.library(name)
    except (ImportError, OSError):  # or its libraries are not
        return False
    return True
