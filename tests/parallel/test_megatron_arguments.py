import shlex

import pytest

from swift.config import flags
from swift.config.commands import SftConfig
from swift.errors import ConfigError
from swift.parallel.megatron.arguments import translate, words_for_swift

LINE = """sft --load m --dataset d --micro-batch-size 2 --global_batch_size=16 --tensor_model_parallel_size 2 --lr 1e-5 --min_lr 1e-6
--lr_warmup_fraction 0.05 --train_iters 100 --save out --save_interval 50 --finetune true --no_save_optim true --tuner_type full
--no_load_rng true"""


def test_a_command_line_of_megatron_is_one_of_swift(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = words_for_swift(shlex.split(LINE))
    config = flags.parse(SftConfig, "sft", "", words[1:])
    assert (words[0], config.strategy, config.model, config.output_dir) == ("sft", "megatron", "m", "out")
    assert (config.per_device_train_batch_size, config.tensor_model_parallel_size) == (2, 2)
    assert config.gradient_accumulation_steps == 4  # 16 rows = 2 rows x 2 copies of the model x 4
    assert (config.learning_rate, config.lr_scheduler_kwargs) == (1e-5, {"min_lr": 1e-6})
    assert (config.max_steps, config.warmup_ratio, config.save_steps, config.save_only_model) == (100, 0.05, 50, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--global_batch_size 6 --micro_batch_size 4", "--global_batch_size 6 is no multiple of --micro_batch_size 4 x 2"),
        ("--context_parallel_size 2", "option --context_parallel_size is not available: .*Transformer Engine"),
        ("--lr_decay_style wsd", "--lr_decay_style does not know 'wsd'"),
        ("--lr 1 --lr 2", "--lr is given twice"),
        ("--lr 1 --learning_rate 2", "--lr and --learning_rate say the same"),
        ("--finetune false", "--finetune false is not available"),
        ("--global_batch_size many", "--global_batch_size takes int, not 'many'"),
        ("model.yaml", "unexpected argument 'model.yaml'"),
    ],
)
def test_what_has_no_meaning_here_is_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        translate(shlex.split(line), world_size=2)


def test_an_unknown_command_is_refused():
    with pytest.raises(ConfigError, match="megatron rlhf is not available: it has sft and pt"):
        words_for_swift(["rlhf"])
