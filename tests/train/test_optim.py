"""Optimizers: each trains, has its state saved and loaded bit for bit, and does what its paper says."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from swift.config.commands import SftConfig
from swift.config.optim import BITSANDBYTES, OPTIMIZERS, REFUSED_OPTIMIZERS
from swift.config.options import build
from swift.errors import CheckpointError, ConfigError, MachineError
from swift.parallel.single import Single
from swift.train.galore import GaLoreAdamW, project, project_back, projectors
from swift.train.liger import check_device
from swift.train.optim import hidden_matrices, make_optimizer, make_schedule

IDS = torch.arange(64).reshape(4, 16) * 5 % 96


class Tiny(nn.Module):
    """An embedding, a hidden layer of more than 4096 weights (below, bitsandbytes keeps 32 bits), a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.hidden = nn.Linear(64, 96)
        self.back = nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 96, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.norm(x + self.back(F.gelu(self.hidden(x)))))


def config(**options):
    given = {"model": "m", "dataset": "d", "learning_rate": 1e-2, "tuner_type": "full", "weight_decay": 0.01, "galore_rank": 8}
    if options.get("optim") != "galore_adamw" and not options.get("use_galore") and options.get("optimizer") != "galore":
        del given["galore_rank"]
    return build(SftConfig, ("argument", given | options))


def start(**options):
    torch.manual_seed(0)
    model = Tiny()
    strategy = Single(torch.device("cpu"))
    strategy.prepare(model, lambda model: make_optimizer(model, config(**options)))
    return model, strategy


