import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from swift.data.collate import flat_batch, padded_batch
from swift.model.attention import use_packed_attention
from swift.model.policy import Policy
from swift.objectives.dpo import Dpo, Pairs, Settings, sft, sigmoid
from swift.train.reference import Frozen
from tests.objectives.dpo_of_trl import BETA, CASES, make_models, pairs

OF_TRL = json.loads(Path(__file__).with_name("dpo_of_trl.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in make_models(tmp_path_factory.mktemp("dpo")))
    for model in (policy, reference):
        use_packed_attention(model)
    return Policy(policy), Frozen(Policy(reference))


def examples():
    def side(prompt, answer):
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    return [{name: side(pair["prompt"], pair[name]) for name in ("chosen", "rejected")} for pair in pairs()]


BATCHES = {
    "padded": lambda rows: padded_batch(rows, pad_token_id=3),
    "padded left": lambda rows: padded_batch(rows, pad_token_id=3, padding_side="left"),
    "flat": lambda rows: flat_batch(rows, share=False),
    "shared prompts": flat_batch,
}


def measured(models, objective, batches):
    """(loss, norm of its gradient, metrics), divided by the count of all ``batches``."""
    policy, reference = models
    policy.model.zero_grad()
    count = sum(objective.count(batch) for batch in batches)
    losses, sums = 0.0, {}
    for batch in batches:
        loss, metrics = objective.loss_sum(policy, reference, batch)
        (loss / count).backward()
        losses += float(loss.detach()) / count
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value) / count
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in policy.model.parameters()])
    return {"loss": losses, "grad_norm": float(norm), **sums}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_trl(models, case):
    found = measured(models, Dpo(beta=BETA, **CASES[case]), [flat_batch(examples())])
    assert found == pytest.approx(OF_TRL[case], rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("size", [4, 1])
def test_no_layout_and_no_cut_changes_loss_or_gradient(models, layout, size):
    rows = examples()
    batches = [BATCHES[layout](rows[at : at + size]) for at in range(0, 4, size)]
    assert measured(models, Dpo(beta=BETA), batches) == pytest.approx(OF_TRL["sigmoid"], rel=2e-4, abs=1e-5)


def test_a_shared_prompt_is_computed_once():
    rows = examples()
    prompts, answers = (sum(len(pair[name]) for pair in pairs() for name in names) for names in (("prompt",), ("chosen", "rejected")))
    assert flat_batch(rows).num_computed == prompts + answers - 1  # the answers of the first pair begin with the same token
    assert flat_batch(rows).num_tokens == flat_batch(rows, share=False).num_computed == 2 * prompts + answers


def test_a_frozen_head_gives_the_gradients_of_a_trained_one(models):
    """The two ways in which gradients of log-probabilities are taken."""
    policy, _ = models
    head = policy.model.get_output_embeddings().weight
    inner = [parameter for parameter in policy.model.parameters() if parameter is not head]
    gradients = []
    for is_trained in (True, False):
        head.requires_grad_(is_trained)
        loss, _ = Dpo(beta=BETA).loss_sum(policy, models[1], flat_batch(examples()))
        gradients.append(torch.autograd.grad(loss, inner))
    head.requires_grad_(True)
    for trained, frozen in zip(*gradients, strict=True):
        torch.testing.assert_close(frozen, trained, rtol=1e-4, atol=1e-5)


def test_log_probabilities_from_before_stand_for_the_reference(models):
    rows = examples()
    before = models[1].logps(flat_batch(rows)).view(-1, 2).tolist()
    rows = [row | {"reference_logps": tuple(both)} for row, both in zip(rows, before, strict=True)]
    for name in ("shared prompts", "padded"):
        found = measured((models[0], None), Dpo(beta=BETA), [BATCHES[name](rows)])
        assert found == pytest.approx(OF_TRL["sigmoid"], rel=2e-4, abs=1e-5)


def pair_of(chosen, rejected, nll=0.0):
    one = torch.ones(1)
    return Pairs(torch.tensor([chosen]), torch.tensor([rejected]), one, one, torch.tensor([nll]))


def test_the_loss_is_log_two_where_nothing_is_preferred():
    torch.testing.assert_close(sigmoid(pair_of(1.5, 1.5), Settings(0.3, 0.0, 0.05)), torch.tensor([math.log(2)]))


def test_smoothing_mixes_in_the_loss_of_the_flipped_pair():
    # beta margin = 0.5 * 2 = 1: 0.9 * log(1 + e^-1) + 0.1 * log(1 + e) = 0.9 * 0.313262 + 0.1 * 1.313262
    torch.testing.assert_close(sigmoid(pair_of(3.0, 1.0), Settings(0.5, 0.1, 0.05)), torch.tensor([0.413262]), rtol=1e-5, atol=0)
    assert float(sft(pair_of(3.0, 1.0, nll=0.25), Settings(0.5, 0.1, 0.05))) == 0.25


def test_rpo_alpha_adds_the_mean_cross_entropy_of_the_chosen_answer(models):
    plain, more = (measured(models, Dpo(beta=BETA, rpo_alpha=alpha), [flat_batch(examples())]) for alpha in (None, 0.5))
    rows = examples()
    logps = models[0].logps(flat_batch(rows))[0::2].tolist()
    nll = sum(-logp / len(pair["chosen"]) for logp, pair in zip(logps, pairs(), strict=True)) / 4
    assert more["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert more["loss"] - plain["loss"] == pytest.approx(0.5 * nll, rel=1e-4)
    assert "nll_loss" not in plain


def test_without_a_reference_rewards_are_log_probabilities(models):
    found = measured((models[0], None), Dpo(beta=BETA, reference_free=True), [flat_batch(examples())])
    assert found["rewards/chosen"] == pytest.approx(BETA * found["logps/chosen"], rel=1e-5)
    assert not Dpo(reference_free=True).needs_reference


def test_a_pair_of_which_one_answer_has_no_weight_is_not_counted(models):
    rows = examples()
    rows[0]["rejected"]["weights"] = [0.0] * len(rows[0]["rejected"]["labels"])
    assert Dpo().count(flat_batch(rows)) == 3
    found, without = (measured(models, Dpo(beta=BETA), [flat_batch(some)]) for some in (rows, rows[1:]))
    assert found == pytest.approx(without, rel=1e-4)


def test_a_mean_over_tokens_counts_them_and_not_their_weights(models):
    rows = examples()
    for row in rows:
        for side in row.values():
            side["weights"] = [0.5] * len(side["labels"])
    objective = Dpo(beta=BETA, loss_type=["sft"])
    found, whole = (measured(models, objective, [flat_batch(some)]) for some in (rows, examples()))
    assert found["loss"] == pytest.approx(whole["loss"] / 2, rel=1e-5)


def test_a_policy_that_is_its_reference_has_won_no_pair(models):
    policy, _ = models
    found = measured((policy, Frozen(policy)), Dpo(beta=BETA), [flat_batch(examples())])
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (found["rewards/accuracies"], found["rewards/margins"]) == (0, 0)


def test_a_batch_that_only_fills_a_gap_adds_nothing(models):
    from dataclasses import replace

    batch = flat_batch(examples())
    filler = replace(batch, weight_S=torch.zeros_like(batch.weight_S))
    found, alone = (measured(models, Dpo(beta=BETA), batches) for batches in ([batch, filler], [batch]))
    assert Dpo().count(filler) == 0 and Dpo().count(batch) == 4
    assert found == pytest.approx(alone, rel=1e-6)


def test_the_reference_has_no_gradient_and_leaves_the_mode_as_it_was(models):
    _, reference = models
    reference.policy.model.train()
    assert not reference.logps(flat_batch(examples())).requires_grad
    assert reference.policy.model.training
    assert torch.is_grad_enabled()


def test_the_reference_drops_nothing_while_the_policy_does(models):
    policy, _ = models
    layers, batch = policy.model.model.layers, padded_batch(examples(), pad_token_id=3)
    wanted = policy.logps(batch)
    for layer in layers:
        layer.self_attn.attention_dropout = 0.5
    policy.model.train()
    found, trained = Frozen(policy).logps(batch), policy.logps(batch)
    policy.model.eval()
    for layer in layers:
        layer.self_attn.attention_dropout = 0.0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, wanted, atol=1e-2)
