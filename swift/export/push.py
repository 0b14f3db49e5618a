"""Upload of an exported folder to a hub."""

from pathlib import Path

from swift.config.export import ExportConfig
from swift.errors import HubError


def push(folder: Path, config: ExportConfig) -> None:
    """Upload ``folder`` to --hub_model_id."""
    raise HubError("uploading is not built yet")
