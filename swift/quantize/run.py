"""Quantizes a model block by block. Read this first."""

from pathlib import Path

from swift.config.export import ExportConfig
from swift.model.artifact import Artifact, ModelFolder
from swift.quantize.measure import Measured


def quantize(model: ModelFolder, config: ExportConfig, folder: Path) -> tuple[Artifact, Measured, tuple[tuple[str, float], ...]]:
    """Write ``model`` with quantized weights into ``folder``; what was lost, and the layers that lost most."""
    raise NotImplementedError
