"""A pipeline computes what one process does: loss, metrics, every gradient and their norm, from parameters that are elsewhere."""

import copy
import functools
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from swift.config.parallel import ParallelConfig
from swift.data.collate import flat_batches, padded_batch
from swift.errors import SwiftError
from swift.model.attention import use_packed_attention
from swift.model.policy import Policy
from swift.objectives.sft import Sft
from swift.parallel.base import accumulate
from swift.parallel.gradients import total_norm
from swift.parallel.mesh import Mesh, Sizes
from swift.parallel.pipeline.costs import Costs
from swift.parallel.pipeline.run import without_root
from swift.parallel.pipeline.split import split
from swift.parallel.single import Single
from swift.parallel.spread import Spread
from swift.parallel.world import World, join
from swift.train.activations import checkpoint_activations
from swift.train.reference import Frozen
from tests.families import build
from tests.parallel.test_ranks import train, weights
from tests.ranks import run_ranks
from tests.tiny import make_model

pytestmark = pytest.mark.multi
CPU = torch.device("cpu")
TOLERANCE = 1e-5


def examples(count: int, *, prefix: int = 0):
    """Rows of unequal length, all with the same first ``prefix`` tokens; the first half of each is not trained on."""
    random = torch.Generator().manual_seed(1)
    shared = torch.randint(1, 128, (prefix,), generator=random)
    for number in range(count):
        ids = torch.cat([shared, torch.randint(1, 128, (5 + 3 * (number % 4),), generator=random)])
        labels = ids.clone()
        labels[: prefix + 3] = -100
        yield {"input_ids": ids.tolist(), "labels": labels.tolist()}


def batches(kind: str, count: int):
    """Passes of 2 rows: flat with a shared beginning or padded, no two in a row of the same width."""
    rows = list(examples(2 * count, prefix=20 if kind == "flat" else 0))
    passes = [rows[at : at + 2] for at in range(0, len(rows), 2)]
    return flat_batches(passes) if kind == "flat" else [padded_batch(part, pad_token_id=0) for part in passes]


@functools.cache
def model_of(family: str, *, layers: int, tied: bool, tuner: str):
    """Made before processes are forked, which then need not import what it takes."""
    model = build(family, num_hidden_layers=layers, tie_word_embeddings=tied)
    use_packed_attention(model)
    if tuner == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model.train()


@pytest.fixture(scope="module", autouse=True)
def made():
    for tied in (True, False):
        model_of("llama", layers=4, tied=tied, tuner="full")
    for family, layers, tuner in (("llama", 4, "lora"), ("llama", 8, "full"), ("qwen3", 4, "full")):
        one_process(model_of(family, layers=layers, tied=True, tuner=tuner), batches("flat", 2))[0]
        model_of(family, layers=layers, tied=True, tuner=tuner).zero_grad()


def one_process(model, parts, dtype=None):
    """(sums, gradients by name, norm) of the whole model."""
    strategy = Single(CPU, autocast_dtype=dtype)
    count = sum(Sft().count(batch) for batch in parts)
    sums = accumulate(strategy, Policy(model), Sft(), None, parts, count, CPU)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.grad is not None}
    norm = total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None], CPU)
    return sums, gradients, norm, count


def even(layers: int) -> Costs:
    """Equal blocks and nothing else: the stages are known."""
    return Costs([1.0] * layers, 0.0, 0.0)


