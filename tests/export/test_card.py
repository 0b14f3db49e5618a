"""The model card: what the hubs read in its head, what a person reads below it."""

import json
import shutil

import pytest
import yaml

from swift.api import export_model
from swift.config.export import ExportConfig
from swift.config.options import build
from swift.export.card import front_matter, shown, write_card
from swift.export.source import Source
from swift.model.artifact import Artifact, ModelFolder, Report

REPORT = Report(
    format="awq",
    loader="transformers 5.24.0",
    bits_per_weight=4.25,
    bytes_before=269_060_552,
    bytes_after=71_500_000,
    tokens=8192,
    kl=0.01234,
    perplexity_before=11.766,
    perplexity_after=11.91,
    same_token=0.9514,
    worst_layers=(("model.layers.3.mlp.down_proj", 0.0213), ("model.layers.0.self_attn.q_proj", 0.0101)),
    notes=("two layers stay as they are",),
)


def source(model, reference, adapter=None):
    return Source(ModelFolder(model, reference), reference, "main", {}, adapter)


def config(**options):
    return build(ExportConfig, ("argument", {"model": "m", "quant_method": "awq"} | options))


def head(text):
    return yaml.safe_load(text.split("---")[1])


def card(model, tmp_path, options=None, reference="hf::Qwen/Qwen-7B", adapter=None, facts=None):
    artifact = Artifact(tmp_path, "awq", ("model.safetensors",), facts or {})
    write_card(tmp_path, source(model, reference, adapter), REPORT, artifact, config(**(options or {})), name="Qwen-7B-awq-int4")
    return (tmp_path / "README.md").read_text()


def test_the_head_says_what_the_hubs_ask_for(tiny_model, tmp_path):
    assert head(card(tiny_model, tmp_path)) == {
        "base_model": "Qwen/Qwen-7B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["swift", "quantized", "awq", "4-bit"],
    }


def test_the_real_checker_of_the_client_reads_the_head(tiny_model, tmp_path):
    from huggingface_hub import ModelCard

    card(tiny_model, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name) == ("Qwen/Qwen-7B", "transformers")


def test_the_report_is_a_table(tiny_model, tmp_path):
    lines = card(tiny_model, tmp_path).splitlines()
    for line in (
        "| size of the weights | 269 MB | 71.5 MB |",
        "| perplexity | 11.77 | 11.91 |",
        "| divergence from the original (nats a token) | 0 | 0.0123 |",
        "| likeliest token the same | 100% | 95.1% |",
        "| `model.layers.3.mlp.down_proj` | 2.13% |",
        "- two layers stay as they are",
    ):
        assert line in lines


def test_a_table_has_as_many_cells_in_each_row(tiny_model, tmp_path):
    rows = [line for line in card(tiny_model, tmp_path).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3, 4}


def test_the_card_says_how_it_was_calibrated_and_by_whom_it_is_read(tiny_model, tmp_path):
    text = card(tiny_model, tmp_path, {"dataset": ["AI-ModelScope/alpaca#500", "/home/me/secret/rows.jsonl#5"], "hub_model_id": None})
    assert "`AI-ModelScope/alpaca#500`, `rows.jsonl#5`" in text
    assert "secret" not in text
    assert 'AutoModelForCausalLM.from_pretrained("Qwen-7B-awq-int4")' in text
    assert "vllm serve Qwen-7B-awq-int4" in text


@pytest.mark.parametrize(("method", "is_calibrated"), [("gptq", True), ("int8", True), ("fp8", False), ("bnb", False)])
def test_a_card_speaks_of_calibration_where_there_was_one(tiny_model, tmp_path, method, is_calibrated):
    text = card(tiny_model, tmp_path, {"quant_method": method})
    assert ("## Calibration" in text, "Measured with" in text) == (is_calibrated, not is_calibrated)


def test_the_id_on_the_hub_is_what_readers_load(tiny_model, tmp_path):
    text = card(tiny_model, tmp_path, {"push_to_hub": True, "hub_model_id": "hf::me/tiny@main", "hub_token": "hf_secret"})
    assert 'from_pretrained("me/tiny")' in text
    assert "hf_secret" not in text


def test_an_exporter_may_say_itself_how_it_is_used(tiny_model, tmp_path):
    assert "run Qwen-7B-awq-int4 so" in card(tiny_model, tmp_path, facts={"usage": "run {name} so\n"})


def test_a_gguf_file_is_served_by_its_name(tiny_model, tmp_path):
    artifact = Artifact(tmp_path, "gguf q8_0", ("tiny-q8_0.gguf",))
    options = config(quant_method=None, to="gguf", gguf_type="q8_0")
    write_card(tmp_path, source(tiny_model, "hf::Qwen/Qwen-7B"), REPORT, artifact, options, name="tiny-gguf")
    text = (tmp_path / "README.md").read_text()
    assert "llama-server -m tiny-q8_0.gguf" in text
    assert head(text)["library_name"] == "gguf"


def test_a_local_model_has_no_base_on_a_hub_and_no_path(tiny_model, tmp_path):
    text = card(tiny_model, tmp_path, reference=str(tiny_model))
    assert "base_model" not in head(text)
    assert str(tiny_model.parent) not in text


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: Apache-2.0", {"license": "apache-2.0"}),
        ("license: '(own) terms'", {"license": "other", "license_name": "(own) terms"}),
        ("tags: [a]", {}),
    ],
)
def test_the_licence_is_that_of_the_base(tiny_model, tmp_path, stated, expected):
    model = shutil.copytree(tiny_model, tmp_path / "m")
    (model / "README.md").write_text(f"---\n{stated}\n---\n# Base\n")
    found = head(front_matter(source(model, str(model)), config(), library="transformers", tags=[]))
    assert {name: value for name, value in found.items() if name.startswith("license")} == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf::Qwen/Qwen-7B", "hf::Qwen/Qwen-7B"),
        ("AI-ModelScope/alpaca#500", "AI-ModelScope/alpaca#500"),
        ("/home/me/rows.jsonl#500", "rows.jsonl#500"),
        ("../rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
    ],
)
def test_a_path_of_this_machine_is_cut(name, expected):
    assert shown(name) == expected


def test_the_card_of_a_real_export_holds_its_report(half, tiny_model, tmp_path):
    folder = export_model(model=str(tiny_model), to="half", output_dir=str(tmp_path / "out"), quant_eval_samples=2, max_length=32)
    text = (folder / "README.md").read_text()
    report = json.loads((folder / "swift_report.json").read_text())
    assert f"| {report['bits_per_weight']:.2f} |" in text
    assert f"{report['perplexity_after']:.4g}" in text
    assert str(tmp_path) not in text
