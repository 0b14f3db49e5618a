import shlex

import pytest

from swift.config import flags
from swift.config.commands import SftConfig
from swift.config.options import build
from swift.errors import ConfigError
from swift.parallel.megatron.arguments import translate, words_for_swift
from swift.parallel.megatron.strategy import Megatron
from swift.parallel.mesh import Sizes

# As ms-swift's recipes have it; --moe_router_topk and --attention_softmax_in_fp32 are fields of Megatron-Core alone.
LINE = """sft --load m --dataset d --micro-batch-size 2 --global_batch_size=16 --tensor_model_parallel_size 2 --lr 1e-5 --min_lr 1e-6
--lr_warmup_fraction 0.05 --train_iters 100 --save out --save_interval 50 --finetune true --no_save_optim true --tuner_type full
--no_load_rng true --overlap_grad_reduce true --use_distributed_optimizer true --attention_backend flash --padding_free true --packing true
--recompute_granularity full --recompute_method block --recompute_num_layers 1
--attention_softmax_in_fp32 true --tp_comm_overlap_rs false"""


def test_a_command_line_of_megatron_is_one_of_swift(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    words = words_for_swift(shlex.split(LINE))
    config = flags.parse(SftConfig, "sft", "", words[1:])
    assert (words[0], config.strategy, config.model, config.output_dir) == ("sft", "megatron", "m", "out")
    assert (config.packing, config.padding_free) == (True, True)
    assert (config.per_device_train_batch_size, config.tensor_model_parallel_size) == (2, 2)
    assert config.gradient_accumulation_steps == 4  # 16 rows = 2 rows x 2 copies of the model x 4
    assert (config.learning_rate, config.lr_scheduler_kwargs) == (1e-5, {"min_lr": 1e-6})
    assert (config.max_steps, config.warmup_ratio, config.save_steps, config.save_only_model) == (100, 0.05, 50, True)
    assert config.megatron_extra_kwargs == {"attention_softmax_in_fp32": True, "tp_comm_overlap_rs": False}
    fields = config.transformer_fields(recompute_all=False)
    assert (fields["recompute_granularity"], fields["recompute_method"], fields["recompute_num_layers"]) == ("full", "block", 1)


def test_weights_are_trained_whole_unless_a_tuner_is_said():
    assert words_for_swift(["sft", "--model", "m"])[3:5] == ["--tuner_type", "full"]
    # What goes on has a tuner.
    assert words_for_swift(["sft", "--resume-from-checkpoint=r"]) == ["sft", "--strategy", "megatron", "--resume_from_checkpoint", "r"]
    assert "full" not in words_for_swift(["sft", "--train_type", "lora"])


def test_rows_of_a_step_are_dealt_to_the_processes_that_will_be_started(monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    words = words_for_swift(shlex.split("pt --global_batch_size 16 --micro_batch_size 2 --pipeline_model_parallel_size 2"))
    assert words[words.index("--gradient_accumulation_steps") + 1] == "4"  # 2 rows x 2 copies


def test_contexts_of_megatron_are_our_parts_of_a_sequence():
    words = translate(shlex.split("--context_parallel_size 2 --cp_comm_type p2p --global_batch_size 4 --micro_batch_size 2"), world_size=4)
    assert words == shlex.split(
        "--sequence_parallel_size 2 --sequence_parallel_kind ring --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--global_batch_size 6 --micro_batch_size 4", "--global_batch_size 6 is no multiple of --micro_batch_size 4 x 2"),
        ("--context_parallel_size 2 --cp_comm_type all_gather", "--cp_comm_type all_gather is not available"),
        ("--context_parallel_size 2 --sequence_parallel_size 2", "--context_parallel_size and --sequence_parallel_size say the same"),
        ("--context_parallel_size 2 --global_batch_size 3 --micro_batch_size 2", "no multiple of --micro_batch_size 2 x 1 data parallel"),
        ("--lr_decay_style wsd", "--lr_decay_style does not know 'wsd'"),
        ("--lr 1 --lr 2", "--lr is given twice"),
        ("--lr 1 --learning_rate 2", "--lr and --learning_rate say the same"),
        ("--moe_router_topk many", "--moe_router_topk does not take 'many'"),
        ("--tp_comm_overlap_rs false --megatron_extra_kwargs [1]", "--megatron_extra_kwargs takes a JSON object"),
        ("--finetune false", "--finetune false is not available"),
        ("--global_batch_size many", "--global_batch_size takes int, not 'many'"),
        ("model.yaml", "unexpected argument 'model.yaml'"),
    ],
)
def test_what_has_no_meaning_here_is_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        translate(shlex.split(line), world_size=2)


