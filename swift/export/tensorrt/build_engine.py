#!/usr/bin/env python3
"""Build a TensorRT engine of an ONNX decoder. Needs no package but TensorRT, so that it runs where the GPU is.

python build_engine.py                               # TensorRT, on the GPU that will run it
python build_engine.py --library rtx --capability 8.9  # TensorRT for RTX, also without a GPU
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

ONNX, PROFILES, ENGINE = "model.onnx", "profiles.json", "model.engine"
Profile = dict[str, list[list[int]]]


class BuildError(Exception):
    """What TensorRT says against the network."""


def library(name: str) -> Any:
    """The Python module of TensorRT ("tensorrt") or of TensorRT for RTX ("rtx"); ModuleNotFoundError if it is not installed."""
    if name == "tensorrt":
        return importlib.import_module("tensorrt")
    try:
        return importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError:  # PyPI itself has the libraries in a package for ONNX Runtime, and the bindings in another
        importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
        return importlib.import_module("tensorrt_rtx_bindings")


class Network:
    """An ONNX file as TensorRT's own parser reads it: strongly typed, each number in the type that the file says."""

    def __init__(self, trt: Any, onnx: Path) -> None:
        self.trt = trt
        messages: list[str] = []

        class Log(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    messages.append(message)

        self._log, self._messages = Log(), messages
        self.builder = trt.Builder(self._log)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parser = trt.OnnxParser(self.network, self._log)
        if not self._parser.parse_from_file(str(onnx)):
            faults = [self._parser.get_error(index) for index in range(self._parser.num_errors)]
            raise BuildError("; ".join(f"{fault.node_operator()} {fault.node_name()}: {fault.desc()}" for fault in faults))

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """{name: shape}, with -1 for what a profile says."""
        found = [self.network.get_input(index) for index in range(self.network.num_inputs)]
        return {tensor.name: tuple(tensor.shape) for tensor in found}

    def build(self, profiles: list[Profile], capabilities: list[str]) -> Any:
        """The engine as bytes. ``profiles`` give the smallest, the usual and the largest shape of each input."""
        config = self.builder.create_builder_config()
        for profile in profiles:
            made = self.builder.create_optimization_profile()
            for name, (least, usual, most) in profile.items():
                made.set_shape(name, tuple(least), tuple(usual), tuple(most))
            if config.add_optimization_profile(made) < 0:
                raise BuildError(f"a profile is refused: {self._said()}")
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise BuildError(self._said())
        return engine

    def _said(self) -> str:
        return self._messages[-1] if self._messages else "it gives no reason"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("tensorrt", "rtx"), default="tensorrt")
    parser.add_argument("--capability", nargs="*", default=[], help="compute capabilities to build for, such as 8.6 8.9 (rtx)")
    parser.add_argument("--output", default=ENGINE)
    given = parser.parse_args()
    here = Path(__file__).resolve().parent
    try:
        network = Network(library(given.library), here / ONNX)
        Path(given.output).write_bytes(network.build(json.loads((here / PROFILES).read_text()), given.capability))
    except (BuildError, ModuleNotFoundError) as problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"wrote {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
