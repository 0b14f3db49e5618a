"""The engine that computes with OpenVINO: a model of transformers converted once, and openvino-genai's continuous batching."""

import sys
from typing import Any

from swift import deps


def library(name: str) -> Any:
    """A module of OpenVINO; DependencyError if it is not installed.

    OpenVINO reports each import and each conversion to its makers, unless the package that does so cannot be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return deps.require(name, extra="openvino")
