"""Command lines of swift export and swift quantize: ms-swift's run unchanged, and what goes together badly is refused."""

import shlex

import pytest

import swift
from swift.config import flags
from swift.config.commands import MergeConfig, SftConfig
from swift.config.export import ExportConfig, QuantizeConfig
from swift.config.options import build
from swift.errors import ConfigError

GPTQ = "--model M --quant_method gptq"


def parse(line, cls=ExportConfig):
    return flags.parse(cls, "export", "", shlex.split(line))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--model Qwen/Qwen-7B --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' 'AI-ModelScope/alpaca-gpt4-data-en#500' "
            "--device_map auto --quant_n_samples 256 --quant_batch_size 1 --max_length 2048 --quant_method awq --quant_bits 4 "
            "--output_dir D",
            {"quant_method": "awq", "quant_bits": 4, "max_length": 2048, "output_dir": "D", "quant_format": "awq", "quant_n_samples": 256},
        ),
        (
            "--model M --dataset X#500 --device_map cpu --quant_method gptq --quant_bits 4 --group_size 64 --truncation_strategy delete",
            {"quant_method": "gptq", "group_size": 64, "device": "cpu", "dataset": ["X#500"]},
        ),
        ("--model M --quant_method gptq_v2 --quant_bits 4", {"quant_method": "gptq", "quant_format": "gptq_v2"}),
        ("--model M --quant_method fp8", {"quant_bits": 8, "quant_format": "compressed-tensors", "quant_strategy": "channel"}),
        (
            "--model M --quant_method bnb --quant_bits 4 --bnb_4bit_quant_type nf4 --bnb_4bit_use_double_quant true "
            "--bnb_4bit_compute_dtype bfloat16",
            {"quant_method": "bnb", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
        ),
        ("--model M --quantization_method bitsandbytes --quantization_bit 8", {"quant_method": "bnb", "quant_bits": 8}),
        ("--model M --to_ollama true --output_dir M-ollama", {"to": "ollama"}),
        ("--ckpt_dir C --merge_lora true", {"adapters": ["C"], "merges_only": True}),
        ("--adapters C --merge_lora true --quant_method awq --model_type qwen", {"merges_only": False, "quant_bits": 4}),
        (
            "--adapters C --push_to_hub true --hub_model_id A/B --hub_token T --use_hf false",
            {"uploads_only": True, "use_hf": False, "hub_token": "T"},
        ),
        ("--adapters C --merge_lora true --push_to_hub true --hub_model_id A/B", {"uploads_only": False, "merges_only": True}),
        ("--model D --push_to_hub true --hub_model_id A/B --commit_message done", {"uploads_only": True}),
        ("--model M --quant_method awq --to_mcore false --to_cached_dataset false --streaming false", {"quant_method": "awq"}),
        ("--adapters C --quant_method gptq --load_data_args true", {"load_data_args": True}),
    ],
)
def test_a_command_line_of_ms_swift_is_read(line, expected):
    config = parse(line)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model M", "nothing is asked for"),
        ("--quant_method awq", "no model is given"),
        ("--model M --merge_lora true", "--merge_lora true needs an adapter"),
        ("--model M --quant_bits 4", "--quant_bits 4 needs --quant_method"),
        ("--model M --to gguf --merge_lora true", "--merge_lora has no effect without --adapters"),
        ("--model M --to gguf --quant_method awq", "--to gguf and --quant_method awq ask for two things"),
        ("--model M --to onnx --to_ollama true", "--to onnx and --to_ollama true ask for two things"),
        ("--adapters A B", "--adapters takes one adapter, not 2"),
        ("--adapters C --merge_lora false", "--merge_lora false is not available"),
        ("--adapters C --safe_serialization false", "--safe_serialization false is not available"),
        ("--adapters C --max_length 2048", "--max_length has no effect when merging"),
        ("--adapters C --dataset X", "--dataset has no effect when merging"),
        ("--adapters C --load_data_args true", "--load_data_args has no effect when merging"),
        ("--adapters C --max_shard_size huge", "--max_shard_size takes a size such as 5GB, not 'huge'"),
        (f"{GPTQ} --quant_bits 5", "--quant_bits takes 2, 3, 4, 8 with --quant_method gptq, not 5"),
        ("--model M --quant_method awq --quant_bits 8", "--quant_bits takes 4 with --quant_method awq, not 8"),
        (f"{GPTQ} --group_size 100", "--group_size takes -1 or a multiple of 8, not 100"),
        (f"{GPTQ} --group_size 0", "--group_size takes -1 or a multiple of 8, not 0"),
        (f"{GPTQ} --group_size -1 --desc_act true", "--desc_act has no effect with --group_size -1"),
        (f"{GPTQ} --quant_format awq", "--quant_format awq does not hold what --quant_method gptq makes"),
        (f"{GPTQ} --desc_act true --quant_format compressed-tensors", "--quant_format compressed-tensors holds no order of inputs"),
        ("--model M --quant_method gptq_v2 --quant_format gptq", "--quant_method gptq_v2 and --quant_format gptq exclude each other"),
        (f"{GPTQ} --quant_skip head (", "--quant_skip (: no regular expression"),
        (f"{GPTQ} --quant_skip --damp_percent 2", "--damp_percent takes 0 to 1, not 2"),
        (f"{GPTQ} --quant_strategy block", "--quant_strategy has no effect with --quant_method gptq"),
        (f"{GPTQ} --bnb_4bit_quant_type fp4", "--bnb_4bit_quant_type has no effect with --quant_method gptq"),
        (f"{GPTQ} --gguf_type q8_0", "--gguf_type has no effect without --to gguf"),
        (f'{GPTQ} --columns \'{{"a": "query"}}\'', "--columns has no effect without --dataset"),
        (f"{GPTQ} --system calm", "--system has no effect without --dataset"),
        (f"{GPTQ} --max_kl 1 --quant_eval_samples 0", "--max_kl needs something to measure with"),
        (f"{GPTQ} --seed 7", "--seed has no effect when exporting: --data_seed chooses the documents"),
        (f"{GPTQ} --attn_impl eager", "--attn_impl has no effect when exporting"),
        (f"{GPTQ} --chat_template chatml", "--chat_template has no effect without --adapters"),
        (f"{GPTQ} --max_difference 1", "--max_difference has no effect without --adapters"),
        (f"{GPTQ} --hub_model_id A/B", "--hub_model_id has no effect without --push_to_hub true"),
        (f"{GPTQ} --push_to_hub true", "--push_to_hub true needs --hub_model_id"),
        (f"{GPTQ} --push_to_hub true --hub_model_id A/B --offline true", "--offline true and --push_to_hub true exclude each other"),
        ("--model D --push_to_hub true --hub_model_id A/B --max_length 2048", "--max_length has no effect when a model or an adapter is"),
        ("--model D --push_to_hub true --hub_model_id A/B --output_dir E", "--output_dir has no effect when a model or an adapter is"),
        ("--model M --quant_method int8 --quant_strategy block", "--quant_strategy block is for fp8"),
        ("--model M --quant_method fp8 --quant_format fp8", "--quant_format fp8 holds blocks with dynamic activations"),
        ("--model M --quant_method fp8 --group_size 64", "--group_size has no effect with --quant_method fp8"),
        ("--model M --quant_method awq --sym false", "--sym has no effect with --quant_method awq"),
        ("--model M --quant_method bnb --quant_n_samples 8", "--quant_n_samples has no effect with --quant_method bnb"),
        (
            "--model M --quant_method bnb --quant_bits 8 --bnb_4bit_quant_type fp4",
            "--bnb_4bit_quant_type has no effect with --quant_bits 8",
        ),
        ("--model M --to gguf --quant_batch_size 2", "--quant_batch_size has no effect with --to gguf, which needs no calibration"),
        ("--model M --to gguf --quant_eval_samples 0 --dataset X", "--dataset has no effect with --quant_eval_samples 0"),
        ("--model M --to gguf --max_shard_size 1GB", "--max_shard_size has no effect with --to gguf"),
        ("--model M --to onnx --torch_dtype float16", "--torch_dtype has no effect with --to onnx"),
        ("--model M --quant_method hqq", "--quant_method hqq is not available: it quantizes while loading"),
        ("--model M --to_mcore true --to gguf", "--to gguf and --to_mcore true ask for two things"),
        ("--to_hf true", "--to_hf true needs --mcore_model"),
        ("--mcore_model D", "--mcore_model is what --to_hf true reads"),
        ("--mcore_model D --to_hf true --quant_method awq", "--quant_method has no effect with --to_hf true"),
        ("--model M --to_cached_dataset true", "option --to_cached_dataset is not available"),
        ("--model M --to_peft_format true", "option --to_peft_format is not available: adapters are in PEFT's format from the start"),
        ("--model M --lora_rank 16", "option --lora_rank has no effect here: it belongs to another command"),
        ("--model M --quant_methd awq", "unknown option --quant_methd"),
    ],
)
def test_what_goes_together_badly_is_one_line(line, message):
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message
    assert caught.value.hint or "takes" in message or "regular" in message


