"""Megatron-Core: a checkpoint that Megatron-LM trains on (torch_dist), and back to safetensors."""

import gc
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from swift import console, hub
from swift.config.export import ExportConfig
from swift.errors import CheckpointError, ModelError
from swift.export.folder import claimed, refuse_target, whole_folder
from swift.model.artifact import Artifact, ModelFolder
from swift.model.checkpoints import model_reference
from swift.model.load import load_model
from swift.model.policy import is_close, probe_ids
from swift.parallel.megatron import package
from swift.parallel.megatron.convert import Converter, alone, checkpoint_in
from swift.quantize.measure import Measured, Reference


def check(model: ModelFolder, config: ExportConfig) -> None:
    """See Exporter."""
    from swift.parallel.megatron.describe import describe

    package.part("dist_checkpointing")
    shell = _shell(model.path)
    describe(shell, list(shell.state_dict()))


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """See Exporter."""
    loaded = load_model(model.path, torch_dtype=config.torch_dtype, device="cpu").model
    dtype = next(loaded.parameters()).dtype
    with alone():
        converter = Converter(loaded, dtype)
        converter.take(loaded.state_dict())
        del loaded
        gc.collect()
        place = converter.save(folder)
    model.copy_around(folder)
    files = tuple(str(file.relative_to(folder)) for file in sorted(place.glob("*.distcp")))
    return Artifact(folder, f"Megatron-Core (torch_dist, {str(dtype).removeprefix('torch.')})", files)


def verify(artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
    """See Exporter: Megatron-Core reads it, and its GPTModel computes."""
    with alone():
        converter = Converter(_shell(artifact.path), torch.float32)
        converter.load(artifact.path)
        return reference.compare(f"megatron-core {version('megatron-core')}", converter.logits)


def to_hf(config: ExportConfig, target: Path) -> Path:
    """The checkpoint --mcore_model as a folder that transformers loads; compared with what Megatron-Core computes."""
    assert config.mcore_model is not None
    source = Path(config.mcore_model).expanduser()
    checkpoint_in(source)
    package.part("dist_checkpointing")
    refuse_target(target, exist_ok=config.exist_ok, keep=(source,))
    around = ModelFolder(_around(config, source), str(source))
    dtype = getattr(torch, config.torch_dtype) if config.torch_dtype else _dtype_of(around)
    with claimed(target), whole_folder(target, resumes=False) as folder, alone():
        shell = _shell(around.path)
        converter = Converter(shell, dtype)
        converter.load(source)
        shell.config.dtype = dtype
        shell.save_pretrained(folder, state_dict=converter.give(), max_shard_size=config.max_shard_size)
        _copy_missing(around, folder)
        loaded = load_model(folder, torch_dtype="float32", device="cpu").model
        ids = probe_ids(loaded, min(8, converter.settings.dims.vocab_size))[0].tolist()
        with torch.no_grad():
            found = loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        wanted = converter.logits(ids).float()
        difference = float((found.float().log_softmax(-1) - wanted.log_softmax(-1)).abs().max())
        if dtype == torch.float32 and not is_close(found.float(), wanted):
            raise ModelError(f"transformers computes something else than Megatron-Core: log-probabilities differ by {difference:.2g}")
    console.say(f"{target}: safetensors, {dtype}; largest difference of a log-probability from Megatron-Core {difference:.2g}")
    return target


def _around(config: ExportConfig, source: Path) -> Path:
    """The folder with config.json and tokenizer: that of --model, or the checkpoint's own."""
    if config.model:
        name = model_reference(config.model)
        return hub.resolve(name, config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline).path
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json", hint="say --model: the model that the checkpoint was trained from")
    return source


def _shell(path: Path) -> Any:
    """The transformers model of ``path`` without numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)


def _dtype_of(model: ModelFolder) -> torch.dtype:
    name = model.config.get("dtype") or model.config.get("torch_dtype") or "float32"
    found: torch.dtype = getattr(torch, name)
    return found


def _copy_missing(model: ModelFolder, folder: Path) -> None:
    """What goes with the weights, but for the configuration, which was written with them."""
    written = {file.name: file.read_bytes() for file in folder.glob("*config.json")}
    model.copy_around(folder)
    for name, text in written.items():
        (folder / name).write_bytes(text)
