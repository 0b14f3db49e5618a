"""The end of an export: the report, the model card, the audit record."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swift import audit
from swift.config.export import ExportConfig
from swift.config.options import default_of, options_of, to_dict
from swift.errors import ModelError
from swift.export.card import merge_card, shown, write_card
from swift.export.folder import REPORT_FILE
from swift.export.source import Source, copy_licences
from swift.files import sha256_file, visible_files, write_json
from swift.model.artifact import Artifact, ModelFolder, Report
from swift.quantize.measure import Measured
from swift.train.memory import peak_memory_gib
from swift.train.report import versions

if TYPE_CHECKING:
    from swift.tuner.merge import Merged

AUDIT_FILE = "audit.jsonl"
_PLACES = {"model", "adapters", "output_dir", "dataset", "chat_template", "system", "columns"}  # these may name files of this machine


@dataclass(frozen=True)
class Done:
    """What an exporter or a quantizer has written, what was measured of it, and the layers that lost most."""

    artifact: Artifact
    measured: Measured
    worst_layers: tuple[tuple[str, float], ...] = ()


def report_of(original: ModelFolder, model: ModelFolder, done: Done, seconds: float) -> Report:
    """``original`` is what the user named, ``model`` what was written, the adapter merged; ``seconds`` those of the whole export."""
    facts = {name: value for name, value in asdict(done.measured).items() if name != "largest_difference"}
    return Report(
        format=done.artifact.format,
        bits_per_weight=done.artifact.weight_bytes * 8 / model.num_weights,
        bytes_before=original.weight_bytes,
        bytes_after=done.artifact.weight_bytes,
        worst_layers=done.worst_layers,
        seconds=seconds,
        peak_memory_bytes=int((peak_memory_gib(torch.device("cpu")) or 0) * 2**30),
        **facts,
    )


def finish(folder: Path, source: Source, report: Report, done: Done, config: ExportConfig, *, name: str) -> None:
    """Check the report against --max_kl, and write it into ``folder`` with the card and the record of what went in and out.

    ModelError if more was lost than allowed, or if the written model predicts no numbers at all.
    """
    if report.kl is not None and report.kl != report.kl:
        raise ModelError(
            f"what was written predicts NaN (read by {report.loader}); nothing was written",
            hint="its numbers may be too small for the model: a format with a larger range, such as bf16, or more bits",
        )
    report.enforce(config.max_kl)
    write_json(folder / REPORT_FILE, report.as_dict())
    copy_licences(source.model.path, folder)
    write_card(folder, source, report, done.artifact, config, name=name)
    result = {name: getattr(report, name) for name in ("format", "loader", "tokens", "kl", "perplexity_before", "perplexity_after")}
    _record(folder, source, config, {"result": result})


def finish_merge(merged: "Merged", config: ExportConfig) -> None:
    """The card and the record of a merged model."""
    source = Source(ModelFolder(merged.base_path, merged.base), merged.reference, merged.revision, merged.sha256, merged.adapter)
    copy_licences(merged.base_path, merged.path)
    merge_card(merged.path, source, difference=merged.difference, stored=merged.stored, config=config)
    _record(merged.path, source, config, {"result": {"difference": merged.difference, "stored": merged.stored}})


def _record(folder: Path, source: Source, config: ExportConfig, facts: dict[str, Any]) -> None:
    chosen = {
        field.name: getattr(config, field.name)
        for field in options_of(type(config))
        if field.metadata["saved"] and field.name not in _PLACES and getattr(config, field.name) != default_of(field)
    }
    record = {
        "config": audit.digest(to_dict(config)),
        "options": chosen,
        "model": shown(source.reference),
        "revision": source.revision,
        "adapter": source.adapter.name if source.adapter else None,
        "sha256_before": source.digests(),
        "versions": versions(),
        **facts,
        "sha256": {path.relative_to(folder).as_posix(): sha256_file(path) for path in visible_files(folder)},
    }
    audit.append(folder / AUDIT_FILE, "export", record)


def summary(target: Path, report: Report) -> str:
    """What a person reads in the end."""
    text = (
        f"wrote {target}: {report.bytes_after / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight "
        f"(before: {report.bytes_before / 1e6:.1f} MB)"
    )
    if report.kl is not None and report.perplexity_before is not None and report.perplexity_after is not None:
        text += (
            f"; on {report.tokens} held-out tokens perplexity {report.perplexity_before:.2f} -> {report.perplexity_after:.2f}, "
            f"divergence {report.kl:.3g} nats a token (read by {report.loader})"
        )
    return "; ".join([text, *report.notes])
