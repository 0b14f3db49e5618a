import pytest

from swift.config import flags
from swift.config.commands import InferConfig, MergeConfig, PtConfig, SftConfig
from swift.config.options import build
from swift.errors import ConfigError

BASE = ["--model", "m", "--dataset", "d"]


def parse(*words, cls=SftConfig):
    return flags.parse(cls, "sft", "", [*BASE, *words])


def test_values_are_converted_to_the_type_of_their_field():
    config = parse(
        "--lora_rank",
        "16",
        "--learning_rate",
        "1e-3",
        "--packing",
        "false",
        "--target_modules",
        "q_proj",
        "v_proj",
        "--columns",
        '{"a": "query"}',
        "--eval_on_start",
        "--use-hf",
        "true",
    )
    assert (config.lora_rank, config.learning_rate, config.eval_on_start, config.use_hf) == (16, 1e-3, True, True)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.columns == {"a": "query"}


def test_a_value_with_spaces_and_dashes_stays_whole():
    assert parse("--system=--stay calm").system == "--stay calm"


def test_a_flag_beats_the_recipe_and_the_recipe_beats_the_default(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndataset: d\nlora_rank: 32\nlora_alpha: 64\n")
    config = flags.parse(SftConfig, "sft", "", [str(recipe), "--lora_rank", "4"])
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (4, 64.0, 0.05)
    assert config.sources["lora_rank"] == "flag"
    assert config.sources["lora_alpha"] == f"recipe {recipe}"
    assert "lora_dropout" not in config.sources


def test_a_checkpoint_beats_the_default_only():
    config = flags.parse(
        SftConfig, "sft", "", [*BASE, "--lora_rank", "4"], checkpoint=lambda said: ("checkpoint c", {"lora_rank": 64, "seed": 7})
    )
    assert (config.lora_rank, config.seed) == (4, 7)


def test_python_arguments_read_the_same_fields():
    config = build(SftConfig, ("argument", {"model": "m", "dataset": "d", "quantization_bit": 4, "sft_type": "lora"}))
    assert (config.quant_method, config.quant_bits, config.dataset) == ("bnb", 4, ["d"])


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--warmup_ration", "0.1"], "unknown option --warmup_ration", "did you mean --warmup_ratio?"),
        (["--lora_rank", "many"], "--lora_rank takes int, not 'many'", None),
        (["--lora_rank", "0"], "--lora_rank takes at least 1, not 0", None),
        (["--lora_dropout", "nan"], "--lora_dropout takes 0 to 0.99, not nan", None),
        (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type does not know 'cosin'", "did you mean 'cosine'?"),
        (["--columns", "{broken"], "--columns takes a JSON object", None),
        (["--seed", "1", "--seed", "2"], "--seed is given twice", None),
        (["--tuner_type", "full", "--lora_rank", "4"], "--lora_rank has no effect with --tuner_type full", "remove --lora_rank"),
        (["--bf16", "true", "--fp16", "true"], "--bf16 and --fp16 exclude each other", None),
        (["--max_steps", "5", "--num_train_epochs", "1"], "--num_train_epochs has no effect when --max_steps is given", None),
        (["--tuner_type", "full", "--quant_bits", "4"], "--tuner_type full cannot train quantized weights", None),
        (["--predict_with_generate", "true"], "option --predict_with_generate is not available", None),
        (["--temperature", "0.5"], "option --temperature has no effect here", "remove --temperature"),
    ],
)
def test_wrong_options_end_in_one_line_with_a_way_out(words, message, hint):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    if hint:
        assert caught.value.hint == hint


def test_an_option_without_effect_is_accepted_at_its_default():
    assert parse("--tuner_type", "full", "--lora_rank", "8").tuner_type == "full"


def test_old_spellings_work_with_one_line_each(capsys):
    config = flags.parse(SftConfig, "sft", "", ["--model_id_or_path", "m", "--dataset", "d", "--train_type", "full"])
    assert (config.model, config.tuner_type) == ("m", "full")
    assert capsys.readouterr().err.count("\n") == 2


def test_pt_trains_every_token_of_plain_text():
    config = parse(cls=PtConfig)
    assert (config.loss_scale, config.use_chat_template) == ("all", False)


@pytest.mark.parametrize("text", ["- a list", "a: [broken", "\x00"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, text):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match="recipe"):
        flags.parse(SftConfig, "sft", "", [str(recipe)])


def test_every_option_has_a_help_text_that_argparse_can_print(capsys):
    for cls in (SftConfig, InferConfig, MergeConfig):
        flags.make_parser(cls, "x", "").print_help()
    assert "--lora_rank" in capsys.readouterr().out


def test_every_option_is_read_outside_of_its_declaration():
    import re
    from pathlib import Path

    import swift.config.commands as commands

    root = Path(commands.__file__).parent.parent
    code = "\n".join(path.read_text() for path in root.rglob("*.py") if path.parent.name != "config")
    checks = "\n".join(path.read_text() for path in root.glob("config/*.py"))
    for name in commands.all_options() - {"task_type", "tuner_backend", "acc_strategy", "infer_backend"}:  # one choice each
        assert re.search(rf"\.{name}\b", code) or re.search(rf"self\.{name}\b|said.get\(\"{name}\"", checks), name


def test_an_option_that_nobody_reads_here_is_refused():
    with pytest.raises(ConfigError, match="--max_length has no effect"):
        flags.parse(InferConfig, "infer", "", ["--model", "m", "--max_length", "64"])
