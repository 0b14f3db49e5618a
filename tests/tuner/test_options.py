"""Options of tuners: each belongs to some, and is refused with the others."""

import pytest

from swift.config.commands import SftConfig
from swift.config.options import build
from swift.config.tuner import OPTIONS_OF, REFUSED_STARTS, REFUSED_TUNERS
from swift.errors import ConfigError
from swift.tuner import TUNERS

# A value that is not the default
OTHER = {
    "lora_rank": 4, "lora_alpha": 7.0, "lora_dropout": 0.2, "lora_bias": "all", "lora_dtype": "bfloat16", "lorap_lr_ratio": 2.0,
    "use_rslora": True, "use_dora": True, "init_weights": "gaussian", "target_modules": ["q_proj"], "target_regex": "x",
    "modules_to_save": ["lm_head"], "ia3_feedforward_modules": ["down_proj"], "freeze_parameters": ["a"], "freeze_parameters_regex": "a",
    "trainable_parameters": ["a"], "trainable_parameters_regex": "a", "freeze_parameters_ratio": 0.5, "use_galore": True,
    "vera_dropout": 0.5, "vera_d_initial": 0.5, "boft_dropout": 0.5, "adalora_beta1": 0.5, "adalora_beta2": 0.5,
    "adalora_orth_reg_weight": 0.1,
}  # fmt: skip


def config(**options):
    return build(SftConfig, ("argument", {"model": "m", "dataset": "d", **options}))


def test_the_tuners_that_can_be_chosen_are_those_that_there_are():
    assert set(OPTIONS_OF) == set(TUNERS)


@pytest.mark.parametrize("name", sorted({name for names in OPTIONS_OF.values() for name in names}))
def test_an_option_of_another_tuner_is_refused(name):
    tuner = next(tuner for tuner, names in OPTIONS_OF.items() if name not in names)
    with pytest.raises(ConfigError, match=f"--{name} has no effect with --tuner_type {tuner}|--use_galore|GaLore"):
        config(tuner_type=tuner, **{name: OTHER.get(name, 5)})


@pytest.mark.parametrize(("name", "reason"), REFUSED_TUNERS.items())
def test_a_tuner_of_ms_swift_that_is_not_built_says_why(name, reason):
    with pytest.raises(ConfigError) as caught:
        config(tuner_type=name)
    assert caught.value.message == f"--tuner_type {name} is not available: {reason}"
    assert "adalora" in caught.value.hint


@pytest.mark.parametrize("name", REFUSED_STARTS)
def test_a_start_that_is_not_built_says_why(name):
    with pytest.raises(ConfigError, match=f"--init_weights {name} is not available: it needs"):
        config(init_weights=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_weights": "zeros"}, "--init_weights does not know 'zeros'"),
        ({"init_weights": "pissa_niter_x"}, "--init_weights does not know 'pissa_niter_x'"),
        ({"init_weights": "pissa", "quant_bits": 4}, "--init_weights pissa changes the frozen weights"),
        ({"init_weights": "loftq"}, "--init_weights loftq makes up for the loss of 4-bit weights"),
        ({"init_weights": "loftq", "quant_bits": 8}, "--init_weights loftq makes up for the loss of 4-bit weights"),
        ({"init_weights": "olora", "adapters": ["a"]}, "--init_weights olora has no effect with --adapters"),
        ({"tuner_type": "adalora", "adalora_init_r": 8}, "--adalora_init_r 8 leaves nothing to take away"),
        ({"tuner_type": "boft", "boft_block_num": 4}, "one of --boft_block_size and --boft_block_num"),
        ({"tuner_type": "llamapro", "llamapro_num_groups": 3}, "--llamapro_num_new_blocks 4 is no multiple"),
        ({"tuner_type": "llamapro", "quant_bits": 4}, "--tuner_type llamapro cannot train quantized weights"),
        ({"use_dora": True, "quant_bits": 8}, "--use_dora fails on 8-bit weights"),
        ({"tuner_type": "vera", "adapters": ["a"]}, "--adapters has no effect when training with --tuner_type vera"),
        ({"tuner_type": "full", "lisa_step_interval": 5}, "--lisa_step_interval has no effect without --lisa_activated_layers"),
    ],
)
def test_combinations_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.message.startswith(message)


def test_a_truth_value_is_read_as_the_word_where_a_recipe_says_true():
    assert config(init_weights=True).init_weights == "true"


@pytest.mark.parametrize(
    ("options", "trains_adapter", "changes_base"),
    [
        ({}, True, False),
        ({"tuner_type": "vera"}, True, False),
        ({"init_weights": "pissa"}, True, True),
        ({"lora_bias": "all"}, True, True),
        ({"tuner_type": "full"}, False, True),
        ({"tuner_type": "llamapro"}, False, True),
    ],
)
def test_what_a_tuner_does_to_the_model_is_known_from_its_options(options, trains_adapter, changes_base):
    found = config(**options)
    assert (found.trains_adapter, found.changes_base) == (trains_adapter, changes_base)