def test_an_unknown_command_is_refused():
    with pytest.raises(ConfigError, match="megatron rlhf is not available: it has sft, pt"):
        words_for_swift(["rlhf"])


OPTIONS = {"model": "m", "dataset": "d", "strategy": "megatron", "tuner_type": "full"}
TWO = Sizes(dp=2)


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({"tuner_type": "ia3"}, TWO, "--strategy megatron trains all weights or LoRA, not --tuner_type ia3"),
        ({"freeze_parameters_ratio": 0.5}, TWO, "--strategy megatron and --freeze_parameters_ratio cannot be combined"),
        ({"neftune_noise_alpha": 5.0}, TWO, "--neftune_noise_alpha cannot be combined"),
        ({"router_aux_loss_coef": 0.01}, TWO, "--router_aux_loss_coef cannot be combined"),
        ({"attn_impl": "eager"}, TWO, "--attn_impl cannot be combined: it names an attention of transformers"),
        ({"padding_side": "left"}, TWO, "--padding_side left cannot be combined"),
        ({"fp16": True}, TWO, "float16 cannot be combined: there is no loss scale"),
        ({"bf16": True, "torch_dtype": "float32"}, TWO, "--bf16 true and --torch_dtype float32 cannot be combined"),
        ({"megatron_extra_kwargs": {"cp_comm_type": "p2p"}}, TWO, "cp_comm_type is decided by"),
        ({"expert_model_parallel_size": 4}, Sizes(cp=3), "--expert_model_parallel_size 4 does not divide the 3 processes"),
        ({"expert_model_parallel_size": 3}, TWO, "--expert_model_parallel_size 3 does not divide the 2 processes"),
        ({"sequence_parallel": True}, TWO, "--sequence_parallel needs --tensor_model_parallel_size"),
        ({"sequence_parallel": True}, Sizes(tp=2), "--sequence_parallel true needs Transformer Engine"),
        ({"expert_model_parallel_size": 2}, Sizes(dp=2, tp=2), "need --sequence_parallel true in Megatron-Core"),
        ({"megatron_extra_kwargs": {"num_layrs": 2}}, TWO, "TransformerConfig has no field num_layrs"),
        ({"megatron_extra_kwargs": {"fp16": True}}, TWO, "fp16 is decided by the model or by another option"),
    ],
)
def test_what_does_not_go_with_megatron_is_refused_before_a_model_is_loaded(options, sizes, message):
    config = build(SftConfig, ("python", OPTIONS | options))
    with pytest.raises(ConfigError, match=message):
        Megatron.check(config, sizes)


def test_what_is_left_open_is_filled():
    config = build(
        SftConfig, ("python", OPTIONS | {"bf16": True, "virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    )
    Megatron.check(config, Sizes(pp=2))
    assert (config.padding_free, config.torch_dtype, config.pipeline_schedule) == (None, "bfloat16", "interleaved")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ddp", "recompute_method": "uniform"}, "--recompute_method has no effect without --strategy megatron"),
        ({"recompute_method": "uniform"}, "--recompute_method has no effect without --recompute_granularity full"),
        ({"recompute_granularity": "full", "recompute_num_layers": 2}, "--recompute_num_layers needs --recompute_method"),
        ({"recompute_granularity": "full", "recompute_modules": ["mlp"]}, "--recompute_modules has no effect without"),
        ({"pipeline_schedule": "gpipe", "pipeline_model_parallel_size": 2}, "Megatron-Core has 1f1b and interleaved"),
        ({"virtual_pipeline_model_parallel_size": 2}, "--virtual_pipeline_model_parallel_size has no effect"),
    ],
)
def test_options_of_megatron_that_have_no_effect_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(SftConfig, ("python", OPTIONS | options))
