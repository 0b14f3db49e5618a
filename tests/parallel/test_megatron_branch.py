"""What stands beside one of Megatron-Core's layers is x A^T B^T, of factors that processes share, and drops what it should."""

import pytest
import torch
from torch import distributed as dist
from torch.nn.functional import linear

from swift.parallel.megatron import package
from swift.parallel.megatron.branch import Branch, Part, Place, _normed
from swift.parallel.megatron.cpu import on_cpu
from swift.parallel.megatron.layout import OPERATIONS, Dims
from swift.parallel.megatron.model import Layout, join_groups
from swift.parallel.world import join
from tests.ranks import run_ranks

pytestmark = pytest.mark.multi
SIZES = {"gate": 8, "none": 4, "up": 8}  # outputs of linear layers that make one; the second has no adapter
RANKS, SCALES = {"gate": 3, "up": 2}, {"gate": 2.0, "up": 0.5}


@pytest.fixture(scope="module")
def two():
    for name in ("parallel_state", "tensor_parallel.mappings", "transformer.moe.moe_utils"):
        package.part(name)  # once, rather than in each process
    return run_ranks(2, every)


def every():
    with join(torch.device("cpu")):
        groups = join_groups(Layout(tp=2), torch.device("cpu"))
        group = groups.get_tensor_model_parallel_group()
        places = {
            (is_row, shares): Place(group, 6 if is_row else 12, is_row, shares) for is_row in (False, True) for shares in (False, True)
        }
        return {key: (difference(place), masks(place)) for key, place in places.items()}


def branch_beside(place, dropout=0.0):
    rows = {name: size if place.is_row else size // 2 for name, size in SIZES.items()}
    parts = [Part(name, rows[name], RANKS.get(name, 0), SCALES.get(name, 1.0)) for name in SIZES]
    return Branch(parts, place, dropout=dropout, order=OPERATIONS["gate_up"], dims=Dims(1, 1, 1, 1, 1))


def difference(place):
    """The largest one from x A^T B^T and its gradients in one process."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    x, weights = torch.randn(4, 1, 12, requires_grad=True), torch.randn(4, 1, sum(SIZES.values()))
    a = {name: torch.randn(size, 12, requires_grad=True) for name, size in RANKS.items()}
    b = {name: torch.randn(SIZES[name], size, requires_grad=True) for name, size in RANKS.items()}
    wanted = [linear(linear(x, a[name]), b[name]) * SCALES[name] if name in a else x.new_zeros(4, 1, size) for name, size in SIZES.items()]
    (torch.cat(wanted, 2) * weights).sum().backward()

    def inputs(tensor):  # those of this process
        return tensor.chunk(2, 2)[rank] if place.is_row else tensor.chunk(2, 0)[rank] if place.shares_tokens else tensor

    def outputs(tensor):
        if place.is_row:
            return tensor.chunk(2, 0)[rank] if place.shares_tokens else tensor
        return torch.cat([part.chunk(2, 2)[rank] for part in tensor.split(list(SIZES.values()), 2)], 2)

    def factor(name, tensor):
        return (
            tensor.chunk(2, 1)[rank]
            if place.is_row and name == "a"
            else tensor.chunk(2, 0)[rank]
            if not place.is_row and name == "b"
            else tensor
        )

    branch, own = branch_beside(place), inputs(x.detach()).clone().requires_grad_()
    with torch.no_grad():
        for name in RANKS:
            branch.lora_A[name].copy_(factor("a", a[name]))
            branch.lora_B[name].copy_(factor("b", b[name]))
    with on_cpu():
        found = branch(own)
        (found * outputs(weights)).sum().backward()
    for parameter in branch.parameters():
        if getattr(parameter, "sequence_parallel", False):  # as sum_gradients does it
            dist.all_reduce(parameter.grad)
    pairs = [(found, outputs(torch.cat(wanted, 2)))]
    pairs += [(branch.lora_A[name].grad, factor("a", a[name].grad)) for name in RANKS]
    pairs += [(branch.lora_B[name].grad, factor("b", b[name].grad)) for name in RANKS]
    input_grad = own.grad
    pairs.append((input_grad, inputs(x.grad)))
    return max((one - other).abs().max().item() for one, other in pairs)


def masks(place):
    """(whether both processes dropped the same, whether a draw from the same state is the same, the share that is left)."""
    branch, ones = branch_beside(place, dropout=0.25), torch.ones(100, 2, 50)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    kept = branch._drop(ones)[0]
    torch.set_rng_state(state)
    both = [torch.empty_like(kept) for _ in range(2)]
    dist.all_gather(both, kept)
    return torch.equal(*both), torch.equal(kept, branch._drop(ones)[0]), kept.mean().item()


@pytest.mark.parametrize("is_row", [False, True])
@pytest.mark.parametrize("shares_tokens", [False, True])
def test_two_processes_compute_the_update_of_one(two, is_row, shares_tokens):
    assert max(result[is_row, shares_tokens][0] for result in two) < 2e-5


@pytest.mark.parametrize("is_row", [False, True])
@pytest.mark.parametrize("shares_tokens", [False, True])
def test_processes_drop_the_same_of_the_same_inputs_alone(two, is_row, shares_tokens):
    for result in two:
        is_same, is_same_again, left = result[is_row, shares_tokens][1]
        assert is_same is not (is_row or shares_tokens)
        assert is_same_again
        assert left == pytest.approx(0.75, abs=0.02)


def test_a_layer_with_its_norm_within_is_given_what_the_norm_makes():
    layer = torch.nn.Linear(4, 2)
    x = torch.randn(3, 1, 4)
    assert _normed(layer, x) is x
    layer.layer_norm_weight, layer.eps = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0])), 1e-6
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.layer_norm_weight
    torch.testing.assert_close(_normed(layer, x), wanted)
