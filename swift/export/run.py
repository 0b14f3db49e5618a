"""swift export and swift quantize: merge what has to be merged, write, compare with the original, report; then it is there."""

import shutil
import time
from pathlib import Path

from swift import console, hub
from swift.config.export import ExportConfig
from swift.errors import ConfigError
from swift.export import EXPORTERS
from swift.export.base import Exporter
from swift.export.finish import finish, report_of, summary, whole_folder
from swift.model.artifact import ModelFolder
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.tokenizer import load_tokenizer
from swift.quantize.calibrate import documents
from swift.quantize.measure import Measured, Reference


def run_export(config: ExportConfig) -> Path:
    """The folder that was written. It appears whole, or not at all."""
    if config.to is None and config.quant_method is None:
        return _merge(config, None)
    target = output_folder(config)
    if target.exists() and not config.exist_ok:
        raise ConfigError(f"{target} exists", hint="choose another --output_dir, or say --exist_ok true to replace it")
    merged = target.with_name(f".{target.name}.merged") if config.adapters else None
    try:
        model = _model(config, merged)
        model.refuse_quantized()
        write = _convert if config.quant_method is None else _quantize
        write(model, config, target)
    finally:
        if merged is not None:
            shutil.rmtree(merged, ignore_errors=True)
    if config.push_to_hub:
        from swift.export.push import push

        push(target, config)
    return target


def output_folder(config: ExportConfig) -> Path:
    """--output_dir, or a name beside the adapter or the model that says what it is: CHECKPOINT-awq-int4, MODEL-gguf."""
    if config.output_dir:
        return Path(config.output_dir)
    if config.adapters:
        place = adapter_folder(config.adapters[0])
    else:
        named = Path(model_reference(config.model or ""))
        place = named.resolve() if named.is_dir() else Path(Path(str(config.model).rpartition("::")[2]).name.partition("@")[0])
    kind = str(config.to)
    if config.quant_method is not None:
        kind = config.quant_method if config.quant_method == "fp8" else f"{config.quant_method}-int{config.quant_bits}"
    return place.with_name(f"{place.name}-{kind}")


def _model(config: ExportConfig, merged: Path | None) -> ModelFolder:
    """The model on disk whose weights are taken; the adapter's, merged in float32 and checked, in the folder ``merged``."""
    if merged is not None:
        shutil.rmtree(merged, ignore_errors=True)
        path = _merge(config, merged)
        return ModelFolder(path, adapter_folder(config.adapters[0]).name)
    reference = model_reference(config.model or "")
    snapshot = hub.resolve(reference, config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline)
    return ModelFolder(snapshot.path, reference)


def _merge(config: ExportConfig, target: Path | None) -> Path:
    from swift.config.commands import MergeConfig
    from swift.config.options import build
    from swift.tuner.merge import run_merge

    shared = [name for name in MergeConfig.__dataclass_fields__ if config.said(name) and name != "merge_lora"]
    given = {name: getattr(config, name) for name in shared if name in type(config).__dataclass_fields__}
    if target is not None:
        given |= {"output_dir": str(target)}
    return run_merge(build(MergeConfig, ("export", given)))


def _convert(model: ModelFolder, config: ExportConfig, target: Path) -> None:
    """Write ``model`` as --to says, with its report."""
    exporter: Exporter = EXPORTERS.get(config.to or "")
    exporter.check(model, config)
    held_out = documents(config, load_tokenizer(model.path), calibrates=False).held_out
    begin = time.monotonic()
    with whole_folder(target) as folder:
        artifact = exporter.run(model, config, folder)
        measured = exporter.verify(artifact, Reference(model, held_out), config) if held_out else Measured(None)
        report = report_of(model, artifact, measured, time.monotonic() - begin)
        finish(folder, model, report, config)
    console.say(summary(target, report))


def _quantize(model: ModelFolder, config: ExportConfig, target: Path) -> None:
    """Quantize ``model`` block by block; a killed run goes on where it was."""
    from swift.quantize.run import quantize

    begin = time.monotonic()
    with whole_folder(target, resumes=True) as folder:
        artifact, measured, worst = quantize(model, config, folder)
        report = report_of(model, artifact, measured, time.monotonic() - begin, worst)
        finish(folder, model, report, config)
    console.say(summary(target, report))