def test_quantize_wants_a_method():
    with pytest.raises(ConfigError, match="no --quant_method is given"):
        parse("--model M", QuantizeConfig)


@pytest.mark.parametrize("line", ["--push_to_hub false", "--hub_model_id none", "--group_size 128", "--hub_private_repo false"])
def test_the_default_of_an_option_of_another_command_is_inert(line):
    assert parse(f"--model M --dataset D {line}", SftConfig).model == "M"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--push_to_hub true", "swift export --adapters RUN --push_to_hub true --hub_model_id ORG/NAME uploads what was trained"),
        ("--hub_model_id A/B", "swift export --adapters RUN --push_to_hub true --hub_model_id ORG/NAME uploads what was trained"),
        ("--group_size 64", "remove --group_size"),
        ("--group_size many", "remove --group_size"),
    ],
)
def test_an_option_of_another_command_is_refused_with_a_way_out(line, hint):
    with pytest.raises(ConfigError, match="it belongs to another command") as caught:
        parse(f"--model M --dataset D {line}", SftConfig)
    assert hint in caught.value.hint


def test_how_a_run_quantized_its_frozen_weights_is_no_wish_for_its_export():
    saved = {"model": "base", "quant_method": "bnb", "quant_bits": 4, "torch_dtype": "bfloat16", "bnb_4bit_quant_type": "fp4"}
    config = flags.parse(ExportConfig, "export", "", ["--adapters", "C"], checkpoint=lambda said: ("checkpoint C", saved))
    assert (config.model, config.torch_dtype, config.quant_method, config.bnb_4bit_quant_type) == ("base", "bfloat16", None, "nf4")
    assert config.merges_only


