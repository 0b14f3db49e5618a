"""The graph of a traced model in ONNX, without its weights: those are inputs of the graph, by their names."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swift import deps
from swift.errors import ModelError, first_line
from swift.model import traced
from swift.model.artifact import ModelFolder
from swift.model.load import load_model

OPSET = 18
PREFIX = "model."  # of weights' names: that of the model in Step


def load(folder: ModelFolder) -> Any:
    """The model in float32, with the attention that is traced."""
    return load_model(folder.path, torch_dtype="float32", attn_impl=traced.ATTENTION, device="cpu").model.requires_grad_(False)


def trace(model: Any, name: str) -> tuple[Any, list[tuple[int, int]]]:
    """The graph (onnx_ir) of Step, and (heads, width) of keys and values. ModelError if the model cannot be traced."""
    try:
        shapes = traced.probe(model)
        if any(parameter.dim() == 3 for parameter in model.parameters()):
            raise traced.Untraceable("its layers choose among experts, for which ONNX has no operator")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what tracing takes for constant is constant, as the comparison shows
            made = _quick(model, shapes) or _thorough(model, shapes)
    except (traced.Untraceable, torch.onnx.OnnxExporterError) as problem:
        raise ModelError(f"{name} cannot be written as ONNX: {_reason(problem)}", hint="--to gguf writes other families") from None
    graph = made.graph
    for key in [key for key in graph.initializers if key.startswith(PREFIX)]:
        value = graph.initializers.pop(key)
        value.const_value = None
        graph.inputs.append(value)
    deps.require("onnxscript.optimizer", extra="onnx").optimize(made)
    deps.require("onnx_ir.passes.common", extra="onnx").RemoveUnusedNodesPass()(made)
    return made, shapes


def _quick(model: Any, shapes: list[tuple[int, int]]) -> Any:
    """By a run that is recorded; None for a model with operators that this exporter does not have.

    It makes the nodes that ``_thorough`` makes in a thirtieth of the time, and copies no weights.
    """
    onnx, ir = deps.require("onnx", extra="onnx"), deps.require("onnx_ir", extra="onnx")
    file: Any = io.BytesIO()
    inputs, outputs, sizes = _names(shapes)
    options: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "opset_version": OPSET, "dynamic_axes": sizes}
    try:
        with _silence():  # it prints the graph where it fails
            torch.onnx.export(
                traced.Step(model),
                traced.example(shapes, model.dtype),
                file,
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
                **options,
            )
    except (torch.onnx.OnnxExporterError, AssertionError):
        return None
    return ir.from_proto(onnx.load_from_string(file.getvalue()))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what is written to standard output, by C++ too."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _thorough(model: Any, shapes: list[tuple[int, int]]) -> Any:
    """By torch.export, which knows every operator."""
    inputs, outputs, _ = _names(shapes)
    rows, past = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    options: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "opset_version": OPSET}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    made: Any = torch.onnx.export(
        traced.Step(model),
        traced.example(shapes, model.dtype),
        dynamo=True,
        dynamic_shapes=(rows, rows, rows, tuple(past for _ in shapes)),
        optimize=False,
        verbose=False,
        **options,
    )
    return made.model


def _reason(problem: BaseException) -> str:
    """One line of what went wrong, from the innermost cause."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return first_line(problem)


def _names(shapes: list[tuple[int, int]]) -> tuple[list[str], list[str], dict[str, dict[int, str]]]:
    """Inputs and outputs, as optimum names them, and their sizes that may change."""
    past, present = traced.names(shapes)
    rows, total = {0: "batch_size", 1: "sequence_length"}, "past_sequence_length + sequence_length"
    sizes = {"input_ids": rows, "attention_mask": {0: "batch_size", 1: total}, "position_ids": rows, "logits": rows}
    sizes |= {name: {0: "batch_size", 2: "past_sequence_length"} for name in past}
    sizes |= {name: {0: "batch_size", 2: total} for name in present}
    return ["input_ids", "attention_mask", "position_ids", *past], ["logits", *present], sizes


class Trial:
    """Two random rows, the first shorter and filled on the left, and what the model of transformers says to them.

    That runs with transformers' own attention and masks, in one pass.
    """

    parts = ((0, 9), (9, 10), (10, 16))
    skipped = 3

    def __init__(self, model: Any, name: str) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
        self.mask = torch.ones(2, 16, dtype=torch.int64)
        self.mask[0, : self.skipped] = 0
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        try:
            model.set_attn_implementation("eager")
            with torch.inference_mode():
                made = model(**given, use_cache=False)
            model.set_attn_implementation(traced.ATTENTION)
        except (AttributeError, TypeError, ValueError, RuntimeError) as problem:
            raise ModelError(f"{name} cannot be written as ONNX: it does not run as decoders do ({first_line(problem)})") from None
        self.wanted: Tensor = made.logits.float()

    def fault(self, found: Tensor) -> float:
        """Largest difference of logits (2, 16, V) at places that hold tokens, relative to the largest logit; NaN if one is NaN."""
        return float((found - self.wanted)[self.mask > 0].abs().max() / self.wanted.abs().max())
