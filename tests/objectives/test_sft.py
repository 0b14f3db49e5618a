import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from swift.objectives.sft import IGNORE, Sft


class Fixed(torch.nn.Module):
    """Returns fixed logits, and knows no logits_to_keep."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask, use_cache):
        return type("Output", (), {"logits": self.logits})


def batch(ids, labels, **more):
    ids = torch.tensor(ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels), **more}


def test_uniform_logits_cost_log_of_the_vocabulary_a_token():
    made = batch([[1, 2, 3, 0]], [[IGNORE, 2, 3, IGNORE]])
    loss, _ = Sft().loss_sum(Fixed(torch.zeros(1, 4, 5)), None, made)
    assert float(loss) == pytest.approx(2 * math.log(5))
    assert Sft().count(made) == 2


def test_the_first_token_is_never_a_target():
    made = batch([[1, 2]], [[1, 2]])
    assert Sft().count(made) == 1


def test_weights_scale_the_loss_and_tokens_of_weight_zero_do_not_count():
    made = batch([[1, 2, 3]], [[IGNORE, 2, 3]], weights=torch.tensor([[0.0, 2.0, 0.0]]))
    loss, _ = Sft().loss_sum(Fixed(torch.zeros(1, 3, 5)), None, made)
    assert float(loss) == pytest.approx(2 * math.log(5))
    assert Sft().count(made) == 1


def test_a_right_prediction_counts_as_accurate():
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 2] = 9.0  # position 0 predicts token 1, which is 2
    logits[0, 1, 4] = 9.0  # position 1 predicts token 2, which is 3: wrong
    _, metrics = Sft().loss_sum(Fixed(logits), None, batch([[1, 2, 3]], [[IGNORE, 2, 3]]))
    assert float(metrics["token_acc"]) == 1


def test_the_head_at_supervised_positions_gives_transformers_own_loss_and_gradients(tiny_model):
    torch.manual_seed(0)
    ids = torch.randint(4, 300, (3, 20))
    labels = ids.clone()
    labels[:, :7] = IGNORE
    labels[1, 12:] = IGNORE
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    ours = AutoModelForCausalLM.from_pretrained(tiny_model)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model)
    loss, _ = Sft().loss_sum(ours, None, made)
    (loss / Sft().count(made)).backward()
    expected = theirs(**made).loss
    expected.backward()
    torch.testing.assert_close(loss / Sft().count(made), expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_the_loss_of_a_batch_is_the_sum_of_its_rows(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    torch.manual_seed(0)
    ids = torch.randint(4, 300, (4, 12))
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    whole, _ = Sft().loss_sum(model, None, made)
    parts = [Sft().loss_sum(model, None, {name: value[at : at + 1] for name, value in made.items()})[0] for at in range(4)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-6, atol=1e-5)
