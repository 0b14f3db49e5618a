"""ONNX: a decoder with its cache as inputs and outputs for onnxruntime, or the folder that onnxruntime-genai reads. Read this first."""

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift import deps
from swift.config.export import ExportConfig
from swift.errors import ModelError
from swift.export import onnx_genai, onnx_trace, onnx_weights
from swift.export.sources import copy_around
from swift.model.artifact import Artifact, ModelFolder
from swift.model.traced import names
from swift.quantize.measure import Measured, Reference

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "int4": float("inf")}  # of the largest logit, on random tokens


def check(model: ModelFolder, config: ExportConfig) -> None:
    """See Exporter."""
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        deps.require(name, extra="onnx")
    if config.onnx_layout == "genai":
        onnx_genai.check(model)


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """See Exporter."""
    is_genai = config.onnx_layout == "genai"
    is_built = is_genai and onnx_genai.build(model, config.onnx_precision, folder)
    loaded = onnx_trace.load(model.path)
    trial = onnx_trace.Trial(loaded)
    if not is_built:
        graph, shapes = onnx_trace.trace(loaded, model.name)
        onnx_weights.write(graph, loaded, config.onnx_precision, folder)
        if is_genai:
            onnx_genai.write_config(model, loaded, shapes, folder)
    copy_around(model, folder)
    loaded = graph = None
    gc.collect()  # the weights in torch
    _compare(trial, config, folder, model.name)
    files = tuple(file.name for file in sorted(folder.glob("model.onnx*")))
    return Artifact(folder, f"ONNX ({config.onnx_layout}, {config.onnx_precision})", files)


def _compare(trial: onnx_trace.Trial, config: ExportConfig, folder: Path, name: str) -> None:
    """ModelError if what was written says other things of random tokens than transformers."""
    if config.onnx_layout == "genai":
        row = onnx_genai.logits_of(folder)(trial.ids[-1].tolist(), trial.parts)
        fault = trial.fault(torch.stack([trial.wanted[0], row]))
    else:
        found = Session(folder).logits(trial.ids.numpy(), trial.parts, trial.mask.numpy(), trial.positions.numpy())
        fault = trial.fault(torch.from_numpy(found))
    if not fault < TOLERANCE[config.onnx_precision]:
        raise ModelError(
            f"{name} cannot be written as ONNX: the logits of what was written differ by {fault:.1e} of the largest",
            hint="--to gguf writes other families",
        )


def verify(artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
    """See Exporter. The cache is used: pieces are read in parts."""
    if config.onnx_layout == "genai":
        return onnx_genai.verify(artifact, reference, parts_of)
    session = Session(artifact.path)

    def logits(piece: list[int]) -> Any:
        return session.logits(np.array([piece]), parts_of(len(piece)))[0]

    return reference.compare(f"onnxruntime {deps.require('onnxruntime', extra='onnx').__version__}", logits)


def parts_of(length: int) -> tuple[tuple[int, int], ...]:
    """How a piece is read: a prompt of 24 tokens, one token, the rest."""
    ends = [0, *(end for end in (24, 25) if end < length), length]
    return tuple(zip(ends, ends[1:], strict=False))


class Session:
    """A written model in onnxruntime, on the CPU."""

    def __init__(self, folder: Path) -> None:
        ort = deps.require("onnxruntime", extra="onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(folder / onnx_weights.MODEL_FILE, options, providers=["CPUExecutionProvider"])
        self._shapes = [(value.shape[1], value.shape[3]) for value in self._session.get_inputs()[3:]]

    def logits(
        self, ids: np.ndarray, parts: Iterable[tuple[int, int]], mask: np.ndarray | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """(B, T, V) of ``ids`` (B, T), read in ``parts`` (begin, end) with the cache; mask and positions (B, T)."""
        mask = np.ones_like(ids) if mask is None else mask
        positions = mask.cumsum(1) - 1 if positions is None else positions
        past_names, _ = names(self._shapes)
        past = {
            name: np.zeros((len(ids), heads, 0, width), dtype=np.float32) for name, (heads, width) in zip(past_names, self._shapes, strict=True)
        }
        found = []
        for begin, end in parts:
            given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            made, *present = self._session.run(None, given | past)
            past = dict(zip(past_names, present, strict=True))
            found.append(made)
        return np.concatenate(found, 1)
