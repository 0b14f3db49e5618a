"""ONNX: a decoder with its cache as inputs and outputs for onnxruntime, or the folder that onnxruntime-genai reads. Read this first."""

import gc
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift import console, deps
from swift.config.export import ExportConfig
from swift.errors import ModelError, first_line
from swift.export import onnx_genai, onnx_trace, onnx_weights
from swift.model.artifact import Artifact, ModelFolder
from swift.model.traced import names
from swift.quantize.measure import Measured, Reference

# Of the largest logit, on random tokens. What 4 bits lose there says little of what they lose on text: they must be numbers.
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "int4": float("inf")}


def check(model: ModelFolder, config: ExportConfig) -> None:
    """See Exporter."""
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        deps.require(name, extra="onnx")
    if config.onnx_layout == "genai":
        onnx_genai.check(model)


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """See Exporter."""
    precision, is_genai = config.onnx_precision, config.onnx_layout == "genai"
    loaded = onnx_trace.load(model)
    trial = onnx_trace.Trial(loaded, model.name)
    problem = onnx_genai.build(model, precision, folder) if is_genai else "traced"
    if is_genai and problem is None:
        problem = _fault(trial, config, folder)
    if problem is not None:
        graph, shapes = onnx_trace.trace(loaded, model.name)
        if is_genai:
            console.notice(f"{problem}; onnxruntime-genai gets the traced decoder")
            for file in folder.iterdir():
                file.unlink()
            onnx_genai.write_config(model, loaded, shapes, folder)
        onnx_weights.write(graph, loaded, precision, folder)
        del graph, loaded
        gc.collect()  # the weights in torch
        model.copy_around(folder)
        problem = _fault(trial, config, folder)
    else:
        model.copy_around(folder)
    if problem is not None:
        raise ModelError(f"{model.name} cannot be written as ONNX: {problem}", hint="--to gguf writes other families")
    files = tuple(file.name for file in sorted(folder.glob("model.onnx*")))
    return Artifact(folder, f"ONNX ({config.onnx_layout}, {precision})", files)


def _fault(trial: onnx_trace.Trial, config: ExportConfig, folder: Path) -> str | None:
    """What is wrong with the model in ``folder``, if it says other things of random tokens than transformers."""
    try:
        if config.onnx_layout == "genai":
            row = onnx_genai.logits_of(folder)(trial.ids[-1].tolist(), trial.parts)
            found = torch.stack([trial.wanted[0], row])  # its first row is shorter: read by the other layout alone
        else:
            found = torch.from_numpy(Session(folder).logits(trial.ids.numpy(), trial.parts, trial.mask.numpy(), trial.positions.numpy()))
    except (RuntimeError, ModelError) as problem:
        return f"it does not run in {config.onnx_layout}'s runtime ({first_line(problem)[:200]})"
    fault = trial.fault(found)
    if fault < TOLERANCE[config.onnx_precision]:
        return None
    return f"logits of what was written differ by {fault:.1e} of the largest"


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
    return tuple(pairwise(ends))


class Session:
    """A written model in onnxruntime, on the CPU."""

    def __init__(self, folder: Path) -> None:
        ort = deps.require("onnxruntime", extra="onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(folder / onnx_weights.MODEL_FILE, options, providers=["CPUExecutionProvider"])
        self._dtype = np.float16 if self._session.get_inputs()[3].type == "tensor(float16)" else np.float32
        self._shapes = [(value.shape[1], value.shape[3]) for value in self._session.get_inputs()[3:]]

    def logits(
        self, ids: np.ndarray, parts: Iterable[tuple[int, int]], mask: np.ndarray | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """(B, T, V) of ``ids`` (B, T), read in ``parts`` (begin, end) with the cache; mask and positions (B, T)."""
        mask = np.ones_like(ids) if mask is None else mask
        positions = mask.cumsum(1) - 1 if positions is None else positions
        past_names, _ = names(self._shapes)
        past = {
            name: np.zeros((len(ids), heads, 0, width), dtype=self._dtype)
            for name, (heads, width) in zip(past_names, self._shapes, strict=True)
        }
        found = []
        for begin, end in parts:
            given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            made, *present = self._session.run(None, given | past)
            past = dict(zip(past_names, present, strict=True))
            found.append(made)
        return np.concatenate(found, 1)
