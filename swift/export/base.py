"""The contract of an exporter."""

from pathlib import Path
from typing import Protocol

from swift.config.export import ExportConfig
from swift.model.artifact import Artifact, ModelFolder
from swift.quantize.measure import Measured, Reference


class Exporter(Protocol):
    """Writes a model in another form. A member is an object with these three functions, or a module."""

    def check(self, model: ModelFolder, config: ExportConfig) -> None:
        """ConfigError, ModelError or DependencyError for what cannot be; before any weight is read and anything written."""

    def run(self, model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
        """Write into the new ``folder``, which becomes the output if all goes well and vanishes otherwise."""

    def verify(self, artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
        """Load what was written by code that did not write it, and compare its predictions with ``reference``."""