def differs(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def check(mesh, *, family="llama", layers=4, tied=False, tuner="full", kind="flat", schedule="1f1b", virtual=1, count=5, is_measured=False):
    """One step of a pipeline against one process; what this rank holds and had alive."""
    whole = copy.deepcopy(model_of(family, layers=layers, tied=tied, tuner=tuner))
    model = copy.deepcopy(whole)
    parts = batches(kind, count)
    sums, gradients, norm, number = one_process(whole, parts)
    pipeline = split(
        model,
        mesh.group("pp"),
        CPU,
        tokens=16,
        is_flat=kind == "flat",
        schedule=schedule,
        virtual=virtual,
        costs=None if is_measured else even(layers),
    )
    policy = Policy(model)
    alive = Alive(pipeline.stages.local_blocks[0])
    found = pipeline.accumulate(Single(CPU), policy, Sft(), parts, number)
    pipeline.add_shared_gradients()
    assert float(found.loss) == pytest.approx(float(sums.loss), rel=TOLERANCE)
    assert found.metrics == {"token_acc": float(sums.metrics["token_acc"])}
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert own.keys() <= gradients.keys()
    for name, gradient in own.items():
        assert differs(gradient, gradients[name]) < TOLERANCE, name
    counted = [gradient for name, gradient in own.items() if pipeline.is_counted(name)]
    assert total_norm(counted, CPU, groups=[mesh.group("pp")]) == pytest.approx(norm, rel=TOLERANCE)
    evaluated = pipeline.evaluate(Single(CPU), policy, Sft(), parts[:3])
    with torch.no_grad():
        expected = [float(Sft().loss_sum(Policy(whole), None, without_root(batch))[0]) for batch in parts[:3]]
    assert float(evaluated.loss) == pytest.approx(sum(expected), rel=TOLERANCE)
    state = pipeline.whole(dict(model.state_dict()))
    if mesh.rank("pp") == 0:
        assert state.keys() == whole.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    return {
        "trained": sorted(own),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "whole": sum(parameter.numel() for parameter in whole.parameters()),
        "alive": alive.most,
        "peak_alive": pipeline.peak_alive,
        "gradients": sorted(gradients),
    }


class Token:
    """Lives as long as the graph that it is part of."""


class Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, token):
        ctx.token = token
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Alive:
    """How many graphs through a block exist at once, at most."""

    def __init__(self, block) -> None:
        self.most = 0
        self.tokens: list[weakref.ref] = []
        block.register_forward_hook(self)

    def __call__(self, block, args, output):
        if not torch.is_grad_enabled():
            return None
        token = Token()
        self.tokens = [each for each in self.tokens if each() is not None] + [weakref.ref(token)]
        self.most = max(self.most, len(self.tokens))
        return Mark.apply(output, token)


def _in(sizes: Sizes, function, *arguments):
    with join(CPU):
        return function(Mesh(sizes, "cpu"), *arguments)


def sizes(model) -> tuple[int, int, int]:
    """Numbers of the embedding, of one block, of the last norm."""
    decoder = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    parts = (decoder.embed_tokens, decoder.layers[0], decoder.norm)
    return tuple(sum(parameter.numel() for parameter in part.parameters()) for part in parts)


