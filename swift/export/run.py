"""swift export and swift quantize: merge what has to be merged, write, compare with the original, report; then it is there."""

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from swift import console
from swift.config.export import ExportConfig
from swift.export import EXPORTERS
from swift.export.base import Exporter
from swift.export.finish import Done, finish, finish_merge, report_of, summary
from swift.export.folder import claimed, merged_folder, refuse_target, whole_folder
from swift.export.push import check_push, push, upload_as_it_is
from swift.export.source import Source, find_source, merge_config, weights_of
from swift.files import explain_os_errors, replace_folder
from swift.model.artifact import ModelFolder
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.finite import refuse_not_finite
from swift.model.tokenizer import load_tokenizer
from swift.quantize.calibrate import documents
from swift.quantize.measure import Measured, Reference


def run_export(config: ExportConfig) -> Path:
    """The folder that was written, or uploaded. It appears whole, or not at all; it stays if an upload fails."""
    if config.push_to_hub:
        check_push(config)
    if config.uploads_only:
        return upload_as_it_is(config)
    if config.to_hf:
        from swift.export.mcore import to_hf

        return to_hf(config, output_folder(config))
    target = _merge(config) if config.merges_only else _export(config)
    if config.push_to_hub:
        push(target, config)
    return target


def output_folder(config: ExportConfig) -> Path:
    """--output_dir, or a name beside the adapter or the model that says what it is: CHECKPOINT-awq-int4, MODEL-gguf."""
    if config.output_dir:
        path = Path(config.output_dir)
        return path if path.name not in ("", "..") else path.resolve()  # what is written meanwhile has names beside it
    if config.adapters:
        place = adapter_folder(config.adapters[0]).absolute()
    elif config.mcore_model:
        place = Path(config.mcore_model).expanduser().absolute()
    else:
        named = Path(model_reference(config.model or ""))
        place = named.resolve() if named.is_dir() else Path(Path(str(config.model).rpartition("::")[2]).name.partition("@")[0])
    return place.with_name(f"{place.name}-{_kind(config)}")


def _kind(config: ExportConfig) -> str:
    if config.to_hf:
        return "hf"
    if config.quant_method is None:
        return config.to or "merged"
    method = config.quant_format if config.quant_format == "gptq_v2" else config.quant_method
    return str(method) if method == "fp8" else f"{method}-int{config.quant_bits}"


def _merge(config: ExportConfig) -> Path:
    """The merged model alone, in the precision of the model it was trained on."""
    from swift.tuner.merge import merge

    adapter = adapter_folder(config.adapters[0])
    target = output_folder(config)
    base = Path(model_reference(config.model)) if config.model else adapter
    with claimed(target):
        refuse_target(target, exist_ok=config.exist_ok, keep=[adapter, *([base] if base.is_dir() else [])])
        merged = merge(merge_config(config, output_dir=str(merged_folder(target) / target.name)))
        with explain_os_errors(target):
            finish_merge(merged, config)
            replace_folder(merged.path, target)
    console.say(replace(merged, path=target).summary())
    return target


def _export(config: ExportConfig) -> Path:
    """Check all that can be known before weights are read; then merge, write, measure, report."""
    exporter: Exporter | None = None if config.to is None else EXPORTERS.get(config.to)
    target = output_folder(config)
    refuse_target(target, exist_ok=config.exist_ok, keep=())
    source = find_source(config)
    if exporter is not None:
        exporter.check(source.model, config)
    held_out: list[list[int]] = []
    if exporter is not None or source.adapter is not None:  # a quantizer that need not wait for a merge reads them itself
        held_out = documents(config, load_tokenizer(source.model.path), calibrates=exporter is None).held_out
    begin = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(claimed(target))
        refuse_target(target, exist_ok=config.exist_ok, keep=_inputs(source, config))
        model = stack.enter_context(weights_of(source, config, target))
        if exporter is not None:
            refuse_not_finite(model)
        folder = stack.enter_context(whole_folder(target, resumes=exporter is None))
        done = _quantize(model, config, folder) if exporter is None else _convert(exporter, model, config, folder, held_out)
        report = report_of(source.model, model, done, time.monotonic() - begin)
        finish(folder, source, report, done, config, name=target.name)
    console.say(summary(target, report))
    return target


def _inputs(source: Source, config: ExportConfig) -> list[Path]:
    """What must not be replaced."""
    adapter = [source.adapter] if source.adapter else []
    return [source.model.path, *adapter, *map(Path, filter(os.path.exists, config.dataset))]


def _convert(exporter: Exporter, model: ModelFolder, config: ExportConfig, folder: Path, held_out: list[list[int]]) -> Done:
    artifact = exporter.run(model, config, folder)
    measured = exporter.verify(artifact, Reference(model, held_out), config) if held_out else Measured(None)
    return Done(artifact, measured)


def _quantize(model: ModelFolder, config: ExportConfig, folder: Path) -> Done:
    """Block by block; a killed run goes on where it was."""
    from swift.quantize.run import quantize

    return Done(*quantize(model, config, folder))
