"""A model of transformers as an OpenVINO model with its keys and values inside, in the cache.

The model's own forward is traced, with an attention function and a cache of ours, whose shape OpenVINO's paged attention
replaces. What that would leave out (a window, soft caps, sinks) is refused when the model asks for it, and the result is
compared with torch before it is kept.
"""

import gc
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from swift import console
from swift.engine.openvino import library
from swift.engine.source import Source
from swift.errors import ModelError
from swift.files import new_folder, write_json
from swift.hub.cache import cache_root
from swift.model import traced

VERSION = 3  # of what is written; part of its name in the cache
MODEL_FILE = "openvino_model.xml"
FACTS_FILE = "swift.json"
ATTENTION = "swift_openvino"
GROUP = 32  # weights of a row that share a scale, in int8; the whole row where its length is no multiple
TOLERANCE = 1e-3  # of the largest logit: float32 here and there, added up in another order


@dataclass(frozen=True)
class Converted:
    """``values_per_token`` are the numbers that keys and values of a token take; ``window`` the narrowest attention window, if any."""

    path: Path
    values_per_token: int
    window: int | None


def converted(source: Source, weight_format: str) -> Converted:
    """The model of ``source`` from the cache; made if it is not there. Raises ModelError for one that OpenVINO cannot compute."""
    path = cache_root() / "openvino" / _name(source, weight_format)
    if not (path / FACTS_FILE).is_file():
        console.say(f"converting {source.path.name} for OpenVINO ({weight_format}); this is done once")
        _convert(source, weight_format, path)
        gc.collect()  # the weights in torch
    facts = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
    return Converted(path, facts["values_per_token"], facts["window"])


def _name(source: Source, weight_format: str) -> str:
    """A digest of everything that the result depends on: files by size and time, since weights are large."""
    parts = [str(VERSION), library("openvino").__version__, weight_format]
    for folder in (source.path, source.adapter):
        for file in sorted(folder.glob("*")) if folder is not None else ():
            if file.suffix in (".json", ".safetensors"):
                stat = file.stat()
                parts.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _convert(source: Source, weight_format: str, path: Path) -> None:
    model = source.load(torch_dtype="float32", attn_impl=ATTENTION, device="cpu", merge=True).model
    shapes, window = probe(model)
    made = convert(model, shapes, weight_format, source.path.name)
    with new_folder(path) as folder:
        save(made, folder, weight_format)
        write_json(folder / FACTS_FILE, {"values_per_token": sum(heads * width for heads, width in shapes), "window": window})


def convert(model: Any, shapes: list[tuple[int, int]], weight_format: str, name: str) -> Any:
    """``model``, loaded in float32 with ATTENTION, as an OpenVINO model that was compared with it; ModelError if it cannot be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: what it takes for constant is constant, as the comparison shows
        found = _traced(model, shapes)
    made = _stateful(found, shapes)
    _join(made)
    _compare(model, made, name)
    if weight_format == "int8":
        _to_int8(made)
    return made


def save(made: Any, folder: Path, weight_format: str) -> None:
    """Write what ``convert`` made into ``folder``; float32 matrices in 16 bits if that is the format."""
    library("openvino").save_model(made, folder / MODEL_FILE, compress_to_fp16=weight_format == "fp16")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Plain attention in the form that OpenVINO knows; query (B, H, Q, d), key and value (B, G, K, d), mask (B, 1, Q, K)."""
    if softcap is not None or s_aux is not None:
        raise ModelError(
            "OpenVINO's paged attention has neither soft caps nor sinks, which this model needs", hint="--infer_backend native"
        )
    if sliding_window is not None:
        traced.WINDOWS.append(sliding_window)
    return traced.plain_attention(query, key, value, attention_mask, scaling), None


AttentionInterface.register(ATTENTION, _attention)


def probe(model: Any) -> tuple[list[tuple[int, int]], int | None]:
    """(heads, width) of the keys and values of each layer in turn, and the narrowest window. ModelError if layers keep other things."""
    try:
        shapes = traced.probe(model)
    except traced.Untraceable as problem:
        raise _unfit(str(problem)) from None
    return shapes, min(traced.WINDOWS, default=None)


def _unfit(why: str) -> ModelError:
    return ModelError(f"OpenVINO cannot compute this model: {why}", hint="--infer_backend native, or transformers")


def _traced(model: Any, shapes: list[tuple[int, int]]) -> Any:
    ov = library("openvino")
    try:
        return ov.convert_model(traced.Step(model), example_input=traced.example(shapes))
    except ov.frontend.OpConversionFailure as problem:
        raise _unfit(f"it has no {str(problem).strip().splitlines()[-1].split(': ')[-1]}") from None