def second(mesh):
    """How many numbers of a model that is compared with this process has, and what the process with the loss gets of it."""
    whole, other = (copy.deepcopy(model_of("qwen3", layers=4, tied=True, tuner="full")) for _ in range(2))
    cut = functools.partial(split, group=mesh.group("pp"), device=CPU, tokens=16, is_flat=True, costs=even(4))
    strategy, parts = Spread(World(), mesh, CPU, shards=False, split=cut), batches("flat", 3)
    own, _ = strategy.prepare(copy.deepcopy(whole), lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    reference = Frozen(Policy(strategy.place_second(other)))
    found = strategy._with_reference(reference, Policy(own), parts)
    assert strategy._second.peak_alive == 0
    with torch.no_grad():
        wanted = [Policy(whole.eval()).logps(without_root(batch)) for batch in parts]
    if mesh.rank("pp") == 1:
        for batch, logps in zip(found, wanted, strict=True):
            assert not batch.reference_logps.requires_grad
            assert torch.allclose(batch.reference_logps, logps, rtol=TOLERANCE)
    return {"parameters": sum(parameter.numel() for parameter in other.parameters())}


def _two(mesh):
    return {
        "1f1b": check(mesh, tied=True),
        "gpipe": check(mesh, schedule="gpipe", kind="padded"),
        "interleaved": check(mesh, family="qwen3", schedule="interleaved", virtual=2, tied=True, kind="padded"),
        "lora": check(mesh, tuner="lora", tied=True),
        "second": second(mesh),
    }


def test_two_processes_with_half_of_the_blocks_each_train_as_one():
    first, last = run_ranks(2, _in, Sizes(pp=2), _two)
    for name, options in (("1f1b", {}), ("gpipe", {}), ("interleaved", {"family": "qwen3"}), ("lora", {"tuner": "lora"})):
        embedding, block, norm = sizes(model_of(**{"family": "llama", "layers": 4, "tied": True, "tuner": "full"} | options))
        assert first[name]["parameters"] == embedding + 2 * block, name
        assert last[name]["parameters"] == 2 * block + norm + embedding, name  # the head is as large as the embedding
        names = {*first[name]["trained"], *last[name]["trained"]}
        assert names == set(first[name]["gradients"]), name
        tied = {"lm_head.weight", "model.embed_tokens.weight"} & set(last[name]["trained"])
        assert tied == (set() if name == "lora" else {"lm_head.weight"}), name
    assert "model.layers.2.mlp.up_proj.weight" in first["interleaved"]["trained"]  # blocks 0 and 2
    assert (first["1f1b"]["alive"], last["1f1b"]["alive"]) == (2, 1)
    assert (first["gpipe"]["alive"], last["gpipe"]["alive"]) == (5, 5)
    for rank in (first, last):
        assert rank["second"]["parameters"] == rank["interleaved"]["parameters"]  # half of the same model


def product(mesh, *, shards: bool, schedule="1f1b", virtual=1, tuner="full", tied=True, checkpointing=False, dtype=None):
    """A step of stages whose copies, or parts, see different rows, against one process."""
    whole = copy.deepcopy(model_of("llama", layers=4, tied=tied, tuner=tuner))
    model = copy.deepcopy(whole)
    parts = batches("padded", 6)
    sums, gradients, norm, count = one_process(whole, parts, dtype)
    cut = functools.partial(
        split, group=mesh.group("pp"), device=CPU, tokens=16, is_flat=False, schedule=schedule, virtual=virtual, costs=even(4)
    )
    strategy = Spread(World(), mesh, CPU, shards=shards, split=cut, autocast_dtype=dtype)
    model, optimizer = strategy.prepare(model, lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    with strategy.autocast():
        policy = Policy(model, call=strategy.call)
    if checkpointing:
        checkpoint_activations(model, None)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(_whole_gradients(model)))
    mine = parts[mesh.rank("dp") :: 2]
    assert strategy.add([sum(Sft().count(batch) for batch in mine)]) == [count]
    found = strategy.accumulate(policy, Sft(), None, mine, count)
    # Sharded weights travel in bfloat16, and so do their embeddings; in one process these are float32.
    tolerance, of_gradients = (0.02, 0.1) if dtype is not None and shards else (TOLERANCE, TOLERANCE)
    assert strategy.add([float(found.loss)]) == pytest.approx([float(sums.loss)], rel=tolerance)
    assert strategy.clip_and_step(0.0)[0] == pytest.approx(norm, rel=tolerance)
    for name, gradient in seen.items():
        assert differs(gradient, gradients[name]) < of_gradients, name
    state = strategy.whole(model)
    if mesh.rank("pp") == mesh.rank("dp") == 0:
        assert state.keys() == whole.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    else:
        assert state == {}
    return {"weights": strategy.local_bytes()["weights"], "trained": sorted(seen)}


def _whole_gradients(model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone() for name, gradient in gradients.items()}


def _products(mesh):
    return {
        "copies": product(mesh, shards=False, tuner="lora", dtype=torch.bfloat16),
        "parts": product(mesh, shards=True, schedule="interleaved", virtual=2, checkpointing=True),
        "bits": product(mesh, shards=True, dtype=torch.bfloat16),
    }


def test_stages_whose_copies_or_parts_see_different_rows():
    found = run_ranks(4, _in, Sizes(pp=2, dp=2), _products)
    embedding, block, norm = sizes(model_of("llama", layers=4, tied=True, tuner="full"))
    assert [each["parts"]["weights"] for each in found] == [2 * (embedding + 2 * block)] * 2 + [2 * (embedding + 2 * block + norm)] * 2
    embedding, block, norm = sizes(model_of("llama", layers=4, tied=True, tuner="lora"))
    assert [each["copies"]["weights"] for each in found] == [4 * (embedding + 2 * block)] * 2 + [4 * (embedding + 2 * block + norm)] * 2


def _four(mesh):
    return {
        "1f1b": check(mesh, family="qwen3", tied=True, count=9),
        "interleaved": check(mesh, layers=8, schedule="interleaved", virtual=2, tied=True, count=6),
        "few": check(mesh, count=2, is_measured=True),
    }


def test_four_processes_keep_no_more_micro_batches_than_there_are_stages():
    found = run_ranks(4, _in, Sizes(pp=4), _four)
    assert [each["1f1b"]["alive"] for each in found] == [4, 3, 2, 1]
    assert [each["few"]["alive"] for each in found] == [2, 2, 2, 1]
    embedding, block, norm = sizes(model_of("qwen3", layers=4, tied=True, tuner="full"))
    assert [each["1f1b"]["parameters"] for each in found] == [embedding + block, block, block, block + norm + embedding]


class Twice:
    """An objective that a pipeline cannot run: it asks for each batch twice."""

    layout, needs_reference = "sft", False
    count = Sft.count

    def loss_sum(self, policy, reference, batch):
        policy.cross_entropy(batch)
        return Sft().loss_sum(policy, reference, batch)


class Calls(TorchDispatchMode):
    """The names of what is called of torch.distributed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d."):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def _refused(mesh):
    model = copy.deepcopy(model_of("llama", layers=4, tied=True, tuner="full"))
    parts, problems = batches("padded", 2), []

    def told(function, *arguments, **options):
        with pytest.raises(SwiftError) as problem:
            function(*arguments, **options)
        problems.append(str(problem.value))

    cut = functools.partial(split, model, mesh.group("pp"), CPU, tokens=16, is_flat=False)
    told(cut, virtual=3)
    cut_other = functools.partial(split, group=mesh.group("pp"), device=CPU, tokens=16, is_flat=False)
    told(Spread(World(), mesh, CPU, shards=False, split=cut_other).place_second, build("llama", num_hidden_layers=1))
    with Calls() as calls:
        pipeline = cut(costs=even(4))
    # Before two processes of a group speak to each other alone, all of it have met, as NCCL asks for.
    assert [name.partition(".default")[0] for name in calls.names] == ["c10d.allreduce_"]
    run = functools.partial(pipeline.accumulate, Single(CPU))
    told(run, Policy(model, router_aux_loss_coef=0.1), Sft(), parts, 1.0)
    if mesh.rank("pp") == 1:
        told(run, Policy(model), Twice(), parts[:1], 1.0)
    else:  # has nobody left to speak to
        with pytest.raises(RuntimeError, match=r"closed by peer|Connection"):
            run(Policy(model), Twice(), parts[:1], 1.0)
    return problems


def test_what_a_pipeline_cannot_do_is_told_in_one_line():
    first, last = run_ranks(2, _in, Sizes(pp=2), _refused)
    assert first == last[:3]
    assert all("\n" not in problem for problem in last)
    stages, reference, router, twice = last
    assert "6 pipeline stages are more than the 4 blocks of this model" in stages
    assert "the reference: 2 pipeline stages are more than the 1 blocks of this model" in reference
    assert "--router_aux_loss_coef is computed over all blocks" in router
    assert "runs the model more than once for a batch" in twice


def _train(arguments):
    model, rows, out, options = arguments
    return train(model, rows, out, **options)


def test_a_run_in_stages_ends_with_the_weights_of_a_run_in_one_process(rows, tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=4)
    options = {"tuner_type": "lora", "lora_dropout": 0.0, "padding_free": True, "gradient_accumulation_steps": 4}
    one = train(model, rows, tmp_path / "one", **options)
    stages = {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved", "virtual_pipeline_model_parallel_size": 2}
    for result in run_ranks(2, _train, (model, rows, tmp_path / "stages", {**options, **stages})):
        for found, wanted in zip(result["lines"], one["lines"], strict=True):
            for key in {"loss", "grad_norm", "eval_loss", "token_acc"} & set(wanted):
                assert found[key] == pytest.approx(wanted[key], rel=2e-5), key
    found, wanted = weights(tmp_path / "stages", 2), weights(tmp_path / "one", 2)
    assert found.keys() == wanted.keys()
    assert max(differs(found[name], wanted[name]) for name in wanted) < 2e-4


def test_interleaving_without_several_runs_of_blocks_is_refused():
    with pytest.raises(SwiftError, match="--pipeline_schedule interleaved needs several runs of blocks in each process"):
        ParallelConfig(pipeline_model_parallel_size=2, pipeline_schedule="interleaved").check()
