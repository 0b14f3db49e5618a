"""What a GGUF file says about itself: name, licence, size, number format, how to sample."""

import json
import math
import re
from pathlib import Path
from typing import Any

from swift.export.gguf.write import Checkpoint
from swift.hub.facts import licence_of
from swift.model.artifact import ModelFolder

# {key: name in generation_config.json}
SAMPLING = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}


def file_name(model: ModelFolder, number_type: str) -> str:
    """NAME-TYPE.gguf, of characters that are safe in any file system."""
    return f"{short_name(model)}-{number_type.upper()}.gguf"


def short_name(model: ModelFolder) -> str:
    """The last part of what the user called the model."""
    last = Path(model.name.rpartition("::")[2].partition("@")[0]).name or Path(model.path).name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def facts(model: ModelFolder, number_type: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Keys below general."""
    import gguf
    from gguf.utility import model_weight_count_rounded_notation

    kind = gguf.LlamaFileType["ALL_F32" if number_type == "f32" else f"MOSTLY_{number_type.upper()}"]
    count = sum(math.prod(shape) for _, shape in checkpoint.header)
    found: dict[str, Any] = {
        "general.type": "model",
        "general.name": short_name(model),
        "general.size_label": model_weight_count_rounded_notation(count),
        "general.file_type": int(kind),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    if licence := licence_of(model.path):
        found["general.license"] = licence
    said = generation(model.path)
    for key, name in SAMPLING.items():
        if said.get(name) is not None:
            found[f"general.sampling.{key}"] = float(said[name])
    if said.get("top_k") is not None:
        found["general.sampling.top_k"] = int(said["top_k"])
    return found


def generation(path: Path) -> dict[str, Any]:
    """generation_config.json; empty if there is none."""
    try:
        said = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
