"""Runs of swift rlhf --rlhf_type dpo."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from swift.api import rlhf, sft
from swift.errors import ConfigError, DataError
from tests.train.conftest import losses, metrics

SYSTEM = "You know the weather of all towns of this country, and tell it."


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """24 pairs whose answers have other lengths than each other."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for number in range(24):
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"question {number}"}]
        chosen = {"role": "assistant", "content": "snow " * (1 + number % 5) + str(number)}
        lines.append(json.dumps({"messages": [*asked, chosen], "rejected_response": "rain " * (1 + number % 3) + str(number)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def train(tiny_model, pairs, tmp_path_factory):
    """Train the tiny model on ``pairs``, each time in a folder of its own; options override the defaults. Returns the TrainResult."""

    def start(**options):
        defaults = dict(
            model=str(tiny_model),
            dataset=str(pairs),
            output_dir=str(tmp_path_factory.mktemp("run")),
            add_version=False,
            report_to="none",
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_samples=0,
            lora_dropout=0,
            learning_rate=1e-2,
            save_steps=2,
        )
        if options.get("tuner_type") == "full":
            defaults |= {"learning_rate": 1e-3}
            del defaults["lora_dropout"]
        return rlhf(**(defaults | options))

    return start


@pytest.fixture(scope="module")
def plain(train):
    return train()


def weights(result):
    return {name: tensor for file in sorted(result.checkpoint.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_course(a, b):
    """Losses, rewards and gradients of all steps, but for the order of sums, which alone decides who wins at the first step."""
    for one, other in zip(metrics(a), metrics(b), strict=True):
        if one["step"] == 1:
            del one["rewards/accuracies"], other["rewards/accuracies"]
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_pairs_are_told_apart_and_the_loss_begins_at_log_two(train):
    result = train(max_steps=4, split_dataset_ratio=0.2)
    assert losses(result)[0] == pytest.approx(np.log(2), rel=1e-6)
    line, last = metrics(result)[-2:]
    assert line["loss"] < 0.6 and line["rewards/accuracies"] == 1 and line["rewards/margins"] > 0.2
    assert last["eval_loss"] < 0.6 and last["eval_rewards/accuracies"] == 1
    assert result.state.computed_tokens < 0.6 * result.state.tokens, "prompts of pairs, and what all begin with, are computed once"
    assert "pairs/s" in (result.run / "report.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": False},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"share_prefixes": False, "max_tokens_per_batch": 400},
        {"padding_free": False, "precompute_ref_log_probs": True, "load_from_cache_file": False},
    ],
)
def test_no_way_to_cut_a_step_changes_it(train, plain, options):
    result = train(**options)
    assert_same_course(result, plain)
    if options.get("padding_free") is False:
        assert result.state.computed_tokens > result.state.tokens


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train):
    options = dict(max_steps=3, lora_dropout=0.1)
    whole, part = train(**options), train(**options)
    (part.run / "checkpoint-3").rename(part.run / "lost")  # as if it had been killed before
    resumed = rlhf(resume_from_checkpoint=str(part.run))
    assert_same_bits(resumed, whole)
    assert metrics(resumed) == metrics(whole)


def test_all_weights_are_compared_with_a_second_model_or_with_what_it_said_before(train, capsys):
    second, before = train(tuner_type="full", save_steps=1), train(tuner_type="full", precompute_ref_log_probs=True)
    assert "the reference is a second model in memory" in capsys.readouterr().err
    assert_same_course(second, before)
    wanted = weights(second)
    (second.run / "checkpoint-2").rename(second.run / "lost")
    found = weights(rlhf(resume_from_checkpoint=str(second.run)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_the_reference_says_is_computed_once(train, monkeypatch, cache):
    from swift.train import reference

    train(precompute_ref_log_probs=True, max_steps=1)
    files = set((cache / "reference_logps").glob("*.npy"))
    assert files

    def fail(self, batch):
        raise AssertionError("computed again")

    monkeypatch.setattr(reference.Frozen, "logps", fail)
    train(precompute_ref_log_probs=True, max_steps=1)
    assert set((cache / "reference_logps").glob("*.npy")) == files
    with pytest.raises(AssertionError, match="computed again"):  # as many rows, in another order
        train(precompute_ref_log_probs=True, max_steps=1, data_seed=7)
    monkeypatch.undo()
    damaged = max(files, key=lambda path: path.stat().st_mtime)
    kept = np.load(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    train(precompute_ref_log_probs=True, max_steps=1)
    np.testing.assert_allclose(np.load(damaged), kept, rtol=1e-5)


def test_equal_weights_under_another_config_are_another_reference(tiny_model, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    from swift.train.reference import digest_of

    copies = [shutil.copytree(tiny_model, tmp_path / name) for name in ("same", "other")]
    config = json.loads((copies[1] / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 10  # no weight of it
    (copies[1] / "config.json").write_text(json.dumps(config))
    first, same, other = (digest_of(AutoModelForCausalLM.from_pretrained(path)) for path in (tiny_model, *copies))
    assert first == same != other


def test_an_adapter_goes_on_from_itself(train, tiny_model, rows, tmp_path):
    """--adapters and --ref_adapters of one run: the first loss is log 2, which it is not beside the bare model."""
    common = dict(model=str(tiny_model), report_to="none", add_version=False, report_samples=0)
    start = sft(**common, dataset=str(rows), output_dir=str(tmp_path / "start"), max_steps=2, learning_rate=1e-2)
    bare = train(adapters=str(start.run), max_steps=1)
    beside = train(adapters=str(start.run), ref_adapters=str(start.run))
    assert losses(beside)[0] == pytest.approx(np.log(2), rel=1e-6)
    assert abs(losses(bare)[0] - np.log(2)) > 1e-3
    assert not any("reference" in name for name in weights(beside))
    assert not (beside.checkpoint / "reference").exists()
    third = train(adapters=str(start.run), ref_adapters=str(start.run), ref_model=str(tiny_model), precompute_ref_log_probs=True)
    assert_same_course(third, beside)  # where a second model has said the same


def test_a_start_that_changes_the_base_is_compared_with_the_model_that_was_loaded(train):
    assert losses(train(init_weights="pissa", max_steps=1))[0] == pytest.approx(np.log(2), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rlhf_type": "grpo"}, "--rlhf_type grpo is not available: of training by preferences or rewards, dpo alone is built"),
        ({"rlhf_type": "dop"}, "--rlhf_type does not know 'dop'"),
        ({"loss_type": ["bco_pair"]}, "--loss_type bco_pair is not available"),
        ({"loss_type": ["sigmod"]}, "--loss_type does not know 'sigmod'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "--loss_weights has 1 values for 2 losses"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "--loss_type sigmoid sigmoid: name each loss once"),
        ({"loss_type": ["ipo"], "label_smoothing": 0.1}, "--label_smoothing has no effect with --loss_type ipo"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "--label_smoothing 0.5: from 0.5 on the rejected answer would be preferred"),
        ({"label_smoothing": 0.9}, "--label_smoothing 0.9: from 0.5 on the rejected answer would be preferred"),
        ({"ld_alpha": 0.5}, "option --ld_alpha is not available: the losses of pairs weigh every token of an answer alike"),
        ({"loss_type": ["exo_pair"]}, "--label_smoothing 0: the loss exo_pair needs more than 0"),
        ({"discopop_tau": 0.1}, "--discopop_tau has no effect without --loss_type discopop"),
        ({"beta": 0.0}, "--beta takes at least 1e-06"),
        ({"reference_free": True, "ref_model": "m"}, "--ref_model has no effect with --reference_free true"),
        ({"ref_model_revision": "main"}, "--ref_model_revision has no effect without --ref_model"),
        ({"packing": True}, "--packing is for single rows"),
        ({"router_aux_loss_coef": 0.1}, "--router_aux_loss_coef is not built yet for pairs"),
        ({"streaming": True, "precompute_ref_log_probs": True}, "--precompute_ref_log_probs needs all rows"),
        ({"metric_for_best_model": "token_acc", "split_dataset_ratio": 0.1}, "--metric_for_best_model does not know 'token_acc'"),
        ({"num_generations": 4}, "option --num_generations is not available: of training by preferences or rewards, dpo alone is built"),
    ],
)
def test_wrong_options_end_in_one_line(train, options, message):
    with pytest.raises(ConfigError) as caught:
        train(**options)
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_the_loss_of_pairs_is_no_option_of_other_training(train, tiny_model, rows):
    """ms-swift's default, none, says nothing; the default of swift rlhf would not be computed."""
    common = {"model": str(tiny_model), "dataset": str(rows), "dry_run": True}
    assert sft(**common, loss_type=None) is None
    with pytest.raises(ConfigError, match="option --loss_type has no effect here"):
        sft(**common, loss_type=["sigmoid"])
    assert train(loss_type=None, dry_run=True) is None


def test_a_reference_with_other_tokens_is_refused(train, tmp_path):
    from tests.tiny import make_model, make_tokenizer

    other = make_model(tmp_path / "other")
    make_tokenizer(other, vocab_size=300)
    with pytest.raises(ConfigError, match="has other tokens than the model"):
        train(ref_model=str(other))


def test_rows_that_are_no_pairs_are_rejected_with_a_reason(train, rows):
    with pytest.raises(DataError, match="40 of 40 rows are rejected, more than 10%: 40 x the row has no rejected answer"):
        train(dataset=str(rows))


def test_pairs_can_be_streamed(train):
    streamed = train(max_steps=2, streaming=True, shuffle_buffer_size=8)
    assert losses(streamed)[0] == pytest.approx(np.log(2), rel=1e-6)
    assert losses(streamed)[1] < np.log(2)


def test_a_run_of_pairs_is_resumed_by_rlhf_alone(plain, rows, tiny_model):
    with pytest.raises(ConfigError, match="is a run of swift rlhf"):
        sft(model=str(tiny_model), dataset=str(rows), resume_from_checkpoint=str(plain.run), resume_only_model=False)


def test_inspect_shows_both_answers(pairs, tiny_model, capsys):
    from swift import cli

    cli.run(["data", "inspect", "--model", str(tiny_model), "--dataset", str(pairs), "--rlhf_type", "dpo", "--rows", "1"])
    told = capsys.readouterr().out
    assert "row 1 of 24 chosen" in told and "row 1 of 24 rejected" in told
    assert "[[snow 0<|im_end|>]]" in told and "[[rain 0<|im_end|>]]" in told
