"""Which operators TensorRT's ONNX parser knows, for machines that have no TensorRT."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from swift import deps

LIST = Path(__file__).with_name("operators.txt")


@cache
def known() -> frozenset[str]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


def unknown(path: Path) -> list[str]:
    """Operators of the ONNX file at ``path`` that TensorRT does not know, with the domain of those outside of ONNX."""
    onnx = deps.require("onnx", extra="onnx")
    model = onnx.load(str(path), load_external_data=False)
    own = {(function.domain, function.name) for function in model.functions}  # written out in the file itself
    used = {(node.domain, node.op_type) for graph in (model.graph, *model.functions) for node in _nodes(graph)}
    foreign = {f"{domain}::{name}" for domain, name in used - own if domain not in ("", "ai.onnx")}
    return sorted(foreign | {name for domain, name in used - own if domain in ("", "ai.onnx") and name not in known()})


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of ``graph``, and those of the graphs inside of them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
