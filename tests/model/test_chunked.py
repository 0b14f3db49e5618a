import pytest
import torch
from torch.nn import functional as F

from swift.model import chunked
from swift.model.chunked import chunked_cross_entropy
from swift.model.logps import chunked_logps

K, D, V = 23, 6, 17


@pytest.fixture
def case(monkeypatch):
    """Hidden states, a head, and predictions of which some share a position; five positions a part."""
    monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", 4 * V * 5)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(K, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    row = torch.tensor([*range(K), 3, 3, 22]).sort().values
    target = torch.randint(0, V, (len(row),), generator=generator)
    weights = torch.rand(len(row), generator=generator)
    weights[4] = 0
    return hidden, weight, row, target, weights


def whole(logits, row, target, weights):
    return (weights * F.cross_entropy(logits[row], target, reduction="none")).sum()


HEADS = {
    "linear": lambda hidden, weight: hidden @ weight.T,
    "scaled": lambda hidden, weight: hidden @ weight.T * 0.25,
    "soft-capped": lambda hidden, weight: 3 * torch.tanh(hidden @ weight.T / 3),
}


@pytest.mark.parametrize("name", HEADS)
def test_parts_give_the_loss_and_the_gradients_of_the_whole(case, name):
    hidden, weight, row, target, weights = case
    head = HEADS[name]
    wanted = whole(head(hidden, weight), row, target, weights)
    found, _ = chunked_cross_entropy(lambda part: head(part, weight), [weight], hidden, row, target, weights, vocabulary=V)
    torch.testing.assert_close(found, wanted)
    for got, expected in zip(
        torch.autograd.grad(found * 0.5, (hidden, weight)), torch.autograd.grad(wanted * 0.5, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("most", [16, 100])
def test_a_product_gives_the_loss_and_the_gradients_of_the_whole(case, monkeypatch, most):
    hidden, weight, row, target, weights = case
    monkeypatch.setattr(chunked, "BUFFER_BYTES", 0)
    monkeypatch.setattr(chunked, "LEAST_POSITIONS", most)
    wanted = whole(hidden @ weight.T, row, target, weights)
    found, right = chunked_cross_entropy(weight, [weight], hidden, row, target, weights, vocabulary=V)
    torch.testing.assert_close(found, wanted)
    assert float(right) == float((((hidden @ weight.T).argmax(1)[row] == target) & (weights != 0)).sum())
    for got, expected in zip(
        torch.autograd.grad(found * 0.5, (hidden, weight)), torch.autograd.grad(wanted * 0.5, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_a_product_in_half_precision_and_one_without_gradient_are_the_same_loss(case):
    hidden, weight, row, target, weights = case
    wanted = whole(hidden @ weight.T, row, target, weights)
    with torch.no_grad():
        found, _ = chunked_cross_entropy(weight, [weight], hidden, row, target, weights, vocabulary=V)
    torch.testing.assert_close(found, wanted.detach())
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    found, _ = chunked_cross_entropy(halves[1], [halves[1]], halves[0], row, target, weights, vocabulary=V)
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(found, [halves[1]])
    (expected,) = torch.autograd.grad(wanted, [weight])
    torch.testing.assert_close(gradient.float(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_right_predictions_of_weight_zero_do_not_count():
    hidden = torch.eye(3)
    row, target = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0])  # the last one is wrong
    weights = torch.tensor([1.0, 0.0, 1.0])
    _, right = chunked_cross_entropy(lambda part: part * 5, [], hidden, row, target, weights, vocabulary=3)
    assert float(right) == 1


def test_no_gradient_is_computed_where_none_is_asked_for(case):
    hidden, weight, row, target, weights = case
    calls = []

    def head(part):
        calls.append(torch.is_grad_enabled())
        return part @ weight.T

    with torch.no_grad():
        loss, _ = chunked_cross_entropy(head, [], hidden, row, target, weights, vocabulary=V)
    assert not loss.requires_grad
    assert calls and not any(calls)


def test_large_logits_keep_their_digits():
    hidden = torch.tensor([[1000.0, 0.0], [0.0, -1000.0]])
    loss, _ = chunked_cross_entropy(lambda part: part, [], hidden, torch.tensor([0, 1]), torch.tensor([1, 0]), torch.ones(2), vocabulary=2)
    assert float(loss) == 1000.0  # log(1 + e^1000) - 0, and log(1 + e^-1000) = 0
    loss, _ = chunked_cross_entropy(torch.eye(2), [], hidden, torch.tensor([0, 1]), torch.tensor([1, 0]), torch.ones(2), vocabulary=2)
    assert float(loss) == 1000.0


def test_no_prediction_at_all_costs_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    loss, right = chunked_cross_entropy(lambda part: part, [], torch.zeros(0, 4), empty, empty, torch.zeros(0), vocabulary=4)
    assert float(loss) == float(right) == 0


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("name", [*HEADS, "product"])
def test_log_probabilities_have_the_values_and_gradients_of_the_whole(case, monkeypatch, name, is_trained):
    """Each prediction has a weight of its own, which is known only after all of them: a square of the sum of a document."""
    hidden, weight, row, target, weights = case
    weight = weight.detach().requires_grad_(is_trained)
    monkeypatch.setattr(chunked, "BUFFER_BYTES", 0)
    monkeypatch.setattr(chunked, "LEAST_POSITIONS", 16)
    head = HEADS.get(name, HEADS["linear"])
    document = torch.arange(len(row)) % 4

    def loss_of(logps):
        return (logps.new_zeros(4).index_add(0, document, logps * weights) ** 2).sum()

    wanted = head(hidden, weight).log_softmax(dim=-1)[row, target]
    given = weight if name == "product" else lambda part: head(part, weight)
    found = chunked_logps(given, [weight], hidden, row, target, vocabulary=V)
    torch.testing.assert_close(found, wanted)
    by = (hidden, weight) if is_trained else (hidden,)
    for got, expected in zip(torch.autograd.grad(loss_of(found), by), torch.autograd.grad(loss_of(wanted), by), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_a_trained_head_keep_the_precision_of_their_forward_pass(case):
    """A backward pass begins outside of autocast, where the head would be given states of another precision than its own."""
    hidden, weight, row, target, _ = case
    grads = []
    for logps in (
        lambda h: chunked_logps(weight, [weight], h, row, target, vocabulary=V),
        lambda h: (h @ weight.T).float().log_softmax(-1)[row, target],
    ):
        with torch.autocast("cpu", torch.bfloat16):
            loss = logps(hidden.bfloat16()).sum()
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)
