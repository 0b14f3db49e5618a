"""What the files of a model say of it. Knows no torch."""

import json
from pathlib import Path
from typing import Any

from swift.errors import ModelError


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json; ModelError if it is absent or no JSON object."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} holds no config.json, so it is no model", hint="name a folder that save_pretrained wrote") from None
    except (OSError, ValueError) as problem:
        raise ModelError(f"{file} cannot be read: {problem}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object")
    return config
