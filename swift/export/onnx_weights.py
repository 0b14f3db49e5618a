"""The weights of an ONNX model: read one, written one, each in the form that its use in the graph wants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift import deps
from swift.errors import ModelError
from swift.export.onnx_trace import PREFIX
from swift.model.traced import Step
from swift.quantize.grid import find_grid, round_to

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ALIGNMENT = 64  # bytes, of each tensor in the file
BLOCK = 32  # weights of a row that share a scale and a zero point
MICROSOFT = "com.microsoft"
ROWS = 1024  # rounded at once

# N outputs, K inputs, V vocabulary, D width of the model, G blocks of a row


class WeightFile:
    """Tensors one behind the other in DATA_FILE, as initializers of ``graph``."""

    def __init__(self, folder: Path, graph: Any) -> None:
        self._ir = deps.require("onnx_ir", extra="onnx")
        self._graph = graph
        self._folder = folder
        self._file = (folder / DATA_FILE).open("wb")

    def close(self) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor, *, same_bytes: Any = None) -> Any:
        """The value in the graph that holds ``tensor``; at the place of ``same_bytes``, if that is given."""
        kinds = self._ir.DataType
        kind = {
            torch.float32: kinds.FLOAT, torch.float16: kinds.FLOAT16, torch.bfloat16: kinds.BFLOAT16,
            torch.uint8: kinds.UINT8, torch.int64: kinds.INT64,
        }  # fmt: skip
        shape, dtype = self._ir.Shape(tuple(tensor.shape)), kind[tensor.dtype]
        data = np.ascontiguousarray((tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy())
        if same_bytes is None:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            offset = self._file.tell()
            self._file.write(data.data)
        else:
            offset = same_bytes.const_value.offset
        held = self._ir.ExternalTensor(
            location=DATA_FILE, offset=offset, length=data.nbytes, dtype=dtype, shape=shape, name=name, base_dir=self._folder
        )
        value = self._ir.Value(name=name, shape=shape, type=self._ir.TensorType(dtype), const_value=held)
        self._graph.initializers[name] = value
        return value


def write(made: Any, model: Any, precision: str, folder: Path) -> None:
    """Write the graph ``made`` with the weights of ``model`` into ``folder``: MODEL_FILE and DATA_FILE."""
    ir = deps.require("onnx_ir", extra="onnx")
    weights = dict(Step(model).named_parameters(remove_duplicate=False)) | dict(Step(model).named_buffers(remove_duplicate=False))
    graph, head = made.graph, model.get_output_embeddings()
    file = WeightFile(folder, graph)
    try:
        for value in [value for value in graph.inputs if value.name.startswith(PREFIX)]:
            graph.inputs.remove(value)
            weight = weights[value.name]
            is_head = head is not None and weight is head.weight
            Weight(ir, graph, file, value, weight.detach(), is_head=is_head).write(precision)
    finally:
        file.close()
    if precision == "int4":
        made.opset_imports[MICROSOFT] = 1
    deps.require("onnx_ir.passes.common", extra="onnx").RemoveUnusedNodesPass()(made)
    made.producer_name = "swift"
    ir.save(made, folder / MODEL_FILE)


class Weight:
    """A weight of the graph, an input until it is written, and the nodes that read it.

    ``products`` are (MatMul or Gemm, whether it reads the weight as (N, K) through a transposition); ``lookups`` are embeddings.
    """

    def __init__(self, ir: Any, graph: Any, file: WeightFile, value: Any, tensor: Tensor, *, is_head: bool) -> None:
        self.ir, self.graph, self.file, self.value, self.tensor = ir, graph, file, value, tensor
        self.name, self.is_head = value.name.removeprefix(PREFIX), is_head
        self.products: list[tuple[Any, bool]] = []
        self.lookups: list[Any] = []
        self.is_plain = True  # and nothing else reads it
        for use in value.uses():
            self._note(use.node, use.idx)

    def _note(self, node: Any, index: int) -> None:
        readers = [use for use in node.outputs[0].uses()]
        if node.op_type == "Transpose" and self.tensor.dim() == 2 and all(_is_product(use.node, use.idx) for use in readers):
            self.products += [(use.node, True) for use in readers]
        elif _is_product(node, index):
            self.products.append((node, bool(node.attributes["transB"].value) if "transB" in node.attributes else False))
        elif node.op_type == "Gather" and index == 0 and self.tensor.dim() == 2:
            self.lookups.append(node)
        else:
            self.is_plain = False

    def write(self, precision: str) -> None:
        fits = self.is_plain and self.tensor.dtype == torch.float32 and self.tensor.dim() == 2
        if not fits or precision == "fp32":
            self._replace(self.file.add(self.name, self.tensor))
        elif precision == "fp16":
            self._halve()
        else:
            self._quantize()

    def _replace(self, new: Any) -> None:
        for use in list(self.value.uses()):
            use.node.replace_input_with(use.idx, new)

    def _halve(self) -> None:
        """16 bits in the file; a Cast behind it, which runtimes fold, or behind a lookup, so that it takes the rows alone."""
        half = self.tensor.half()
        if not half.isfinite().all():
            raise ModelError(f"{self.name} has numbers that 16 bits do not hold", hint="--onnx_precision fp32")
        held = self.file.add(self.name, half)
        for node in self.lookups:
            node.replace_input_with(0, held)
            self._behind(node, "Cast", {"to": self.ir.DataType.FLOAT})
        if self.products:
            cast = self._node("Cast", [held], {"to": self.ir.DataType.FLOAT}, before=None)
            self._replace(cast)

    def _quantize(self) -> None:
        """Blocks of 4 bits for products; of 8 bits for embeddings and the head, of which a tied one is in the file once."""
        bits = 8 if self.lookups or self.is_head else 4
        is_transposed = {transposed for _, transposed in self.products} | ({True} if self.lookups else set())
        if len(is_transposed) > 1:
            self._halve()
            return
        rows = self.tensor if is_transposed.pop() else self.tensor.T.contiguous()  # (N, K)
        codes, scales, zeros = quantize(rows, bits)
        parts = [(f"{self.name}_Q{bits}", codes), (f"{self.name}_scales", scales), (f"{self.name}_zeros", zeros)]
        N, K = rows.shape
        held = [self.file.add(name, part.reshape(N, -1) if self.lookups else part) for name, part in parts]
        for node in self.lookups:
            settings = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
            self._instead(node, "GatherBlockQuantized", [held[0], node.inputs[1], held[1], held[2]], settings)
        if self.lookups and self.products:
            held = [self.file.add(f"{name}_of_head", part, same_bytes=place) for (name, part), place in zip(parts, held, strict=True)]
        for node, _ in self.products:
            settings = {"K": K, "N": N, "bits": bits, "block_size": BLOCK}
            self._instead(node, "MatMulNBits", [node.inputs[0], *held], settings)

    def _instead(self, node: Any, kind: str, inputs: list[Any], settings: dict[str, Any]) -> None:
        """A node of onnxruntime's own in place of ``node``; a Gemm's bias is added behind it."""
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        out = self._node(kind, inputs, settings, before=node, domain=MICROSOFT)
        if bias is not None:
            out = self._node("Add", [out, bias], {}, before=node)
        old = node.outputs[0]
        out.shape, out.type = old.shape, old.type
        self.ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        name = old.name
        self.graph.remove(node, safe=True)
        out.name = name

    def _behind(self, node: Any, kind: str, settings: dict[str, Any]) -> None:
        """Put a node behind ``node``, whose readers read that."""
        old = node.outputs[0]
        readers = list(old.uses())
        new = self.ir.node(kind, [old], attributes=settings)
        new.outputs[0].name = f"{old.name}_{kind}"
        new.outputs[0].shape, new.outputs[0].type = old.shape, old.type
        old.type = self.ir.TensorType(self.ir.DataType.FLOAT16)
        self.graph.insert_after(node, new)
        for use in readers:
            use.node.replace_input_with(use.idx, new.outputs[0])

    def _node(self, kind: str, inputs: list[Any], settings: dict[str, Any], *, before: Any, domain: str = "") -> Any:
        """The output of a new node before ``before``, or in front of all."""
        new = self.ir.node(kind, inputs, attributes=settings, domain=domain)
        new.outputs[0].name = f"{self.name}_{kind}"
        self.graph.insert_before(self.graph[0] if before is None else before, new)
        return new.outputs[0]


def _is_product(node: Any, index: int) -> bool:
    """Whether ``node`` computes x W with the weight W as its second input, and nothing else."""
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    is_scaled = settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0 or settings.get("transA", 0)
    return index == 1 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and not is_scaled))


def quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """``rows`` (N, K) as codes (N, G, bytes of a block), scales (N, G) float32 and zero points (N, bytes), low bits first.

    w = (code - zero) * scale. A last block that is not full has zeros at its end.
    """
    whole = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    scales, zeros = find_grid(whole, bits, BLOCK, symmetric=False)
    chunks = zip(whole.split(ROWS), scales.split(ROWS), zeros.split(ROWS), strict=True)
    codes = torch.cat([round_to(weight, scale, zero, bits) for weight, scale, zero in chunks])
    pack: Callable[[Tensor], Tensor] = _pairs if bits == 4 else (lambda part: part)
    return pack(codes).reshape(len(rows), scales.shape[1], -1), scales, pack(zeros)


def _pairs(codes: Tensor) -> Tensor:
    """Two numbers of 4 bits in a byte, the first in the low half; (..., n) to (..., ceil(n / 2))."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)
