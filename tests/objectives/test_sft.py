import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from swift.data.collate import padded_batch
from swift.model.policy import Policy
from swift.objectives.sft import Sft


class Fixed:
    """A policy that predicts every token with one chance in five, and always guesses token 2."""

    model = None

    def cross_entropy(self, batch):
        return (batch.weight_S * math.log(5)).sum(), ((batch.target_S == 2) & (batch.weight_S != 0)).sum()


def batch(ids, labels, **more):
    return padded_batch([{"input_ids": ids, "labels": labels, **more}], pad_token_id=0)


def test_uniform_predictions_cost_log_of_the_vocabulary_a_token():
    made = batch([1, 2, 3, 0], [-100, 2, 3, -100])
    loss, metrics = Sft().loss_sum(Fixed(), None, made)
    assert float(loss) == pytest.approx(2 * math.log(5))
    assert float(metrics["token_acc"]) == 1
    assert Sft().count(made) == 2


def test_the_first_token_is_never_a_target():
    assert Sft().count(batch([1, 2], [1, 2])) == 1


def test_weights_scale_the_loss_and_tokens_of_weight_zero_do_not_count():
    made = batch([1, 2, 3, 4], [-100, 2, 3, 4], weights=[0.0, 2.0, 0.0, 1.0])
    loss, _ = Sft().loss_sum(Fixed(), None, made)
    assert float(loss) == pytest.approx(3 * math.log(5))
    assert Sft().count(made) == 2


def test_the_loss_and_its_gradients_are_those_of_transformers(tiny_model):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in (20, 12, 17)]
    examples = [{"input_ids": ids, "labels": [-100] * 7 + ids[7:]} for ids in rows]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    loss, _ = Sft().loss_sum(Policy(ours), None, padded_batch(examples, pad_token_id=3))
    loss.backward()
    wanted = torch.zeros(())
    for example in examples:
        logits = theirs(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        wanted = wanted + F.cross_entropy(logits, torch.tensor(example["labels"][1:]), reduction="sum")
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
