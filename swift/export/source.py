"""What is exported: a model on disk, or an adapter and the model that it is merged into."""

import contextlib
import gc
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift import console, hub
from swift.config.commands import MergeConfig
from swift.config.export import ExportConfig
from swift.config.options import build
from swift.errors import ModelError, first_line
from swift.export.folder import merged_folder
from swift.files import explain_os_errors, sha256_file, write_text
from swift.hub.facts import licence_of
from swift.model.artifact import ModelFolder
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.load import checkpoint_dtype

_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """``model`` is on disk and its weights were not read yet; ``adapter`` is a folder, merged into them first.

    ``reference`` and ``revision`` find the model again; ``sha256`` are digests of its files that a hub has given.
    """

    model: ModelFolder
    reference: str
    revision: str
    sha256: dict[str, str]
    adapter: Path | None = None

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files of weights that go in, by their names; an adapter's begin with adapter/."""
        found = {file.name: self.sha256.get(file.name) or sha256_file(file) for file in self.model.weight_files}
        if self.adapter is not None:
            found |= {f"adapter/{file.name}": sha256_file(file) for file in sorted(self.adapter.glob("*.safetensors"))}
        return found


def find_source(config: ExportConfig) -> Source:
    """The model that ``config`` names, fetched if need be, and its adapter.

    Raises ModelError for weights that are quantized already, and for an architecture that the installed transformers do not
    know; CheckpointError and ConfigError for what is no adapter, or one that cannot be merged.
    """
    adapter = None
    reference = model_reference(config.model or "")
    if config.adapters:
        from swift.tuner.merge import base_of, refuse_start_from_lost_bits

        adapter = adapter_folder(config.adapters[0])
        refuse_start_from_lost_bits(adapter)
        reference = reference or base_of(adapter)
    snapshot = hub.resolve(reference, config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline)
    model = ModelFolder(snapshot.path, reference)
    model.refuse_quantized()
    _refuse_unknown(model)
    return Source(model, snapshot.reference, snapshot.revision, snapshot.sha256, adapter)


@contextlib.contextmanager
def weights_of(source: Source, config: ExportConfig, target: Path) -> Iterator[ModelFolder]:
    """The model with the adapter in its weights, merged and checked in float32, in a folder that vanishes with the block.

    The file keeps float32: rounded to 16 bits once more before it is quantized or converted, it would be another model.
    What is not quantized, and numbers of a format that has those of the model, go back to the precision of that model.
    """
    if source.adapter is None:
        yield source.model
        return
    from swift.tuner.merge import merge

    if config.takes_torch_dtype and config.torch_dtype is None:
        config.derive("torch_dtype", str(checkpoint_dtype(source.model.path)).removeprefix("torch."), "that of the model")
    place = merged_folder(target)
    merged = merge(merge_config(config, output_dir=str(place / "model"), model=source.model.name, torch_dtype="float32"))
    console.say(f"merged {source.adapter} in float32: largest difference of a log-probability {merged.difference:.2g}")
    _bring_licence(source.model.path, merged.path)
    gc.collect()  # the models that were compared
    yield ModelFolder(merged.path, source.adapter.name)


def copy_licences(source: Path, folder: Path) -> None:
    """The texts that go with a model wherever it goes."""
    for file in sorted(source.iterdir()):
        if _LICENCE.match(file.name) and file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _bring_licence(source: Path, merged: Path) -> None:
    """Texts and name of the licence, which formats write into their files, from the folder ``source`` that is merged into."""
    with explain_os_errors(merged):
        copy_licences(source, merged)
        if licence := licence_of(source):
            write_text(merged / "README.md", f"---\nlicense: {licence}\n---\n")


def merge_config(config: ExportConfig, **changes: Any) -> MergeConfig:
    """What swift merge-lora would be told: what the user said, and what the run has saved."""
    names = [name for name in MergeConfig.__dataclass_fields__ if name in config.sources and name != "merge_lora"]
    saved = {name: getattr(config, name) for name in names if config.sources[name].startswith("checkpoint")}
    said = {name: getattr(config, name) for name in names if config.said(name)}
    return build(MergeConfig, ("checkpoint", saved), ("export", said | changes))


def _refuse_unknown(model: ModelFolder) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as problem:
        kind = (model.config.get("architectures") or [model.config.get("model_type") or "of no name"])[0]
        hint = "only the classes of the installed transformers are used; a newer one may know it: pip install -U transformers"
        raise ModelError(f"{model.name}: its architecture {kind} cannot be read: {first_line(problem)}", hint=hint) from problem
