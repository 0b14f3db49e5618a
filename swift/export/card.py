"""The model card: where an exported model comes from, what it costs, what it lost, and how to use it."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swift import __version__
from swift.config.export import ExportConfig
from swift.export.source import Source
from swift.export.usage import usage
from swift.files import write_text
from swift.hub.facts import count_text, licence_of, size_text
from swift.model.artifact import Artifact, Report

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"(?:(?:hf|ms)::)?([\w][\w.-]*/[\w][\w.-]*)", re.ASCII)


def write_card(folder: Path, source: Source, report: Report, artifact: Artifact, config: ExportConfig, *, name: str) -> None:
    """Write README.md into ``folder``, which will be called ``name``. It holds no path of this machine."""
    parts = [
        front_matter(source, config, library=_library(config), tags=_tags(config)),
        f"# {name}\n",
        f"{_origin(source)} {_deed(config, report, artifact)} by swift {__version__}.\n",
        *_report(report, source),
        *_worst(report),
        *_calibration(config, report),
        "## How to use it\n",
        usage(config, artifact, name=_published(config) or name),
    ]
    write_text(folder / CARD_FILE, "\n".join(parts))


def merge_card(folder: Path, source: Source, *, difference: float, stored: float, config: ExportConfig) -> None:
    """README.md of a merged model: nothing was lost but what rounding takes."""
    name = _published(config) or folder.name
    parts = [
        front_matter(source, config, library="transformers", tags=["swift"]),
        f"# {folder.name}\n",
        f"{_origin(source)} In the precision of that model, merged by swift {__version__}.\n",
        *_table(
            ("largest difference of a log-probability", ""),
            [("between the adapter and the merged model, in float32", f"{difference:.2g}"), ("as stored", f"{stored:.2g}")],
        ),
        "## How to use it\n",
        usage(config, None, name=name),
    ]
    write_text(folder / CARD_FILE, "\n".join(parts))


def front_matter(source: Source, config: ExportConfig, *, library: str, tags: Sequence[str]) -> str:
    """The YAML head of a card as the hubs read it; what is not known is left out."""
    import yaml

    facts: dict[str, Any] = {}
    if match := _HUB_ID.fullmatch(source.reference.partition("@")[0]):
        facts["base_model"] = match[1]
        facts["base_model_relation"] = "quantized" if config.quant_method or not source.adapter else "finetune"
        if config.to is not None and config.to not in ("gguf", "ollama") and not source.adapter:
            del facts["base_model_relation"]
    if licence := licence_of(source.model.path):
        spelled = licence.lower().replace(" ", "-")
        facts |= {"license": spelled} if re.fullmatch(r"[a-z][a-z0-9.-]*", spelled) else {"license": "other", "license_name": licence}
    facts |= {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n"


def shown(name: str) -> str:
    """``name`` as others may read it: an id of a hub as it is, of a path of this machine the last part."""
    place, hash_sign, rest = name.partition("#")
    if place.startswith(("/", ".", "~")) or os.path.exists(place):
        place = Path(place).name
    return f"{place}{hash_sign}{rest}"


def _published(config: ExportConfig) -> str | None:
    return None if config.hub_model_id is None else config.hub_model_id.rpartition("::")[2].partition("@")[0]


def _library(config: ExportConfig) -> str:
    if config.quant_method is not None:
        return "transformers"
    return {"ollama": "gguf", "tensorrt_llm": "tensorrt-llm"}.get(str(config.to), str(config.to))


def _tags(config: ExportConfig) -> list[str]:
    if config.quant_method is None:
        return ["swift", str(config.to)]
    return ["swift", "quantized", str(config.quant_method), f"{config.quant_bits}-bit"]


def _origin(source: Source) -> str:
    model = shown(source.reference)
    if source.adapter is not None:
        return f"{model} with the adapter {source.adapter.name} in its weights."
    return f"Made of {model}."


def _deed(config: ExportConfig, report: Report, artifact: Artifact) -> str:
    if config.quant_method is None:
        return f"Written as {report.format}"
    size = artifact.facts.get("group_size", config.group_size)  # smaller than asked for where widths are no multiple of it
    group = f" in groups of {size}" if config.quant_method in ("gptq", "awq") and size > 0 else ""
    return f"Quantized to {config.quant_bits} bits{group} ({config.quant_method}, checkpoint format {config.quant_format})"


def _report(report: Report, source: Source) -> list[str]:
    rows: list[tuple[str, str, str]] = [
        ("size of the weights", size_text(report.bytes_before), size_text(report.bytes_after)),
        ("bits a weight", f"{report.bytes_before * 8 / source.model.num_weights:.2f}", f"{report.bits_per_weight:.2f}"),
    ]
    if report.perplexity_before is not None and report.perplexity_after is not None:
        rows.append(("perplexity", f"{report.perplexity_before:.4g}", f"{report.perplexity_after:.4g}"))
    if report.kl is not None:
        rows.append(("divergence from the original (nats a token)", "0", f"{report.kl:.3g}"))
    if report.same_token is not None:
        rows.append(("likeliest token the same", "100%", f"{report.same_token:.1%}"))
    lines = ["## What it costs and what was lost\n", *_table(("", "before", "after"), rows)]
    if report.kl is not None:
        lines.append(
            f"Measured on {count_text(report.tokens)} tokens of text that was not calibrated with. The files were read back by "
            f"{report.loader}; the divergence is the mean Kullback-Leibler divergence of its predictions from the original's.\n"
        )
    else:
        lines.append("What was lost was not measured.\n")
    return lines + [f"- {note}" for note in report.notes] + ([""] if report.notes else [])


def _worst(report: Report) -> list[str]:
    if not report.worst_layers:
        return []
    rows = [(f"`{layer}`", f"{error:.2%}") for layer, error in report.worst_layers[:5]]
    return ["## Layers that lost most\n", *_table(("layer", "squared error of its output"), rows)]


def _calibration(config: ExportConfig, report: Report) -> list[str]:
    text = ", ".join(f"`{shown(name)}`" for name in config.dataset) or "the built-in text (Python's reference, weather notices)"
    if not config.calibrates:
        return [f"Measured with {text}.\n"] if report.kl is not None else []
    return [
        "## Calibration\n",
        f"At most {config.quant_n_samples} documents of {config.max_length} tokens of {text}, chosen by seed {config.data_seed}.\n",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
