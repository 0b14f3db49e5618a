import importlib
import math
import warnings

import pytest
import torch
from torch import distributed as dist

from swift.model.policy import Policy
from swift.objectives.sft import Sft
from swift.parallel.megatron.model import Layout
from swift.parallel.world import join
from tests.families import build
from tests.ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages for CUDA that it looks for, as it is imported
    pytest.importorskip("megatron.core.models.gpt.gpt_layer_specs")
    importlib.import_module("megatron.core.pipeline_parallel")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multi,
]
EXAMPLES = [{"input_ids": [(7 * row + 3 * at) % 127 + 1 for at in range(5 + row)], "labels": None} for row in range(4)]


def batches():
    from swift.data.collate import padded_batch

    rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in EXAMPLES]
    return [padded_batch(rows[:2], pad_token_id=0), padded_batch(rows[2:], pad_token_id=0)]


def alone(family, options):
    """(loss, gradients by name) of transformers in one process."""
    model, objective = build(family, **options), Sft()
    policy = Policy(model)
    count = sum(objective.count(batch) for batch in batches())
    loss = sum(objective.loss_sum(policy, None, batch)[0] for batch in batches()) / count
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


def spread(family, layout, options):
    """(loss, gradients of the main process by Hugging Face's names, norm, numbers that this process has)."""
    from swift.parallel.megatron.strategy import Megatron

    warnings.simplefilter("ignore")  # of its own deprecated parts, and of torch's that it calls
    with join(torch.device("cpu")):
        strategy = Megatron(torch.device("cpu"), layout=layout, divisible_by=8)
        model, _ = strategy.prepare(build(family, **options), lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
        policy, objective = strategy.policy(model), Sft()
        ranks = dist.get_world_size() // (layout.tp * layout.pp)
        mine = batches()[dist.get_rank() // layout.tp % ranks :: ranks] if ranks > 1 else batches()
        (count,) = strategy.add([sum(objective.count(batch) for batch in mine)])
        sums = strategy.accumulate(policy, objective, None, mine, count)
        (loss,) = strategy.add([float(sums.loss)])
        from swift.parallel.megatron.gradients import sum_gradients

        sum_gradients(model, strategy.groups)
        gradients = dict(strategy.bridge.gather(lambda parameter: parameter.grad))
        weights = strategy.whole(model)
        return loss / count, gradients, weights, sum(parameter.numel() for parameter in model.parameters())


CASES = [
    ("llama", 2, Layout(tp=2), {}),
    ("llama", 2, Layout(pp=2), {"tie_word_embeddings": True}),
    ("qwen2", 4, Layout(tp=2, pp=2), {}),
    ("qwen3", 4, Layout(tp=2), {}),
    ("llama", 2, Layout(pp=2, vpp=2), {"num_hidden_layers": 4}),
    ("mixtral", 2, Layout(ep=2), {}),
]


@pytest.mark.parametrize(("family", "size", "layout", "options"), CASES)
def test_megatron_has_the_loss_and_the_gradients_of_one_process(family, size, layout, options):
    wanted_loss, wanted = alone(family, options)
    results = run_ranks(size, spread, family, layout, options)
    assert all(math.isclose(loss, wanted_loss, rel_tol=1e-5) for loss, *_ in results)
    gradients, weights = results[0][1:3]
    assert set(gradients) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    original = build(family, **options).state_dict()
    assert all(torch.equal(weight, original[name]) for name, weight in weights.items())
