"""swift merge-lora: put an adapter into the weights of its model, and prove that nothing else changed."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swift import console, hub
from swift.config.commands import MergeConfig
from swift.errors import CheckpointError, ConfigError
from swift.files import give_back, new_folder, replace_folder, write_json
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.device import DTYPES
from swift.model.load import checkpoint_dtype, load_model
from swift.model.template import read_template
from swift.tuner.adapter import adapter_settings, with_adapter

PROBES = (
    "Heavy snow is expected in the northern districts until 08:00. Clear the pavements and keep the roads free.",
    "\u6625\u96ea\u7eb7\u98de\uff0c\u5982\u4f55\u5e94\u5bf9\u7a81\u53d1\u964d\u96ea\uff1f\u8bf7\u5c3d\u91cf\u51cf\u5c11\u51fa\u884c\u3002",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
)


@dataclass(frozen=True)
class Merged:
    """The merged model in ``path``; the model ``base`` and the ``adapter`` that it is made of; how much they differ at most.

    ``difference`` of a log-probability in float32, ``stored`` in the precision ``dtype`` of the file.
    """

    path: Path
    base: str
    base_path: Path
    reference: str
    revision: str
    sha256: dict[str, str]
    adapter: Path
    difference: float
    stored: float
    dtype: str

    def summary(self) -> str:
        return (
            f"merged {self.adapter} into {self.path}: largest difference of a log-probability {self.difference:.2g} in float32, "
            f"{self.stored:.2g} as stored in {self.dtype}"
        )


def run_merge(config: MergeConfig) -> Path:
    """Merge, compare, write; the folder of the merged model."""
    merged = merge(config)
    console.say(merged.summary())
    return merged.path


def merge(config: MergeConfig) -> Merged:
    """Merge, compare, write.

    The merge is done and compared in float32; the file has the precision of the base model.
    Raises CheckpointError, and writes nothing, if a log-probability moves by more than --max_difference.
    """
    if not config.adapters:
        raise ConfigError("no adapter is given", hint="say --adapters RUN")
    folder = adapter_folder(config.adapters[0])
    refuse_start_from_lost_bits(folder)
    reference = model_reference(config.model) if config.model else base_of(folder)
    target = Path(config.output_dir) if config.output_dir else folder.with_name(f"{folder.name}-merged")
    give_back(target)
    if target.exists() and not config.exist_ok:
        raise ConfigError(f"{target} exists", hint="choose another --output_dir, or say --exist_ok true to replace it")
    snapshot = hub.resolve(reference, config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline)
    chat_template = read_template(config.chat_template)
    loaded = load_model(snapshot.path, torch_dtype="float32", device=config.device, chat_template=chat_template, dense=True)
    tuned = with_adapter(loaded.model, folder)
    if not hasattr(tuned, "merge_and_unload"):
        kind = adapter_settings(folder).get("peft_type")
        raise ConfigError(f"{folder}: an adapter of the kind {kind} changes no weights to merge into", hint="use it by --adapters")
    ids = [loaded.tokenizer(text, add_special_tokens=False).input_ids for text in PROBES]
    wanted = logprobs(tuned, ids)
    try:
        merged = tuned.merge_and_unload(safe_merge=True)
    except ValueError as problem:  # peft found weights that are not finite
        raise CheckpointError(f"{folder}: {str(problem).splitlines()[0]}", hint="the adapter is damaged; nothing was written") from problem
    difference = largest_difference(wanted, logprobs(merged, ids))
    if not difference <= config.max_difference:
        raise CheckpointError(
            f"the merged model differs from the adapter: a log-probability moves by {difference:.2g} (at most {config.max_difference:g})",
            hint="the adapter may be damaged or made for another model; nothing was written",
        )
    dtype = DTYPES[config.torch_dtype] if config.torch_dtype else checkpoint_dtype(snapshot.path)
    merged.to(dtype)
    facts = {"base": reference, "adapter": str(folder), "difference": difference}
    staging = target.with_name(f"{target.name}.unchecked")
    try:
        _write(merged, loaded.tokenizer, staging, config, facts)
        stored = _difference_on_disk(staging, wanted, ids, config.device)
        if not stored <= (config.max_difference if dtype == torch.float32 else math.inf):
            raise CheckpointError(
                f"the model as stored in {str(dtype).removeprefix('torch.')} differs from the adapter by {stored:.2g}",
                hint="--torch_dtype float32 keeps all bits; nothing was written",
            )
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    name = str(dtype).removeprefix("torch.")
    return Merged(
        target, reference, snapshot.path, snapshot.reference, snapshot.revision, snapshot.sha256, folder, difference, stored, name
    )


def base_of(folder: Path) -> str:
    """The model that the adapter in ``folder`` was trained on: by its run, else by its own config."""
    from swift.config.saved import find_args, read_args

    args = find_args(folder)
    if args is not None and (model := read_args(args).get("model")):
        return str(model)
    base = adapter_settings(folder).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"the adapter {folder} does not say which model it is for", hint="say --model too")
    return str(base)


def refuse_start_from_lost_bits(folder: Path) -> None:
    """ConfigError for an adapter that makes up for the loss of 4-bit weights: whole ones would get it on top."""
    from swift.config.saved import find_args, read_args

    args = find_args(folder)
    if args is not None and read_args(args).get("init_weights") == "loftq":
        raise ConfigError(
            f"{folder} started with --init_weights loftq: it belongs to 4-bit weights and cannot be merged into whole ones",
            hint="use it with --quant_method bnb --quant_bits 4, as it was trained",
        )


@torch.no_grad()
def logprobs(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities (tokens, vocabulary) of every next token, in float32, for each of ``texts``."""
    return [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1).cpu() for ids in texts]


def largest_difference(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest difference of the log-probability of any token that has at least one chance in a thousand.

    NaN if a model computes NaN, which no bound accepts.
    """
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        gap = (a - b).abs()
        if not torch.isfinite(gap).all():
            return float("nan")
        likely = a > -6.9
        if likely.any():
            worst = max(worst, float(gap[likely].max()))
    return worst


def _write(model: Any, tokenizer: Any, target: Path, config: MergeConfig, facts: dict[str, Any]) -> None:
    shutil.rmtree(target, ignore_errors=True)  # remains of a merge that was killed
    with new_folder(target) as folder:
        model.save_pretrained(folder, safe_serialization=True, max_shard_size=config.max_shard_size)
        tokenizer.save_pretrained(folder)
        write_json(folder / "merge.json", facts)


def _difference_on_disk(target: Path, wanted: list[torch.Tensor], ids: list[list[int]], device: str | None) -> float:
    """The same comparison with the model as a reader will load it."""
    return largest_difference(wanted, logprobs(load_model(target, torch_dtype="float32", device=device).model, ids))
