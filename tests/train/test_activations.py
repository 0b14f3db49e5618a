import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from swift import hub
from swift.config.commands import SftConfig
from swift.config.options import build
from swift.model.policy import Policy, probe_ids
from swift.parallel.choose import Arrangement
from swift.parallel.mesh import Sizes
from swift.parallel.world import World
from swift.train.activations import Kept, Need, checkpoint_activations, choose_checkpointing, fewest_blocks, measure
from swift.train.build import load_for_training
from swift.train.memory import free_bytes
from swift.train.prepare import fill_open_options, prepare_data
from swift.train.probe import find_blocks
from swift.train.run import Session
from swift.train.rundir import RunDirectory
from swift.train.steps import plan_steps
from tests.tiny import make_model

CPU = torch.device("cpu")


def plan(result):
    return json.loads((result.run / "plan.json").read_text())


def test_a_linear_layer_keeps_its_input_once():
    layer = nn.Linear(8, 5)

    def forward(length):
        x = torch.randn(1, length, 8)
        return layer(x) + layer(x)

    # 8 floats a token, kept twice as one storage; the weight is no activation
    kept, rest = measure(forward, [layer])
    assert kept == [Kept(0.0, 8 * 4, 0.0)]
    assert rest == Kept(0.0, 0.0, 0.0)


def test_each_block_is_counted_by_itself_and_the_rest_too():
    first, second = nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    kept, rest = measure(lambda length: second(first(torch.randn(length, 8))).sigmoid(), [first, second])
    assert kept[0] == Kept(0.0, 8 * 4, 0.0)
    assert kept[1] == Kept(0.0, (6 + 4) * 4, 0.0)  # the layer's input, the tanh's output
    assert rest == Kept(0.0, 4 * 4, 0.0)  # the sigmoid's output


def test_scores_of_all_pairs_show_as_a_square():
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.requires_grad_(False)

    def forward(length):
        x = torch.randn(length, 8, requires_grad=True)
        return layer((x @ x.T).softmax(-1) @ x)

    kept, rest = measure(forward, [layer])
    assert kept == [Kept(0.0, 0.0, 0.0)]  # a frozen layer needs its weight alone
    assert rest.linear == 8 * 4  # x
    assert rest.quadratic == 4  # the softmax
    assert rest.bytes(100, 50) == 100 * (32 + 4 * 50)


def test_what_does_not_grow_with_the_tokens_is_kept_once():
    layer = nn.Linear(8, 8)

    def forward(length):
        return torch.randn(length, 8) @ (layer.weight * 2)

    _, rest = measure(forward, [])
    assert rest == Kept(0.0, 8 * 4, 0.0)
    _, rest = measure(lambda length: torch.randn(length, 8, requires_grad=True) @ (layer.weight * 2), [])
    assert rest == Kept(8 * 8 * 4, 8 * 4, 0.0)  # the doubled weight is made anew in each pass


def need(**changes):
    return Need(**(dict(blocks=[100.0] * 4, rest=10.0, hidden=5.0, state=40.0, head=30.0) | changes))


def test_the_need_falls_with_each_checkpointed_block():
    # nothing: 40 + 10 + 4 x 100 + the gradients of one block's tensors
    assert need().bytes(0) == 550
    assert need().bytes(1) == 40 + 10 + 5 + 300 + 100
    assert need().bytes(4) == 40 + 10 + 4 * 5 + 100 + 100  # one block again, and its gradients


@pytest.mark.parametrize(("budget", "count"), [(1000, 0), (550, 0), (549, 1), (455, 1), (454, 2), (300, 3), (10, 4)])
def test_no_more_blocks_are_checkpointed_than_needed(budget, count):
    assert fewest_blocks(need(), budget) == count


