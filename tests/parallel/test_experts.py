"""Experts in parts, whose tokens come and go, are the experts of one process."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from swift.config.commands import SftConfig
from swift.data.collate import flat_batch
from swift.errors import ConfigError
from swift.model.policy import Policy, packing_fault
from swift.objectives.sft import Sft
from swift.parallel.experts import expert_meshes, expert_parameters, use_expert_parallel
from swift.parallel.mesh import Mesh, sizes_of
from swift.parallel.pipeline.costs import Costs
from swift.parallel.pipeline.split import split as cut_in_stages
from swift.parallel.sequence import make_share, split, use_sequence_parallel
from swift.parallel.single import Single
from swift.parallel.spread import Spread
from swift.parallel.world import join
from swift.train.optim import parameter_groups
from tests.families import build
from tests.ranks import run_ranks

FAMILIES = {"qwen3_moe": "grouped_mm", "mixtral": "eager", "gpt_oss": "grouped_mm"}
TOLERANCE = 1e-5
CPU = torch.device("cpu")


def rows(count):
    """As many documents, each all trained."""
    generator = torch.Generator().manual_seed(7)
    texts = [torch.randint(3, 128, (9 + 2 * number,), generator=generator).tolist() for number in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in texts]


def deviation(whole, part, whole_batch, batch, same_experts):
    """The largest one of loss and gradients; those of experts are added up over ``same_experts`` alone."""
    wanted = Policy(whole).cross_entropy(whole_batch)[0]
    wanted.backward()
    wanted = wanted.detach()
    loss = Policy(part).cross_entropy(batch)[0]
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    worst = float((total - wanted).abs() / wanted)
    experts = expert_parameters(part)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    rounding = 1e-2 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in part.named_parameters():
        if (found := parameter.grad) is None:
            assert name not in gradients
            continue
        if name in experts:
            dist.all_reduce(found.to_local(), group=same_experts.get_group())
            found = found.full_tensor()
        else:
            dist.all_reduce(found)
        size = max(float(gradients[name].abs().max()), rounding)
        worst = max(worst, float((found - gradients[name]).abs().max()) / size)
    return worst


def pair(family, implementation="grouped_mm", **options):
    """The same model twice."""
    models = [build(family, **options) for _ in range(2)]
    for model in models:
        model.set_experts_implementation(implementation)
        assert packing_fault(model) is None
    return models


def meshes(size):
    data = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
    return expert_meshes(data, size)


def refusal(function, *arguments):
    try:
        function(*arguments)
    except ConfigError as problem:
        return problem.message
    raise AssertionError("nothing was refused")


def on_two():
    with join(torch.device("cpu")) as world:
        same, expert = meshes(2)
        found = {}
        for family, implementation in FAMILIES.items():
            whole, part = pair(family, implementation)
            use_expert_parallel(part, expert)
            batches = flat_batch(rows(2)), flat_batch(rows(2)[world.rank : world.rank + 1])
            found[family] = deviation(whole, part, *batches, same), shapes(whole, part)
        found["alone"] = all_to_one(world, same, expert)
        found["tuned"] = tuned(world, same, expert)
        found["sequence"] = in_parts(same, expert)
        found["refused"] = {
            "none": refusal(use_expert_parallel, build("llama"), expert),
            "three": refusal(use_expert_parallel, build("mixtral", num_local_experts=3), expert),
            "tuner": refusal(use_expert_parallel, with_tuned_experts(), expert),
            "processes": refusal(meshes, 3),
        }
        return found


def shapes(whole, part):
    """{name: (shape in one process, shape of what this one holds)} of the experts of the first layer."""
    wholes = dict(whole.named_parameters())
    own = {name: parameter for name, parameter in part.named_parameters() if name in expert_parameters(part)}
    assert {tuple(parameter.shape) for parameter in own.values()} == {tuple(wholes[name].shape) for name in own}
    return {name: (tuple(wholes[name].shape), tuple(own[name].to_local().shape)) for name in own if ".layers.0." in name}


def all_to_one(world, same, expert):
    """No token goes to the second process's experts: it takes part all the same, and their gradients are zeros."""
    whole, part = pair("qwen3_moe", num_experts_per_tok=1)
    for layer in (*whole.model.layers, *part.model.layers):
        layer.mlp.gate.register_forward_hook(lambda *call: (*call[2][:2], torch.zeros_like(call[2][2])))
    use_expert_parallel(part, expert)
    batches = flat_batch(rows(2)), flat_batch(rows(2)[world.rank : world.rank + 1])
    worst = deviation(whole, part, *batches, same)
    return worst, float(part.model.layers[0].mlp.experts.down_proj.grad.to_local().abs().sum())


