"""An export from the command to the folder: what is checked, in which order, and what is left when it goes wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from swift import audit, cli
from swift.api import export_model
from swift.config.export import ExportConfig
from swift.config.options import build
from swift.errors import CheckpointError, ConfigError, DataError, MachineError, ModelError, SwiftError
from swift.export.folder import claimed, partial_folder, whole_folder
from swift.export.run import output_folder, run_export
from tests.tiny import make_model


def write(model, tmp_path, /, **options):
    defaults = {"model": str(model), "output_dir": str(tmp_path / "out"), "to": "half", "quant_eval_samples": 3, "max_length": 64}
    return export_model(**(defaults | options))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def changed(tiny_model, tmp_path):
    """A copy of the model whose weights may be changed: ``changed(tensor=function)``."""

    def make(function, name="model.layers.1.mlp.up_proj.weight", **config):
        from safetensors.torch import load_file, save_file

        path = tmp_path / "changed"
        shutil.copytree(tiny_model, path)
        tensors = load_file(path / "model.safetensors")
        tensors[name] = function(tensors[name].clone())
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(settings | config))
        return path

    return make


def test_what_is_written_predicts_as_the_original_within_the_rounding_of_float16(half, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write(tiny_model, tmp_path)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        wanted, found = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(ids).logits for each in (tiny_model, folder))
    assert 0 < float((wanted - found).abs().max()) < 1e-3


def test_the_report_the_card_and_the_record_lie_in_the_folder(half, tiny_model, tmp_path):
    folder = write(tiny_model, tmp_path)
    assert {"README.md", "audit.jsonl", "swift_report.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(names(folder))
    report = json.loads((folder / "swift_report.json").read_text())
    assert report["bytes_after"] == (folder / "model.safetensors").stat().st_size
    assert abs(report["kl"]) < 1e-4
    assert report["tokens"] == 3 * 64
    assert report["loader"].startswith("transformers ")
    assert names(tmp_path) == ["out"]


def test_the_record_holds_digests_of_what_went_in_and_out(half, tiny_model, tmp_path, capsys):
    from swift.files import sha256_file

    folder = write(tiny_model, tmp_path)
    assert audit.verify(folder / "audit.jsonl") == 1
    line = json.loads((folder / "audit.jsonl").read_text())
    assert line["sha256_before"] == {"model.safetensors": sha256_file(tiny_model / "model.safetensors")}
    assert line["sha256"]["model.safetensors"] == sha256_file(folder / "model.safetensors")
    assert line["options"] == {"to": "half", "quant_eval_samples": 3, "max_length": 64}
    assert "torch" in line["versions"]
    cli.run(["audit", str(folder)])
    assert "unbroken" in capsys.readouterr().out
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is not the file that was recorded"):
        cli.run(["audit", str(folder)])


def test_tied_weights_are_written_once_and_read_back(half, tiny_model, tmp_path):
    from safetensors import safe_open

    folder = write(tiny_model, tmp_path)
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert "lm_head.weight" not in opened.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"quant_method": "awq"}, "model-awq-int4"),
        ({"quant_method": "gptq", "quant_bits": 8}, "model-gptq-int8"),
        ({"quant_method": "gptq_v2"}, "model-gptq_v2-int4"),
        ({"quant_method": "bnb", "quant_bits": 4}, "model-bnb-int4"),
        ({"quant_method": "fp8"}, "model-fp8"),
        ({"to_ollama": True}, "model-ollama"),
        ({"to": "gguf"}, "model-gguf"),
    ],
)
def test_a_folder_is_named_as_ms_swift_names_it(tiny_model, options, name):
    config = build(ExportConfig, ("argument", {"model": str(tiny_model)} | options))
    assert output_folder(config) == tiny_model.with_name(name)


def test_a_model_of_a_hub_is_written_into_the_working_directory():
    config = build(ExportConfig, ("argument", {"model": "hf::Qwen/Qwen-7B@v2", "quant_method": "awq"}))
    assert str(output_folder(config)) == "Qwen-7B-awq-int4"


def test_an_adapter_of_the_working_directory_has_a_name(run, monkeypatch):
    checkpoint = run().checkpoint
    monkeypatch.chdir(checkpoint)
    config = build(ExportConfig, ("argument", {"adapters": ["."], "model": "m", "quant_method": "awq"}))
    assert output_folder(config) == checkpoint.with_name(f"{checkpoint.name}-awq-int4")


# Bad input: one line, and nothing is left


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_before_anything_is_written(half, changed, tmp_path, value):
    def spoil(tensor):
        tensor[3, 5] = value
        return tensor

    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors holds NaN or infinity"):
        write(changed(spoil), tmp_path)
    assert names(tmp_path) == ["changed"]


def test_weights_that_the_format_cannot_hold_are_found_when_read_back(half, changed, tmp_path):
    with pytest.raises(ModelError, match="predicts NaN"):
        write(changed(lambda tensor: tensor * 1e8), tmp_path)
    assert names(tmp_path) == ["changed"]


def test_a_quantized_checkpoint_is_refused_first(half, changed, tmp_path):
    path = changed(lambda tensor: tensor, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantized already \(gptq\)"):
        write(path, tmp_path)
    assert names(tmp_path) == ["changed"]


def test_an_unknown_architecture_is_named_first(half, changed, tmp_path):
    path = changed(lambda tensor: tensor, model_type="brandnew", architectures=["BrandNewForCausalLM"])
    with pytest.raises(ModelError, match="BrandNewForCausalLM") as caught:
        write(path, tmp_path)
    assert "\n" not in caught.value.message
    assert names(tmp_path) == ["changed"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": "missing.jsonl"}, SwiftError, r"missing\.jsonl"),
        ({"dataset": "TEXTS"}, DataError, "too little text"),
        ({"dataset": "WRONG"}, DataError, "rejected"),
        ({"dataset": "TEXTS", "columns": "{broken"}, ConfigError, "JSON"),
        ({"to": "hlaf"}, ConfigError, "unknown export format 'hlaf'"),
        ({"model": "/nowhere/at/all"}, SwiftError, "/nowhere/at/all"),
        ({"adapters": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all"),
        ({"output_dir": "/proc/out"}, MachineError, "/proc/out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(half, tiny_model, tmp_path, options, error, message):
    texts, wrong = tmp_path / "texts.jsonl", tmp_path / "wrong.jsonl"
    texts.write_text('{"text": "too short"}\n')
    wrong.write_text('{"colour": "green"}\n')
    options = {name: str(value).replace("TEXTS", str(texts)).replace("WRONG", str(wrong)) for name, value in options.items()}
    with pytest.raises(error, match=message) as caught:
        write(tiny_model, tmp_path, **options)
    assert "\n" not in caught.value.message
    assert names(tmp_path) == ["texts.jsonl", "wrong.jsonl"]


def test_a_full_disk_is_an_error_of_the_machine_and_leaves_nothing(half, tiny_model, tmp_path, monkeypatch):
    def onto_a_full_disk(model, config, folder):
        (folder / "model.safetensors").symlink_to("/dev/full")
        (folder / "model.safetensors").write_bytes(bytes(2**20))

    monkeypatch.setattr(half, "run", onto_a_full_disk)
    with pytest.raises(MachineError, match=os.strerror(errno.ENOSPC)):
        write(tiny_model, tmp_path / "a" / "b")
    assert names(tmp_path) == []


def test_an_interruption_leaves_nothing(half, tiny_model, tmp_path, monkeypatch):
    def interrupted(model, config, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(half, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tiny_model, tmp_path)
    assert names(tmp_path) == []


def test_a_loss_above_max_kl_leaves_nothing(half, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(half, "noise", 0.05)
    with pytest.raises(ModelError, match=r"more than --max_kl 0\.0001; nothing was written"):
        write(tiny_model, tmp_path, max_kl=1e-4)
    assert names(tmp_path) == []
    assert write(tiny_model, tmp_path, max_kl=10.0).is_dir()


def test_max_kl_fails_where_nothing_reads_the_format(half, tiny_model, tmp_path, monkeypatch):
    from swift.quantize.measure import Measured

    monkeypatch.setattr(half, "verify", lambda *_: Measured(None, notes=("no reader is installed",)))
    with pytest.raises(ModelError, match="--max_kl 1 cannot be checked: no reader is installed"):
        write(tiny_model, tmp_path, max_kl=1.0)
    assert names(tmp_path) == []
    folder = write(tiny_model, tmp_path)
    assert "What was lost was not measured" in (folder / "README.md").read_text()


def test_without_documents_nothing_is_measured(half, tiny_model, tmp_path):
    folder = write(tiny_model, tmp_path, quant_eval_samples=0, max_length=512)
    assert json.loads((folder / "swift_report.json").read_text())["kl"] is None


# Replacing


def test_a_folder_that_exists_is_kept(half, tiny_model, tmp_path):
    folder = write(tiny_model, tmp_path)
    before = (folder / "audit.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="exists") as caught:
        write(tiny_model, tmp_path)
    assert "--exist_ok true" in caught.value.hint
    assert (folder / "audit.jsonl").read_bytes() == before


def test_a_folder_is_replaced_whole(half, tiny_model, tmp_path):
    folder = write(tiny_model, tmp_path)
    (folder / "left over").touch()
    write(tiny_model, tmp_path, exist_ok=True)
    assert "left over" not in names(folder)
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(half, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    assert "config.json" in names(write(tiny_model, tmp_path))


def test_the_old_folder_stays_until_the_new_one_is_whole(half, tiny_model, tmp_path, monkeypatch):
    folder = write(tiny_model, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(half, "noise", 0.5)
    with pytest.raises(ModelError):
        write(tiny_model, tmp_path, exist_ok=True, max_kl=1e-4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == ["out"]


def test_what_is_read_is_never_replaced(half, tiny_model, tmp_path, rows):
    copied = shutil.copytree(tiny_model, tmp_path / "out" / "model")
    (tmp_path / "config.json").touch()
    (tmp_path / "out" / "config.json").touch()
    for options in ({"model": str(copied)}, {"model": str(copied), "output_dir": str(copied)}, {"output_dir": str(tmp_path)}):
        with pytest.raises(ConfigError, match="would replace"):
            write(tiny_model, tmp_path, exist_ok=True, **({"dataset": str(rows)} | options))
    assert (copied / "model.safetensors").is_file()


def test_a_folder_of_other_things_is_never_replaced(half, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").touch()
    with pytest.raises(ConfigError, match="holds other things than a model"):
        write(tiny_model, tmp_path, exist_ok=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        write(tiny_model, tmp_path, exist_ok=True, output_dir=str(tmp_path / "file"))
    assert names(tmp_path / "out") == ["diary.txt"]


@pytest.mark.parametrize("place", [".", "/", "../here"])
def test_the_working_directory_is_no_place_for_a_new_folder(half, tiny_model, tmp_path, monkeypatch, place):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="cannot be replaced"):
        write(tiny_model, tmp_path, output_dir=place)
    assert names(tmp_path) == ["here"]


def test_a_replacement_under_way_is_not_taken_for_a_kill(half, tiny_model, tmp_path):
    """Another process holds the folder, and is between its two renames."""
    with claimed(tmp_path / "out"):
        (tmp_path / ".out.old").mkdir()
        with pytest.raises(MachineError, match="another process"):
            write(tiny_model, tmp_path)
        assert not (tmp_path / "out").exists()


def test_a_kill_between_the_two_renames_loses_nothing(half, tiny_model, tmp_path):
    folder = write(tiny_model, tmp_path)
    before = (folder / "audit.jsonl").read_bytes()
    folder.rename(tmp_path / ".out.old")
    shutil.copytree(tmp_path / ".out.old", partial_folder(folder))
    with pytest.raises(ConfigError, match="exists"):
        write(tiny_model, tmp_path)
    assert (folder / "audit.jsonl").read_bytes() == before
    write(tiny_model, tmp_path, exist_ok=True)
    assert names(tmp_path) == ["out"]


def test_a_killed_export_is_as_if_it_had_not_been(tiny_model, tmp_path, half):
    script = (
        "import sys, time\n"
        "from swift.api import export_model\n"
        "from swift.export import EXPORTERS\n"
        "class Slow:\n"
        "    def check(self, model, config): pass\n"
        "    def run(self, model, config, folder):\n"
        "        (folder / 'model.safetensors').write_bytes(b'half'); print('writing', flush=True); time.sleep(60)\n"
        "EXPORTERS.register('slow')(Slow())\n"
        "export_model(model=sys.argv[1], output_dir=sys.argv[2], to='slow', quant_eval_samples=0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tiny_model), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    with pytest.raises(MachineError, match="is being written by another process"):
        write(tiny_model, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    write(tiny_model, tmp_path)
    assert names(tmp_path) == ["out"]


def test_an_interrupted_folder_is_given_again_if_it_resumes(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", resumes=True) as folder:
        (folder / "done").touch()
        raise KeyboardInterrupt
    assert "goes on where it was" in capsys.readouterr().err
    with whole_folder(tmp_path / "out", resumes=True) as folder:
        assert names(folder) == ["done"]
    assert names(tmp_path) == ["out"]


def test_a_mistake_does_not_cost_the_work_of_an_interrupted_run(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(DataError), whole_folder(tmp_path / "out", resumes=True):
        raise DataError("a mistyped data set")
    assert names(tmp_path) == [".out.partial"]
    with pytest.raises(ModelError), whole_folder(tmp_path / "out", resumes=True):
        raise ModelError("too much was lost")
    assert names(tmp_path) == []


def test_two_cannot_write_one_folder(tmp_path):
    with claimed(tmp_path / "out"):
        with pytest.raises(MachineError, match="another process"), claimed(tmp_path / "out"):
            pass
        with claimed(tmp_path / "other"):
            pass
    assert names(tmp_path) == []


# Adapters


def test_an_adapter_is_merged_in_float32_and_exported(half, run, tmp_path):
    from swift.quantize.measure import Reference

    seen = {}
    original = half.run

    def watched(model, config, folder):
        from safetensors.torch import load_file

        seen["dtypes"] = {tensor.dtype for file in model.weight_files for tensor in load_file(file).values()}
        seen["logprobs"] = Reference(model, []).log_probabilities(list(range(4, 40)))
        return original(model, config, folder)

    half.run = watched
    checkpoint = run(learning_rate=5e-2).checkpoint
    folder = export_model(adapters=str(checkpoint), to="half", quant_eval_samples=2, max_length=64)
    assert folder == checkpoint.with_name(f"{checkpoint.name}-half")
    assert seen["dtypes"] == {torch.float32}
    from swift.model.load import load_model
    from swift.tuner.adapter import with_adapter

    base = load_model(_base(checkpoint), torch_dtype="float32").model
    with torch.no_grad():
        wanted = with_adapter(base, checkpoint)(torch.arange(4, 40)[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(seen["logprobs"], wanted, atol=1e-4, rtol=0)
    assert not [path for path in checkpoint.parent.iterdir() if path.name.startswith(f".{folder.name}")]
    line = json.loads((folder / "audit.jsonl").read_text())
    assert line["adapter"] == checkpoint.name
    assert "adapter/adapter_model.safetensors" in line["sha256_before"]
    assert "with the adapter" in (folder / "README.md").read_text()


def _base(checkpoint):
    from pathlib import Path

    return Path(json.loads((checkpoint / "args.json").read_text())["model"])


def test_an_adapter_is_merged_and_quantized_and_the_rest_has_the_precision_of_its_model(rows, tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from swift.api import quantize_model, sft

    base = make_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    options = {"max_steps": 1, "output_dir": str(tmp_path / "run"), "add_version": False, "report_to": "none", "report_samples": 0}
    checkpoint = sft(model=str(base), dataset=str(rows), **options).checkpoint
    small = {"quant_n_samples": 4, "quant_eval_samples": 2, "max_length": 64, "group_size": 32}
    folder = quantize_model(adapters=str(checkpoint), quant_method="gptq", **small)
    assert folder == checkpoint.with_name(f"{checkpoint.name}-gptq-int4")
    assert not [path for path in checkpoint.parent.iterdir() if path.name.startswith(f".{folder.name}")]
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert opened.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    report = json.loads((folder / "swift_report.json").read_text())
    assert report["bytes_before"] == (base / "model.safetensors").stat().st_size


def test_a_merge_never_replaces_what_it_reads(run):
    checkpoint = run().checkpoint
    for place in (checkpoint, checkpoint.parent):
        with pytest.raises(ConfigError, match="would replace"):
            export_model(adapters=str(checkpoint), output_dir=str(place), exist_ok=True)
    assert (checkpoint / "adapter_model.safetensors").is_file()


def test_the_licence_goes_where_the_model_goes(half, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "m")
    (model / "LICENSE.txt").write_text("terms")
    assert (write(model, tmp_path) / "LICENSE.txt").read_text() == "terms"


def test_a_merged_model_vanishes_when_the_export_fails(half, run, tmp_path, monkeypatch):
    checkpoint = run().checkpoint
    before = names(checkpoint.parent)
    monkeypatch.setattr(half, "noise", 5.0)
    with pytest.raises(ModelError, match="--max_kl"):
        export_model(adapters=str(checkpoint), to="half", max_kl=1e-6, quant_eval_samples=2, max_length=64)
    assert names(checkpoint.parent) == before


def test_what_cannot_be_exported_is_said_before_the_merge(half, run, monkeypatch, capsys):
    checkpoint = run().checkpoint

    def refuse(model, config):
        raise ConfigError(f"{model.path.name} is of a kind that cannot be written")

    monkeypatch.setattr(half, "check", refuse)
    monkeypatch.setattr("swift.tuner.merge.load_model", None)  # weights are not read
    with pytest.raises(ConfigError, match="model is of a kind that cannot be written"):
        export_model(adapters=str(checkpoint), to="half")


def test_a_run_with_quantized_weights_is_merged_into_whole_ones(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    checkpoint = run(quant_method="bnb", quant_bits=4).checkpoint
    folder = export_model(adapters=str(checkpoint))
    assert folder == checkpoint.with_name(f"{checkpoint.name}-merged")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_the_chat_template_of_the_run_is_merged_with_it(run, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    checkpoint = run(chat_template=str(template)).checkpoint
    folder = export_model(adapters=str(checkpoint))
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).chat_template == template.read_text()


def test_the_python_call_of_older_programs_runs(tiny_model, tmp_path, capsys):
    from swift import export_awq_model

    more = {"group_size": 32, "quant_n_samples": 4, "quant_eval_samples": 2}
    folder = export_awq_model(model_type="qwen", model_path=tiny_model, output_dir=tmp_path / "a", batch_size=4, seqlen=128, **more)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == 4
    options = json.loads((folder / "audit.jsonl").read_text())["options"]
    assert (options["quant_batch_size"], options["max_length"], options["quant_method"]) == (4, 128, "awq")
    assert capsys.readouterr().err.count("note:") == 1


def test_an_interrupted_quantization_goes_on_to_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    from swift.api import quantize_model
    from swift.quantize import run as quantizing

    small = {"model": tiny_model, "quant_method": "gptq", "group_size": 32, "quant_n_samples": 4, "quant_eval_samples": 2, "max_length": 64}
    whole = quantize_model(output_dir=tmp_path / "whole", **small)
    original = quantizing.one_block

    def interrupted(job, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return original(job, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantizing, "one_block", interrupted)
        quantize_model(output_dir=tmp_path / "out", **small)
    assert names(tmp_path) == [".out.partial", "whole"]
    with pytest.raises(DataError):
        quantize_model(output_dir=tmp_path / "out", **small, dataset="missing.jsonl")
    assert names(tmp_path) == [".out.partial", "whole"]
    folder = quantize_model(output_dir=tmp_path / "out", **small)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert names(tmp_path) == ["out", "whole"]


def test_scanning_reads_large_tensors_by_parts(tmp_path, monkeypatch):
    from swift.model import finite
    from swift.model.artifact import ModelFolder

    path = make_model(tmp_path / "m")
    monkeypatch.setattr(finite, "_PART", 100)
    finite.refuse_not_finite(ModelFolder(path, "m"))
    parts = [part for name, part in finite._parts(path / "model.safetensors") if name == "model.embed_tokens.weight"]
    assert torch.cat(parts).shape == (320, 32)
    assert max(part.numel() for part in parts) <= 100


def test_the_export_of_a_config_returns_its_folder(half, tiny_model, tmp_path):
    begin = time.monotonic()
    config = build(ExportConfig, ("argument", {"model": str(tiny_model), "to": "half", "output_dir": str(tmp_path / "o")}))
    assert run_export(config) == tmp_path / "o"
    seconds = json.loads((tmp_path / "o" / "swift_report.json").read_text())["seconds"]
    assert 0 < seconds <= time.monotonic() - begin
