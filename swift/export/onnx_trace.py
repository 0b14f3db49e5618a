"""The graph of a traced model in ONNX, without its weights: those are inputs of the graph, by their names."""

import contextlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor

from swift import deps
from swift.errors import ModelError, first_line
from swift.model import traced

OPSET = 18
PREFIX = "model."  # of weights' names: that of the model in Step


def load(path: Any) -> Any:
    """The model in ``path`` in float32, with the attention that is traced."""
    from swift.model.load import load_model

    model = load_model(path, torch_dtype="float32", attn_impl=traced.ATTENTION, device="cpu").model
    return model.requires_grad_(False)


def trace(model: Any, name: str) -> tuple[Any, list[tuple[int, int]]]:
    """The graph (onnx_ir) of Step, and (heads, width) of keys and values. ModelError if the model cannot be traced."""
    ir, optimizer = deps.require("onnx_ir", extra="onnx"), deps.require("onnxscript.optimizer", extra="onnx")
    onnx = deps.require("onnx", extra="onnx")
    try:
        shapes = traced.probe(model)
        file = io.BytesIO()
        # The exporter that walks a traced graph, not torch.export's: the same nodes in a thirtieth of the time, and no weights.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # what tracing takes for constant is constant, as the comparison shows
            torch.onnx.export(
                traced.Step(model),
                traced.example(shapes),
                file,
                dynamo=False,
                opset_version=OPSET,
                export_params=False,
                do_constant_folding=False,
                **_names(shapes),
            )
    except (traced.Untraceable, torch.onnx.OnnxExporterError) as problem:
        raise ModelError(f"{name} cannot be written as ONNX: {first_line(problem)}", hint="--to gguf writes other families") from None
    made = ir.from_proto(onnx.load_from_string(file.getvalue()))
    optimizer.optimize(made)
    return made, shapes


def _names(shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Names of inputs and outputs, as optimum has them, and of the sizes that may change."""
    past, present = traced.names(shapes)
    rows, total = {0: "batch_size", 1: "sequence_length"}, "past_sequence_length + sequence_length"
    sizes = {"input_ids": rows, "attention_mask": {0: "batch_size", 1: total}, "position_ids": rows, "logits": rows}
    sizes |= {name: {0: "batch_size", 2: "past_sequence_length"} for name in past}
    sizes |= {name: {0: "batch_size", 2: total} for name in present}
    inputs, outputs = ["input_ids", "attention_mask", "position_ids", *past], ["logits", *present]
    return {"input_names": inputs, "output_names": outputs, "dynamic_axes": sizes}


class Trial:
    """Two random rows, the first shorter and filled on the left, and what the model of transformers says to them.

    That runs with transformers' own attention and masks, in one pass.
    """

    parts = ((0, 9), (9, 10), (10, 16))
    skipped = 3

    def __init__(self, model: Any) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
        self.mask = torch.ones(2, 16, dtype=torch.int64)
        self.mask[0, : self.skipped] = 0
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            made = model(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, use_cache=False)
        model.set_attn_implementation(traced.ATTENTION)
        self.wanted: Tensor = made.logits.float()

    def fault(self, found: Tensor) -> float:
        """Largest difference of logits (2, 16, V) at places that hold tokens, relative to the largest logit; NaN if one is NaN."""
        seen = self.mask > 0
        return float((found - self.wanted)[seen].abs().max() / self.wanted.abs().max())