def tuned(world, same, expert):
    """LoRA of attention; experts are frozen, and gradients go through them."""
    models = [with_adapter(model) for model in pair("qwen3_moe")]
    use_expert_parallel(models[1], expert)
    batches = flat_batch(rows(2)), flat_batch(rows(2)[world.rank : world.rank + 1])
    return deviation(*models, *batches, same)


def with_adapter(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()


def in_parts(same, expert):
    """One sequence shared by the processes that share the experts."""
    whole, part = pair("qwen3_moe")
    share = make_share(part.config, dist.group.WORLD, "ring")
    use_sequence_parallel(part, share)
    use_expert_parallel(part, expert)
    batch = flat_batch(rows(3))
    return deviation(whole, part, batch, split(batch, share), same)


def with_tuned_experts():
    return get_peft_model(build("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]))


def on_four():
    with join(torch.device("cpu")) as world:
        same, expert = meshes(2)
        whole, part = pair("qwen3_moe")
        use_expert_parallel(part, expert)
        batches = flat_batch(rows(4)), flat_batch(rows(4)[world.rank : world.rank + 1])
        worst = deviation(whole, part, *batches, same)
        several = (
            in_shards(world, "qwen3_moe"),
            in_shards(world, "mixtral", pp=2),
            in_shards(world, "gpt_oss", cp=2, cpu_offload=True, num_local_experts=2, num_experts_per_tok=2),
        )
        return worst, dist.get_process_group_ranks(expert.get_group()), shapes(whole, part), several


def in_shards(world, family, *, cp=1, pp=1, cpu_offload=False, **options):
    """A step of FSDP2 with experts in two processes: (largest deviation from one process, bytes held here, shapes of the first experts)."""
    mesh = Mesh(sizes_of(world.size, cp=cp, pp=pp), "cpu")
    whole, part = pair(family, **options)
    batches = [flat_batch([row]) for row in rows(4)]
    coefficient = {"router_aux_loss_coef": 0.02 if pp == 1 else 0.0}
    one, shares = Single(CPU), {"shards": True, "experts": 2, "cpu_offload": cpu_offload}
    several = Spread(world, mesh, CPU, sequence_kind="ring" if cp > 1 else None, split=in_stages(mesh), **shares)
    # In groups as training has them: the optimizer steps a group at once.
    config = SftConfig(optim="adamw_torch", learning_rate=1.0)
    make = lambda model: torch.optim.SGD([{**group, "lr": 0.5} for group in parameter_groups(model, config, None)], foreach=True)  # noqa: E731
    norms, losses, gradients = [], [], []
    for strategy, model, mine in ((one, whole, batches), (several, part, batches[mesh.rank("dp") :: mesh.size("dp")])):
        model, _ = strategy.prepare(model, make)
        found = strategy.accumulate(Policy(model, call=strategy.call, **coefficient), Sft(), None, mine, 10.0)
        losses.append(strategy.add([float(found.loss)])[0])
        named = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients.append({name: each.full_tensor() if isinstance(each, DTensor) else each.clone() for name, each in named.items()})
        norms.append(strategy.clip_and_step(1.0)[0])
    sizes = [max(float(gradients[0][name].abs().max()), 1e-2) for name in gradients[1]]
    apart = [float((each - gradients[0][name]).abs().max()) for name, each in gradients[1].items()]
    worst = max(abs(losses[1] / losses[0] - 1), abs(norms[1] / norms[0] - 1), *(a / b for a, b in zip(apart, sizes, strict=True)))
    state = several.whole(part)
    worst = max([worst, *(float((tensor - whole.state_dict()[name]).abs().max()) for name, tensor in state.items())])
    assert bool(state) == world.is_main
    at = f".{mesh.rank('pp')}."
    own = {name: tuple(each.to_local().shape) for name, each in part.named_parameters() if at in name and ".experts." in name}
    share = several.local_bytes()["weights"] / sum(4 * parameter.numel() for parameter in whole.parameters())
    return worst, share, list(own.values())


def in_parts_of_parts(world, family, folder=None, *, shards=False, adapter=False, **axes):
    """Two steps with layers and experts in parts, against one process.

    With ``folder`` the state of the optimizer goes, between the steps, from one process to these, to others that share no
    layer and take the second step too, and back.
    (the largest deviation of losses, norms and weights; share of the weights held here; shapes of the first experts).
    """
    coefficient = {"router_aux_loss_coef": 0.0 if "pp" in axes else 0.02}
    whole, part = [with_adapter(model) for model in pair(family)] if adapter else pair(family)
    every = [flat_batch([row]) for row in rows(8)]
    mesh, one = Mesh(sizes_of(world.size, tp=2, **axes), "cpu"), Single(CPU)
    several = Spread(world, mesh, CPU, shards=shards, experts=2, sequence_kind="ring", split=in_stages(mesh))
    runs = [(one, *one.prepare(whole, adamw)), (several, *several.prepare(part, adamw))]
    worst = 0.0
    for step in range(2):
        if step and folder is not None:
            if world.is_main:
                one.save(folder / "one.pt")
            dist.barrier()
            others = Spread(world, Mesh(sizes_of(world.size), "cpu"), CPU, shards=True, experts=2)
            runs.append((others, *others.prepare(copy.deepcopy(whole), adamw)))
            for strategy, path, onward in ((several, "one", "tensor"), (others, "tensor", "parts"), (several, "parts", "last")):
                strategy.optimizer.state.clear()
                strategy.load(folder / f"{path}.pt")
                strategy.save(folder / f"{onward}.pt")
        results = []
        for strategy, model, _ in runs:
            dp, place = (1, 0) if strategy is one else (strategy.mesh.size("dp"), strategy.mesh.rank("dp"))
            mine = every[4 * step : 4 * step + 4][place::dp]
            found = strategy.accumulate(Policy(model, call=strategy.call, **coefficient), Sft(), None, mine, 10.0)
            results.append((strategy.add([float(found.loss)])[0], strategy.clip_and_step(1.0)[0]))
        worst = max([worst, *(abs(value / wanted - 1) for found in results for value, wanted in zip(found, results[0], strict=True))])
    for strategy, model, _ in runs[1:]:
        state = strategy.whole(model)
        assert bool(state) == world.is_main and (not state or state.keys() == whole.state_dict().keys())
        worst = max([worst, *(float((tensor - whole.state_dict()[name]).abs().max()) for name, tensor in state.items())])
    own = [tuple(each.to_local().shape) for name, each in part.named_parameters() if ".0." in name and ".experts." in name]
    return worst, several.local_bytes()["weights"] / sum(4 * each.numel() for each in whole.parameters()), own


def adamw(model):
    config = SftConfig(optim="adamw_torch", learning_rate=1e-2)
    return torch.optim.AdamW(parameter_groups(model, config, None), eps=1e-3, fused=True)


def in_stages(mesh):
    costs = Costs([1.0, 1.0], 0.0, 0.0)
    cut = functools.partial(cut_in_stages, group=mesh.group("pp"), device=CPU, tokens=16, is_flat=True, costs=costs)
    return cut if mesh.size("pp") > 1 else None


def several_in_parts(cases, folder):
    with join(CPU) as world:
        return [in_parts_of_parts(world, family, folder if is_saved else None, **options) for family, is_saved, options in cases]


@pytest.fixture(scope="module")
def two():
    return run_ranks(2, on_two)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_two_processes_have_the_loss_and_gradients_of_one(two, family):
    for result in two:
        worst, shapes = result[family]
        assert worst < TOLERANCE
        assert shapes
        assert all(own == (whole[0] // 2, *whole[1:]) for whole, own in shapes.values()), shapes


def test_a_process_whose_experts_get_no_token_takes_part(two):
    (first, some), (second, none) = (result["alone"] for result in two)
    assert max(first, second) < TOLERANCE
    assert some > 0
    assert none == 0


def test_a_tuner_of_other_layers_goes_with_experts_in_parts(two):
    assert all(result["tuned"] < TOLERANCE for result in two)


def test_processes_that_share_experts_may_share_a_sequence(two):
    assert all(result["sequence"] < TOLERANCE for result in two)


def test_groups_of_processes_have_the_same_experts():
    results = run_ranks(4, on_four)
    assert [ranks for _, ranks, _, _ in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(worst < TOLERANCE for worst, _, _, _ in results)
    assert {own for _, _, shapes, _ in results for _, own in shapes.values()} == {(2, 32, 16), (2, 32, 32)}
    for *_, (qwen, stages, oss) in results:
        # Each process holds a quarter of everything. One expert for two processes is cut along its second dimension.
        assert qwen == (pytest.approx(0, abs=TOLERANCE), 0.25, [(1, 32, 32), (1, 32, 16)])
        assert stages == (pytest.approx(0, abs=TOLERANCE), pytest.approx(0.25, rel=0.01), [(2, 96, 32), (2, 32, 48)])
        assert oss == (pytest.approx(0, abs=TOLERANCE), pytest.approx(0.25, rel=0.01), [(1, 16, 96), (1, 48), (1, 24, 32), (1, 16)])


def test_experts_may_be_parts_of_split_layers(tmp_path):
    cases = [("mixtral", True, {}), ("qwen3_moe", False, {"adapter": True, "shards": True}), ("gpt_oss", False, {"cp": 2})]
    for full, adapted, in_sequence in run_ranks(4, several_in_parts, cases, tmp_path):
        # Half of the experts, of each half of gate, up and down; with FSDP2 a quarter of all but the norms and the router.
        assert full == (pytest.approx(0, abs=TOLERANCE), pytest.approx(0.33, abs=0.01), [(2, 2, 24, 32), (2, 32, 24)])
        assert adapted == (pytest.approx(0, abs=TOLERANCE), pytest.approx(0.25, abs=0.01), [(2, 2, 8, 32), (2, 32, 8)])
        # The plan of this model splits the embedding alone.
        assert in_sequence[0] < TOLERANCE
        assert in_sequence[2] == [(2, 32, 96), (2, 96), (2, 48, 32), (2, 32)]


@pytest.mark.slow
def test_experts_that_are_parts_of_split_layers_go_with_shards_and_stages():
    """In eight processes two have the same parts of the same experts; with stages, each has parts of its own."""
    cases = [("qwen3_moe", False, {"shards": True}), ("mixtral", False, {"pp": 2, "shards": True})]
    for rank, results in enumerate(run_ranks(8, several_in_parts, cases, None)):
        parts, stages = results
        assert parts == (pytest.approx(0, abs=TOLERANCE), pytest.approx(1 / 8, rel=0.02), [(1, 2, 8, 32), (1, 32, 8)])
        first = [(2, 2, 24, 32), (2, 32, 24)] if rank < 4 else []
        assert stages == (pytest.approx(0, abs=TOLERANCE), pytest.approx(1 / 8, rel=0.02), first)


def test_what_has_no_experts_to_share_is_refused_in_every_process(two):
    for result in two:
        said = result["refused"]
        assert "LlamaForCausalLM has no layers of experts" in said["none"]
        assert "--expert_model_parallel_size 2 does not divide the 3 experts of model.layers.0" in said["three"]
        assert "a tuner of experts" in said["tuner"]
        assert "--expert_model_parallel_size 3 does not divide the 2 processes" in said["processes"]
