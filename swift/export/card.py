"""The model card: where an exported model comes from, and what it lost."""

from pathlib import Path

from swift.config.export import ExportConfig
from swift.files import write_text
from swift.model.artifact import ModelFolder, Report

CARD_FILE = "README.md"


def write_card(folder: Path, model: ModelFolder, report: Report, config: ExportConfig) -> None:
    """Write README.md into ``folder``."""
    write_text(folder / CARD_FILE, f"# {model.name}, {report.format}\n")