def _stateful(model: Any, shapes: list[tuple[int, int]]) -> Any:
    """``model`` with keys and values as state, empty at first, of which ``beam_idx`` (B,) chooses the rows."""
    ov = library("openvino")
    op = ov.opset13
    passes = library("openvino._offline_transformations")

    names, presents = traced.names(shapes)
    plain = ("input_ids", "attention_mask", "position_ids")
    if len(model.inputs) != len(plain) + len(names):
        raise _unfit("its forward does not read positions or mask")
    shape_of = {name: [-1, heads, -1, width] for name, (heads, width) in zip(names, shapes, strict=True)}
    for port, name in zip(model.inputs, (*plain, *names), strict=True):
        node = port.get_node()
        port.get_tensor().set_names({name})
        node.set_friendly_name(name)
        node.set_partial_shape(ov.PartialShape(shape_of.get(name, [-1, -1])))
    for port, name in zip(model.outputs, ("logits", *presents), strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    rows = op.parameter([-1], ov.Type.i32, name="beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([rows])
    for name in names:
        readers = model.input(name).get_target_inputs()
        chosen = op.gather(model.input(name), rows, op.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    passes.apply_make_stateful_transformation(model, dict(zip(names, presents, strict=True)))
    number = op.gather(op.shape_of(model.input("input_ids"), output_type="i64"), op.constant(np.array([0])), op.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            rest = [0 if size.is_dynamic else size.get_length() for size in list(node.get_output_partial_shape(0))[1:]]
            empty = op.broadcast(op.constant(0.0, dtype=np.float32), op.concat([number, op.constant(np.array(rest))], 0))
            node.set_arguments([empty])
    model.validate_nodes_and_infer_types()
    return model


def _join(model: Any) -> None:
    """Make one product of those that read the same input (queries, keys and values; gate and up): each call has its price."""
    ov = library("openvino")
    op = ov.opset13

    reading: dict[tuple[str, int], list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and _is_matrix(node.input_value(1)) and node.get_attributes()["transpose_b"]:
            given = node.input_value(0)
            reading.setdefault((given.get_node().get_friendly_name(), given.get_index()), []).append(node)
    for nodes in reading.values():
        if len(nodes) == 1:
            continue
        parts = [node.input_value(1).get_node() for node in nodes]
        weights = op.constant(np.concatenate([part.data for part in parts]))
        weights.set_friendly_name(" + ".join(part.get_friendly_name() for part in parts))
        whole = op.matmul(nodes[0].input_value(0), weights, False, True)
        split = op.variadic_split(whole, op.constant(np.int64(-1)), op.constant(np.array([part.get_output_shape(0)[0] for part in parts])))
        for index, node in enumerate(nodes):
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(split.output(index))
    model.validate_nodes_and_infer_types()


def _compare(model: Any, made: Any, name: str) -> None:
    """ModelError unless ``made`` gives the logits of ``model`` for 24 tokens and for one after them."""
    ov = library("openvino")

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, 25), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = traced.forward(model, ids, traced.causal(25, 25)[None, None], torch.arange(25)[None], traced.Past())[0]
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = ov.Core().compile_model(made, "CPU", exact).create_infer_request()
    for begin, end in ((0, 24), (24, 25)):
        request.infer(
            {
                "input_ids": ids[:, begin:end].numpy(),
                "attention_mask": np.ones((1, end), dtype=np.int64),
                "position_ids": np.arange(begin, end)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        found = torch.from_numpy(request.get_tensor("logits").data[0].copy())
        fault = float((found - wanted[begin:end]).abs().max() / wanted.abs().max())
        if not fault < TOLERANCE:
            raise _unfit(f"{name}: converted, its logits differ by {fault:.1e} of the largest")


def _matrices(model: Any) -> Iterator[tuple[Any, str]]:
    """The float32 matrices of products and embeddings: where each comes out, and its name."""
    for node in model.get_ordered_ops():
        at = {"MatMul": 1, "Gather": 0}.get(node.get_type_name())
        if at is None:
            continue
        output = node.input_value(at)
        if _is_matrix(output):
            yield output, output.get_node().get_friendly_name()


def _is_matrix(output: Any) -> bool:
    constant = output.get_node()
    return (
        constant.get_type_name() == "Constant" and constant.get_element_type().to_string() == "f32" and len(output.get_partial_shape()) == 2
    )


def _to_int8(model: Any) -> None:
    """Put int8 weights with a scale for each GROUP in place of float32 ones: w = scale * q, q in -127 to 127."""
    ov = library("openvino")
    op = ov.opset13

    made: dict[str, Any] = {}
    for output, name in list(_matrices(model)):
        if name not in made:
            weights = output.get_node().data
            rows, columns = weights.shape
            grouped = weights.reshape(rows, -1, GROUP) if columns % GROUP == 0 else weights.reshape(rows, 1, columns)
            scale = np.maximum(np.abs(grouped).max(-1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
            whole = np.round(grouped / scale).astype(np.int8)
            product = op.multiply(op.convert(op.constant(whole), ov.Type.f32), op.constant(scale))
            made[name] = op.reshape(product, op.constant(np.array(weights.shape)), False).output(0)
        for reader in list(output.get_target_inputs()):
            reader.replace_source_output(made[name])
    model.validate_nodes_and_infer_types()
