"""The end of an export: the report, the model card, and the folder that appears."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from swift import console
from swift.config.export import ExportConfig
from swift.export.card import write_card
from swift.files import explain_os_errors, write_json
from swift.model.artifact import Artifact, ModelFolder, Report
from swift.quantize.measure import Measured
from swift.train.memory import peak_memory_gib

REPORT_FILE = "swift_report.json"


def partial_folder(target: Path) -> Path:
    """Where ``target`` is written until it is whole."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def whole_folder(target: Path, *, resumes: bool = False) -> Iterator[Path]:
    """A folder that becomes ``target``, in place of one that is there, when the block ends well, and vanishes otherwise.

    With ``resumes`` what a killed or interrupted run left is given again, and an interruption leaves it.
    """
    temporary = partial_folder(target)
    if not resumes:
        shutil.rmtree(temporary, ignore_errors=True)
    is_kept = False
    try:
        with explain_os_errors(target):
            temporary.mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
            _sync(target.parent)
    except KeyboardInterrupt:
        is_kept = resumes
        raise
    finally:
        if is_kept:
            console.notice(f"the same command goes on where it was; what is done lies in {temporary}")
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def report_of(
    model: ModelFolder, artifact: Artifact, measured: Measured, seconds: float, worst: tuple[tuple[str, float], ...] = ()
) -> Report:
    """``seconds`` are those of the whole export."""
    facts = {name: value for name, value in asdict(measured).items() if name != "largest_difference"}
    return Report(
        format=artifact.format,
        bits_per_weight=artifact.weight_bytes * 8 / model.num_weights,
        bytes_before=model.weight_bytes,
        bytes_after=artifact.weight_bytes,
        worst_layers=worst,
        seconds=seconds,
        peak_memory_bytes=int((peak_memory_gib(torch.device("cpu")) or 0) * 2**30),
        **facts,
    )


def finish(folder: Path, model: ModelFolder, report: Report, config: ExportConfig) -> None:
    """Check the report against --max_kl, and write it into ``folder`` with the model card."""
    report.enforce(config.max_kl)
    write_json(folder / REPORT_FILE, report.as_dict())
    write_card(folder, model, report, config)


def summary(target: Path, report: Report) -> str:
    """What a person reads in the end."""
    text = (
        f"wrote {target}: {report.bytes_after / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight "
        f"(before: {report.bytes_before / 1e6:.1f} MB)"
    )
    if report.kl is not None and report.perplexity_before is not None and report.perplexity_after is not None:
        text += (
            f"; on {report.tokens} held-out tokens perplexity {report.perplexity_before:.2f} -> {report.perplexity_after:.2f}, "
            f"divergence {report.kl:.4f} nats a token (read by {report.loader})"
        )
    return "; ".join([text, *report.notes])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
