"""What quantizing and exporting make: files, and a report of what they cost and what was lost."""

import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift.errors import ModelError
from swift.hub.safetensors_header import read_header
from swift.model.files import read_config
from swift.model.quantized import format_of

_AROUND = {
    "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt",
    "added_tokens.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
}  # fmt: skip
_BEGINNINGS = ("tokenizer", "special_tokens", "LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: config.json, safetensors and tokenizer in ``path``; ``name`` is what the user called it."""

    path: Path
    name: str

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.path)

    @property
    def weight_files(self) -> list[Path]:
        """The files that transformers reads: model.safetensors, or those of the index; others may hold the same tensors again."""
        whole, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return sorted(self.path / name for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return sorted(self.path.glob("*.safetensors"))

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def num_weights(self) -> int:
        """Numbers in all tensors of the files."""
        return sum(math.prod(shape) for file in self.weight_files for _, shape in read_header(file).values())

    def copy_around(self, folder: Path) -> None:
        """Copy what goes with the weights into ``folder``: configuration, tokenizer, chat template, processor, licence."""
        for file in sorted(self.path.iterdir()):
            if file.is_file() and (file.name in _AROUND or file.name.startswith(_BEGINNINGS) or file.suffix in (".model", ".tiktoken")):
                shutil.copyfile(file, folder / file.name)

    def refuse_quantized(self) -> None:
        """ModelError for a checkpoint whose weights were quantized already."""
        method = format_of(self.config.get("quantization_config") or {})
        if method:
            raise ModelError(
                f"{self.name}: its weights are quantized already ({method})",
                hint="start from the model in 16 or 32 bits that it was made of",
            )


@dataclass(frozen=True)
class Artifact:
    """What was written into the folder ``path``: ``files`` hold weights, relative to it."""

    path: Path
    format: str
    files: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        return sum((self.path / name).stat().st_size for name in self.files)


@dataclass(frozen=True)
class Report:
    """What an artifact costs and what was lost, measured on held-out text.

    ``kl`` is the mean Kullback-Leibler divergence of the written model from the original, in nats a token;
    ``loader`` is what read the artifact back to find it. None where it could not be measured, with the reason in ``notes``.
    ``worst_layers`` are (module, relative squared error of its output), the worst first.
    """

    format: str
    loader: str | None
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    tokens: int = 0
    kl: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    same_token: float | None = None
    worst_layers: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()

    def enforce(self, max_kl: float | None) -> None:
        """ModelError if more was lost than ``max_kl`` allows, or if that could not be measured."""
        if max_kl is None:
            return
        if self.kl is None:
            raise ModelError(
                f"--max_kl {max_kl:g} cannot be checked: {'; '.join(self.notes) or 'the divergence was not measured'}",
                hint="remove --max_kl, or install what loads this format",
            )
        if not self.kl <= max_kl:
            raise ModelError(
                f"the divergence from the original is {self.kl:.3g} nats a token, more than --max_kl {max_kl:g}; nothing was written",
                hint="more bits, a smaller --group_size, or more calibration data lose less",
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