def train(model, strategy, steps):
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        strategy.backward(loss)
        strategy.clip_and_step(1.0)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(optim):
    losses = train(*start(optim=optim, learning_rate={"sgd": 1.0}.get(optim, 3e-3)), 20)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(optim, tmp_path):
    whole, part = start(optim=optim), start(optim=optim)
    train(*whole, 6)
    train(*part, 3)
    part[1].save(tmp_path / "optimizer.pt")
    resumed = start(optim=optim)
    resumed[0].load_state_dict(part[0].state_dict())
    resumed[1].load(tmp_path / "optimizer.pt")
    train(*resumed, 3)
    wanted, found = whole[0].state_dict(), resumed[0].state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_follows_a_schedule(optim):
    chosen = config(optim=optim, lr_scheduler_type="linear")
    optimizer = make_optimizer(Tiny(), chosen)
    schedule = make_schedule(optimizer, chosen, 4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert all(group == pytest.approx([rate] * len(group)) for group, rate in zip(rates, (1e-2, 7.5e-3, 5e-3, 2.5e-3), strict=True))


@pytest.mark.parametrize("optim", BITSANDBYTES)
def test_state_has_the_bits_that_the_name_says(optim):
    model, strategy = start(optim=optim)
    train(model, strategy, 1)
    dtype = strategy.optimizer.state[model.hidden.weight]["state1"].dtype
    assert dtype == (torch.uint8 if optim.endswith("_8bit") else torch.float32)


def test_embeddings_keep_32_bits():
    model, strategy = start(optim="adamw_8bit")
    train(model, strategy, 1)
    state = strategy.optimizer.state
    assert {name for name, parameter in model.named_parameters() if state[parameter]["state1"].dtype == torch.uint8} == {
        "hidden.weight", "back.weight", "head.weight"
    }  # fmt: skip


def test_state_of_another_optimizer_is_refused(tmp_path):
    start(optim="adamw_torch")[1].save(tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        start(optim="muon")[1].load(tmp_path / "optimizer.pt")


def test_a_paged_optimizer_is_the_plain_one_on_a_cpu_and_says_so(capsys):
    paged, whole = start(optim="paged_adamw_8bit"), start(optim="adamw_8bit")
    assert "without paging" in capsys.readouterr().err
    assert train(*paged, 4) == train(*whole, 4)


def test_8_bit_state_stays_near_32_bits():
    whole, rounded = train(*start(optim="adamw_torch"), 20), train(*start(optim="adamw_8bit"), 20)
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(whole), rtol=5e-2, atol=2e-2)


def test_settings_reach_bitsandbytes():
    optimizer = make_optimizer(Tiny(), config(optim="lion_32bit", adam_beta1=0.8, adam_beta2=0.7))
    assert isinstance(optimizer, bitsandbytes.optim.Lion)
    assert tuple(optimizer.defaults["betas"]) == (0.8, 0.7)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model, strategy = start(optimizer="muon")
    assert hidden_matrices(model) == {"hidden.weight", "back.weight"}
    train(model, strategy, 1)
    state = strategy.optimizer.state
    assert {name for name, parameter in model.named_parameters() if "momentum_buffer" in state[parameter]} == hidden_matrices(model)
    assert {name for name, parameter in model.named_parameters() if "exp_avg" in state[parameter]} == {
        "embedding.weight", "hidden.bias", "norm.weight", "norm.bias", "head.weight"
    }  # fmt: skip


def test_the_first_step_of_muon_is_that_of_torch():
    model, strategy = start(optim="muon", weight_decay=0.1)
    alone = copy.deepcopy(model)
    train(model, strategy, 1)
    optimizer = torch.optim.Muon([alone.hidden.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    F.cross_entropy(alone(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
    optimizer.step()
    assert torch.equal(model.hidden.weight, alone.hidden.weight)


def test_galore_without_projected_groups_is_adamw():
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(6, 4))
    b = nn.Parameter(a.detach().clone())
    ours = GaLoreAdamW([{"params": [a], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    torchs = torch.optim.AdamW([b], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        a.grad = torch.randn(6, 4)
        b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_first_step_of_galore_by_hand():
    # G = 3 u v^T with u = (1, 0), v = (0, 1, 0): its only singular vectors. With rank 1 the projected gradient is u^T G = +-(0, 3, 0)
    # or G v = +-(3, 0), AdamW's first update of it is its sign, and the update projected back is u v^T. Decay 0.5, rate 0.1, scale 2.
    weight = nn.Parameter(torch.ones(2, 3))
    group = {"params": [weight], "weight_decay": 0.5, "rank": 1, "update_proj_gap": 10, "scale": 2.0, "proj_type": "std"}
    weight.grad = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    GaLoreAdamW([group], lr=0.1, betas=(0.9, 0.95), eps=1e-12).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.95, 0.75, 0.95], [0.95, 0.95, 0.95]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "proj_type", "sides"),
    [
        ((6, 4), "std", "right"), ((4, 6), "std", "left"), ((6, 4), "reverse_std", "left"), ((4, 6), "reverse_std", "right"),
        ((4, 6), "right", "right"), ((6, 4), "left", "left"), ((6, 4), "full", "left right"),
    ],
)  # fmt: skip
def test_galore_projects_the_side_that_its_type_says(shape, proj_type, sides):
    torch.manual_seed(0)
    gradient = torch.randn(*shape)
    left, right = projectors(gradient, 2, proj_type)
    assert " ".join(name for name, side in (("left", left), ("right", right)) if side is not None) == sides
    U, S, Vh = torch.linalg.svd(gradient)
    best = U[:, :2] * S[:2] @ Vh[:2]  # Eckart and Young
    torch.testing.assert_close(project_back(project(gradient, left, right), left, right), best)


def test_the_projection_is_made_anew_after_the_gap():
    model, strategy = start(use_galore=True, galore_update_proj_gap=2)
    seen = []
    for _ in range(4):
        train(model, strategy, 1)
        state = strategy.optimizer.state[model.hidden.weight]
        seen.append(state["right"])
        assert state["exp_avg"].shape == (96, 8)
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]


@pytest.mark.parametrize(
    ("options", "projected"),
    [
        ({}, {"hidden.weight", "back.weight"}),
        ({"galore_target_modules": ["hid"]}, {"hidden.weight"}),
        ({"galore_with_embedding": True}, {"hidden.weight", "back.weight", "embedding.weight", "head.weight"}),
    ],
)
def test_galore_projects_linear_layers(options, projected):
    model = Tiny()
    optimizer = make_optimizer(model, config(use_galore=True, **options))
    inside = {id(parameter) for group in optimizer.param_groups if "rank" in group for parameter in group["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in inside} == projected


def test_galore_without_a_layer_of_that_name_is_refused():
    with pytest.raises(ConfigError, match="--galore_target_modules query names no linear layer"):
        make_optimizer(Tiny(), config(use_galore=True, galore_target_modules=["query"]))


@pytest.mark.parametrize(
    ("options", "optim"),
    [({"use_galore": True}, "galore_adamw"), ({"optimizer": "galore"}, "galore_adamw"), ({"optimizer": "muon"}, "muon")],
)
def test_other_ways_to_say_it(options, optim):
    assert config(**options).optim == optim


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "sgd", "adam_beta1": 0.5}, "--adam_beta1 has no effect with --optim sgd"),
        ({"optim": "lion_8bit", "adam_epsilon": 0.5}, "--adam_epsilon has no effect with --optim lion_8bit"),
        ({"optim": "rmsprop_bnb", "adam_beta2": 0.5}, "--adam_beta2 has no effect with --optim rmsprop_bnb"),
        ({"optimizer": "muon", "optim": "sgd"}, "--optimizer muon and --optim sgd contradict each other"),
        ({"use_galore": True, "optimizer": "muon"}, "--use_galore and --optimizer muon contradict each other"),
        ({"use_galore": True, "tuner_type": "lora"}, "--use_galore has no effect with --tuner_type lora"),
        ({"optim": "galore_adamw", "tuner_type": "lora"}, "GaLore is for --tuner_type full"),
        ({"galore_scale": 2.0}, "--galore_scale has no effect without --use_galore true"),
        ({"galore_quantization": True}, "option --galore_quantization is not available"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(("name", "reason"), REFUSED_OPTIMIZERS.items())
def test_an_optimizer_of_hugging_face_that_is_not_built_says_why(name, reason):
    with pytest.raises(ConfigError) as caught:
        config(optim=name)
    assert caught.value.message == f"--optim {name} is not available: {reason}"


def test_every_optimizer_of_hugging_face_is_built_or_says_why():
    from transformers.training_args import OptimizerNames

    assert {each.value for each in OptimizerNames} - set(OPTIMIZERS) - set(REFUSED_OPTIMIZERS) == set()


def test_liger_on_a_cpu_is_one_line_with_a_way_out():
    with pytest.raises(MachineError, match="--use_liger_kernel needs a GPU") as caught:
        check_device(torch.device("cpu"))
    assert caught.value.hint == "remove --use_liger_kernel"