def test_a_model_that_cannot_choose_checkpoints_all():
    assert fewest_blocks(need(), 549, all_or_none=True) == 4
    assert fewest_blocks(need(), 550, all_or_none=True) == 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_checkpointed_blocks_change_neither_loss_nor_gradients(tmp_path, count):
    path = make_model(tmp_path / "model", num_hidden_layers=4)

    def step(count):
        model = AutoModelForCausalLM.from_pretrained(path).train()
        policy = Policy(model)
        if count:
            checkpoint_activations(model, None, blocks=find_blocks(policy), count=count)
        assert [bool(block.gradient_checkpointing) for block in find_blocks(policy)] == [at < count for at in range(4)]
        ids = probe_ids(model, 12)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    for found, wanted in zip(step(count), step(0), strict=True):
        assert torch.equal(found, wanted)


def test_fewer_bytes_are_kept_by_a_checkpointed_block(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    policy = Policy(model)
    blocks = find_blocks(policy)
    checkpoint_activations(model, None, blocks=blocks, count=1)
    kept, _ = measure(lambda length: model(input_ids=probe_ids(model, length), use_cache=False).logits, blocks)
    assert kept[0].linear <= 32 * 4 + 2 * 8 * 4 + 8  # its input, the tables of the rotary embedding, positions
    assert kept[1].linear > 5 * kept[0].linear


def test_a_run_says_what_it_decided_and_keeps_the_numbers(run, capsys):
    memory = plan(run())["planned"]["memory"]
    assert memory["checkpointed_blocks"] == 0
    assert memory["blocks"] == 2
    assert memory["kept_bytes_per_token_and_block"] > 32 * 4
    assert 0 < memory["needed_gib"] < memory["free_gib"]
    assert plan(run("again"))["measured"]["peak_memory_gib"] > memory["needed_gib"]
    assert "no block computed again in the backward pass:" in capsys.readouterr().out


def test_the_option_decides_alone_when_it_is_given(run):
    assert "memory" not in plan(run(gradient_checkpointing=False))["planned"]


@pytest.fixture
def choose(tiny_model, rows, tmp_path):
    """choose_checkpointing for a run of the tiny model, as a function of the free memory."""
    config = build(SftConfig, ("test", {"model": str(tiny_model), "dataset": str(rows), "max_steps": 1, "report_samples": 0}))
    snapshot = hub.resolve(config.model)
    fill_open_options(config, snapshot)
    data = prepare_data(config, snapshot)
    fill_open_options(config, snapshot, data)
    steps = plan_steps(config, data.rows)
    with RunDirectory(tmp_path / "run") as run:
        loaded = load_for_training(config, snapshot.path)
        one = Session(config, run, data, steps, loaded, world=World(), arrangement=Arrangement("single", Sizes()))
        yield lambda free: choose_checkpointing(config, one.policy, steps, one.optimizer, one.strategy, is_flat=one.is_flat, free=free)


def test_less_memory_means_more_checkpointed_blocks(choose, capsys):
    roomy = choose(2**30)
    assert roomy.checkpointed == 0
    needed = roomy.needed * 2**30
    assert choose(int(needed / 0.8) - 2000).checkpointed == 1
    tight = choose(2**10)
    assert (tight.checkpointed, tight.blocks) == (2, 2)
    assert "may not fit" in capsys.readouterr().err


def test_free_memory_is_what_the_kernel_says(tmp_path):
    (tmp_path / "proc").mkdir()
    assert free_bytes(CPU, root=tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    assert free_bytes(CPU, root=tmp_path) == 3000 * 1024


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage", "cache"),
    [
        ("0::/box", "sys/fs/cgroup/box", "memory.max", "memory.current", "inactive_file"),
        ("0::/outside/name", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/box", "sys/fs/cgroup/memory/box", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_leaves_less(tmp_path, line, folder, limit, usage, cache):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    3000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/box\n{line}\n")
    group = tmp_path / folder
    group.mkdir(parents=True)
    (group / limit).write_text("1000000\n")
    (group / usage).write_text("700000\n")
    (group / "memory.stat").write_text(f"anon 5\n{cache} 100000\n")
    assert free_bytes(CPU, root=tmp_path) == 1_000_000 - 700_000 + 100_000


def test_a_group_without_a_limit_leaves_all(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    3000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("5\n")
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("inactive_file 0\n")
    assert free_bytes(CPU, root=tmp_path) == 3000 * 1024
