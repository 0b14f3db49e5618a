"""The formulas of memory and traffic, beside what small models hold and send."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

import swift.parallel.spread
from swift.data.collate import padded_batch
from swift.model.policy import Policy
from swift.objectives.sft import Sft
from swift.parallel.cost import Shape, Spread, Work, memory, traffic
from swift.parallel.mesh import Mesh, sizes_of
from swift.parallel.world import join
from tests.ranks import run_ranks

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TOKENS, PASSES = 64, 2


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**CONFIG),
        LlamaConfig(**CONFIG | {"tie_word_embeddings": True, "head_dim": 16}),
        Qwen3MoeConfig(**CONFIG | {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}),
    ],
)
def test_the_shape_counts_the_parameters_of_the_model(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "q_norm" in name or "k_norm" in name)
    assert Shape.of(config.to_dict()).parameters == sum(parameter.numel() for parameter in model.parameters()) - norms


def test_an_adapter_on_weights_of_four_bits_leaves_what_is_outside_of_the_blocks_in_sixteen():
    # Outside: 2 * 320 * 32 + 32 = 20,512 weights of 2 bytes; in blocks 4 * (3,072 + 6,144 + 64) = 37,120 of 0.5; of the 57,632
    # a hundredth is trained, in float32.
    shape = Shape.of(CONFIG)
    work = Work(tokens=64, weight_bytes=0.5, travel_bytes=0.5, outside_bytes=2, trained=0.01)
    held = memory(shape, work, Spread())
    assert held.weights == pytest.approx(20_512 * 2 + 37_120 * 0.5 + 576.32 * 4)
    assert (held.gradients, held.optimizer) == pytest.approx((576.32 * 4, 576.32 * 8))
    # Both of two processes gather the other half: twice the blocks, once the rest.
    assert traffic(shape, work, Spread(dp=2)).weights == pytest.approx((2 * 37_120 * 0.5 + 20_512 * 2) / 2)


def test_a_pipeline_is_as_large_as_its_longest_stage():
    # Four blocks in three stages: two in one of them, and an embedding of 320 * 32.
    held = memory(Shape.of(CONFIG), Work(tokens=64, weight_bytes=4), Spread(pp=3, shards=False))
    assert held.weights == (2 * 9_280 + 10_240) * 4


def test_what_is_offloaded_is_in_main_memory_and_a_block_and_what_is_outside_come_to_the_card():
    # Of 57,632 weights half of 16 bytes each in either process. Gathered in 2 bytes: two blocks of 9,280 and 20,512 outside of
    # them, whose gradients, of 4 bytes, are whole for a while.
    work = Work(tokens=64, weight_bytes=4, micro_batches=3)
    here, there = (memory(Shape.of(CONFIG), work, Spread(dp=2, offload=offload)) for offload in (False, True))
    gathered = 2 * (2 * 9_280 + 20_512) + 4 * 20_512
    assert here.gathered == there.gathered == gathered
    assert (there.host, there.total) == (57_632 / 2 * 16, gathered + here.activations)
    assert (here.host, here.total) == (0, 57_632 / 2 * 16 + gathered + here.activations)
    # Down: of blocks its half twice, of the rest once; up: its half of the gradients. Three times.
    sent = traffic(Shape.of(CONFIG), work, Spread(dp=2, offload=True))
    assert sent.host == 3 * (2 * 37_120 + 20_512 + 57_632) * 4 / 2
    assert sent.total == traffic(Shape.of(CONFIG), work, Spread(dp=2)).total


def test_gradients_of_spread_experts_are_summed_by_the_processes_that_have_them():
    shape = Shape.of(CONFIG | {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2})
    # 4 * 8 * 3 * 32 * 24 = 73,728 weights of experts; 4 * (3,072 + 64 + 256) + 20,512 = 34,080 others, which all four have.
    sent = traffic(shape, Work(tokens=64), Spread(dp=4, ep=4, shards=False)).gradients
    assert sent == 2 * 4 * 34_080 * 3 / 4
    # Each expert of two: half of them in each of two pairs of processes.
    sent = traffic(shape, Work(tokens=64), Spread(dp=4, ep=2, shards=False)).gradients
    assert sent == 2 * 4 * (34_080 * 3 / 4 + 36_864 / 2)


def test_spread_experts_are_cut_by_the_processes_that_have_the_same_ones():
    shape = Shape.of(CONFIG | {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2})
    # Of 34,080 others, 13,568 of them in blocks, each of four has a quarter; of half the experts, 36,864, one half.
    held = memory(shape, Work(tokens=64, weight_bytes=4), Spread(dp=4, ep=2))
    assert held.weights == 4 * (34_080 / 4 + 36_864 / 2) == held.gradients == held.optimizer / 2
    sent = traffic(shape, Work(tokens=64), Spread(dp=4, ep=2))
    assert sent.weights == 2 * ((2 * 13_568 + 20_512) * 3 / 4 + 2 * 36_864 / 2)
    assert sent.gradients == 4 * (34_080 * 3 / 4 + 36_864 / 2)


class Sent(TorchDispatchMode):
    """Bytes that a process sends in rings, of what is larger than the numbers that are agreed on."""

    def __init__(self, least: int = 1024) -> None:
        super().__init__()
        self.least, self.bytes = least, {"sums": 0.0, "gathered": 0.0, "scattered": 0.0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        for begin, kind, times in (("c10d.allreduce_", "sums", 2), ("c10d._allgather", "gathered", 1), ("c10d._reduce", "scattered", 1)):
            if name.startswith(begin):
                tensors = args[0] if kind == "sums" else [args[0] if kind == "gathered" else args[1]]
                group = args[1] if kind == "sums" else args[2]
                size = torch.distributed.ProcessGroup.unbox(group).size()
                own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                self.bytes[kind] += times * own * (size - 1) / size if own >= self.least else 0
        return function(*args, **(kwargs or {}))


def measure(kind):
    """(bytes sent in one step, bytes held) by a process."""
    with join(torch.device("cpu")) as world:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG))
        mesh = Mesh(sizes_of(world.size, tp=2 if kind == "tp" else 1), "cpu")
        strategy = swift.parallel.spread.Spread(world, mesh, torch.device("cpu"), shards=kind == "fsdp2")
        model, _ = strategy.prepare(model, lambda model: torch.optim.AdamW(model.parameters()))
        policy = Policy(model, call=strategy.call)
        ids = torch.arange(TOKENS).numpy() % 300
        batches = [padded_batch([{"input_ids": ids, "labels": ids}], pad_token_id=0) for _ in range(PASSES)]
        for _ in range(2):  # the first step finds weights that the trials of the policy have gathered
            with Sent() as sent:
                strategy.accumulate(policy, Sft(), None, batches, 1.0)
                strategy.clip_and_step(1.0)
        return sent.bytes, strategy.local_bytes()


@pytest.mark.multi
def test_what_is_sent_and_held_is_what_the_formulas_say():
    shape = Shape.of(CONFIG)
    work = Work(tokens=TOKENS, micro_batches=PASSES, weight_bytes=4, travel_bytes=4, checkpointing=False)
    for kind, spread in (("ddp", Spread(dp=2, shards=False)), ("fsdp2", Spread(dp=2)), ("tp", Spread(tp=2, shards=False))):
        said, held = traffic(shape, work, spread), memory(shape, work, spread)
        for sent, own in run_ranks(2, measure, kind):
            if kind == "ddp":
                assert sent["sums"] == said.gradients
            elif kind == "fsdp2":
                assert sent["gathered"] == said.weights and sent["scattered"] == said.gradients
            else:
                # In float32, not in 16 bits; and the embedding and the head, which predicts nothing after the last token.
                ends = PASSES * (TOKENS + TOKENS - 1) * shape.hidden * 4
                assert sent["sums"] == 2 * said.layers + ends
            assert own["weights"] == pytest.approx(held.weights, rel=0.01)
            assert own["optimizer"] == pytest.approx(held.optimizer, rel=0.01)
