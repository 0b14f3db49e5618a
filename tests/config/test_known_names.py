"""Each option name of ms-swift and of TrainingArguments is implemented, renamed or refused with a reason."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swift.config import compat, hf_fields
from swift.config.commands import all_options
from swift.errors import ConfigError, DependencyError

MS_SWIFT_NAMES = [
    name
    for line in Path(__file__).with_name("ms_swift_names.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for name in line.split()
]


def test_every_ms_swift_name_is_implemented_or_refused():
    assert len(MS_SWIFT_NAMES) > 450
    assert set(MS_SWIFT_NAMES) - all_options() - set(compat.refusals()) == set()


def test_every_field_of_training_arguments_is_implemented_renamed_or_refused():
    known = all_options() | set(compat.refusals()) | set(compat.RENAMED)
    assert set(hf_fields.training_arguments()) - known == set()


def test_no_name_is_both_implemented_and_refused():
    assert all_options() & set(compat.refusals()) == set()


def test_no_old_name_is_still_a_name_of_today():
    assert set(compat.RENAMED) & (all_options() | set(compat.refusals())) == set()


def test_every_old_name_leads_to_a_name_of_today():
    assert set(compat.RENAMED.values()) - all_options() - set(compat.refusals()) == set()


def test_every_value_that_moves_leads_to_an_implemented_option():
    assert {name for name, _ in compat.MOVED.values()} - all_options() == set()


def test_every_value_that_moves_leaves_a_name_that_is_refused():
    assert {name for name, _ in compat.MOVED} - set(compat.refusals()) == set()


def test_no_name_is_refused_twice_in_the_file():
    path = Path(compat.__file__).with_name("refused.json")
    pairs = re.findall(r'"([A-Za-z_0-9]+)": \[', path.read_text(encoding="utf-8"))
    names = [name for name in pairs if name != "groups"]
    assert sorted(names) == sorted(set(names)) == sorted(compat.refusals())


@pytest.mark.parametrize("reason", sorted({each.reason for each in compat.refusals().values()}))
def test_a_reason_is_a_sentence_that_follows_a_colon(reason):
    assert re.fullmatch(r"[A-Za-z][ -~]*[A-Za-z0-9)]", reason), "ASCII, and no full stop at the end"
    assert len(reason.split()) >= 4


def test_accepted_values_are_spelled_in_lower_case():
    spelled = {value for each in compat.refusals().values() for value in each.accepts}
    assert spelled == {value.lower() for value in spelled}


@pytest.mark.parametrize("command", ["app", "web-ui", "web_ui", "sample", "rollout"])
def test_an_ms_swift_command_that_is_not_built_says_so(command):
    assert "built" in (compat.refused_command(command) or "")


def test_an_unknown_command_has_no_reason():
    assert compat.refused_command("sft2") is None


def test_an_unknown_option_has_no_refusal():
    assert compat.refusal("warmup_ration") is None


def test_dashes_equal_underscores():
    assert compat.refusal("liger-kernel-config") == compat.refusal("liger_kernel_config") is not None
    assert compat.modern("train-type", "full")[:2] == ("tuner_type", "full")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("predict_with_generate", "false"),
        ("predict_with_generate", False),
        ("predict_with_generate", "False"),
        ("tp", "1"),
        ("label_smoothing_factor", "0.0"),
        ("callbacks", []),
        ("model_kwargs", "{}"),
        ("fsdp_num", 1),
        ("ddp_bucket_cap_mb", 25),
    ],
)
def test_a_value_that_asks_for_what_happens_anyway_is_inert(name, value):
    assert compat.refusal(name).is_inert(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("predict_with_generate", "true"),
        ("predict_with_generate", True),
        ("tp", "2"),
        ("fsdp_config", "a.json"),
        ("callbacks", ["a"]),
        ("dataloader_drop_last", True),
        ("tf32", "true"),
        ("hub_always_push", 1),
    ],
)
def test_a_value_that_asks_for_something_else_is_not_inert(name, value):
    assert not compat.refusal(name).is_inert(value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train_type", "lora", ("tuner_type", "lora", "--train_type is read as --tuner_type")),
        ("sft_type", "full", ("tuner_type", "full", "--sft_type is read as --tuner_type")),
        ("model_id_or_path", "a/b", ("model", "a/b", "--model_id_or_path is read as --model")),
        ("ckpt_dir", "out/v0", ("adapters", "out/v0", "--ckpt_dir is read as --adapters")),
        ("quantization_bit", "4", ("quant_bits", "4", "--quantization_bit is read as --quant_bits")),
        (
            "quantization_method",
            "bitsandbytes",
            ("quant_method", "bnb", "--quantization_method bitsandbytes is read as --quant_method bnb"),
        ),
        (
            "infer_backend",
            "pt",
            ("infer_backend", "transformers", "--infer_backend pt is read as --infer_backend transformers"),
        ),
        (
            "deepspeed",
            "default-zero2",
            ("deepspeed", "zero2", "--deepspeed default-zero2 is read as --deepspeed zero2"),
        ),
        (
            "activation_checkpointing",
            True,
            ("gradient_checkpointing", True, "--activation_checkpointing is read as --gradient_checkpointing"),
        ),
        ("dtype", "bf16", ("torch_dtype", "bfloat16", "--dtype bf16 is read as --torch_dtype bfloat16")),
        (
            "use_flash_attn",
            True,
            ("attn_impl", "flash_attention_2", "--use_flash_attn true is read as --attn_impl flash_attention_2"),
        ),
        (
            "lora_target_modules",
            ["ALL", "lm_head"],
            (
                "target_modules",
                ["all-linear", "lm_head"],
                "--lora_target_modules ALL lm_head is read as --target_modules all-linear lm_head",
            ),
        ),
    ],
)
def test_an_old_spelling_is_read_with_one_line(name, value, expected):
    assert compat.modern(name, value) == expected


def test_a_spelling_of_today_is_left_alone():
    assert compat.modern("lora_rank", "16") == ("lora_rank", "16", None)


def test_reading_a_name_twice_changes_nothing():
    name, value, _ = compat.modern("quantization_method", "bitsandbytes")
    assert compat.modern(name, value) == ("quant_method", "bnb", None)


def test_an_option_that_is_accepted_without_effect_says_so():
    name, value, line = compat.modern("model_type", "qwen2")
    assert (name, value) == ("model_type", "qwen2")
    assert line == "--model_type has no effect: what a model is comes from its config.json and its tokenizer"


def test_an_option_without_effect_that_nobody_set_says_nothing():
    assert compat.modern("model_type", None) == ("model_type", None, None)


@pytest.mark.parametrize("spelling", ["local_rank", "local-rank"])
def test_the_rank_of_a_launcher_is_accepted(monkeypatch, spelling):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert compat.modern(spelling, "1") == ("local_rank", "1", "--local_rank 1 is not needed: LOCAL_RANK=1 says it")
    assert compat.refusal(spelling).is_inert("1")


def test_local_rank_minus_one_means_no_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert compat.modern("local_rank", -1) == ("local_rank", -1, None)


def test_local_rank_zero_without_a_launcher_is_a_single_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert "LOCAL_RANK is not set" in compat.modern("local_rank", "0")[2]


@pytest.mark.parametrize(("given", "environment", "told"), [("1", None, "LOCAL_RANK is not set"), ("1", "0", "LOCAL_RANK is 0")])
def test_a_rank_that_contradicts_the_environment_is_an_error(monkeypatch, given, environment, told):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if environment is not None:
        monkeypatch.setenv("LOCAL_RANK", environment)
    with pytest.raises(ConfigError, match=told):
        compat.modern("local_rank", given)


def test_a_field_has_type_default_and_help_as_the_source_says():
    field = hf_fields.training_arguments()["max_grad_norm"]
    assert (field.type, field.default) == ("float", "1.0")
    assert field.help == "Maximum gradient norm for gradient clipping. Set to 0 to disable."


def test_percent_signs_are_not_doubled_in_help():
    assert "%%" not in " ".join(field.help for field in hf_fields.training_arguments().values())


def test_reading_the_fields_and_names_imports_no_heavy_package():
    code = (
        "import sys, json\n"
        "from swift.config import compat, hf_fields\n"
        "hf_fields.training_arguments(); compat.refusals()\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'msgspec', 'yaml') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_missing_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hf_fields.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="transformers is not installed") as caught:
        hf_fields._source_path("training_args")
    assert caught.value.hint == "pip install -U transformers"


def test_a_transformers_without_the_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(DependencyError, match="has no module training_args"):
        hf_fields._source_path("training_args")


SOURCE = '''
from typing import ClassVar
class Mixin:
    push: bool = field(default=False, metadata={"help": "Push  it.\\nAll 100%%."})
class Arguments(Mixin):
    """Docs."""
    optim = "old"
    if True:
        optim = "new"
    names: list[str] = field(default_factory=list)
    algorithm: str = field(default=optim)
    count: "int | None" = None
    rate: float = 5e-5
    shared: ClassVar[int] = 3
    device: str = field(init=False, default="cpu")
    def method(self): ...
'''


def test_fields_are_read_from_bases_conditions_and_plain_assignments(tmp_path):
    path = tmp_path / "arguments.py"
    path.write_text(SOURCE)
    fields = hf_fields._fields_of("Arguments", path)
    assert {name: field.default for name, field in fields.items()} == {
        "push": "false", "names": "", "algorithm": "new", "count": "none", "rate": "5e-05",
    }  # fmt: skip
    assert fields["push"].help == "Push it. All 100%."


def test_a_source_without_the_class_is_named(tmp_path):
    path = tmp_path / "arguments.py"
    path.write_text(SOURCE)
    with pytest.raises(DependencyError, match=r"has no class Elsewhere in arguments\.py"):
        hf_fields._fields_of("Elsewhere", path)


@pytest.mark.slow
def test_names_and_defaults_equal_those_of_the_imported_class():
    code = (
        "import dataclasses, json\n"
        "from transformers import TrainingArguments\n"
        "def value(field):\n"
        "    return field.default_factory() if field.default is dataclasses.MISSING else field.default\n"
        "print('FIELDS ' + json.dumps({field.name: value(field) for field in dataclasses.fields(TrainingArguments)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIELDS "))
    imported = {
        name: "" if value == [] else str(value).lower() if value is None or isinstance(value, bool) else str(value)
        for name, value in json.loads(line.removeprefix("FIELDS ")).items()
    }
    assert {name: field.default for name, field in hf_fields.training_arguments().items()} == imported