def test_every_option_is_given_on_to_the_merge_but_those_of_quantizing():
    from swift.export.source import merge_config

    saved = {"model": "base", "chat_template": "chatml", "quant_method": "bnb", "attn_impl": "eager"}
    line = ["--adapters", "C", "--quant_method", "awq", "--max_difference", "0.5", "--output_dir", "D"]
    config = flags.parse(ExportConfig, "export", "", line, checkpoint=lambda said: ("checkpoint C", saved))
    merge = merge_config(config, output_dir="T")
    assert isinstance(merge, MergeConfig)
    assert (merge.model, merge.chat_template, merge.max_difference, merge.output_dir) == ("base", "chatml", 0.5, "T")


def test_python_has_names_that_its_packages_do_not_hide():
    import swift.export.run
    import swift.quantize.run

    assert {"export_model", "quantize_model", "export_awq_model"} <= set(dir(swift))
    assert callable(swift.export_model)
    assert callable(swift.quantize_model)


def test_a_python_option_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match="unknown option --seqlenn"):
        swift.export_awq_model("m", seqlenn=4)


def test_arguments_of_python_are_checked_as_flags_are():
    with pytest.raises(ConfigError, match="--quant_bits takes 4"):
        build(QuantizeConfig, ("argument", {"model": "m", "quant_method": "awq", "quant_bits": 8}))
