"""Intervals beside published tables, scipy and formulas written out."""

import math

import numpy as np
import pytest
import scipy.stats

from swift.evaluate.base import About, Outcome, TaskResult
from swift.evaluate.statistics import (
    clusters_of,
    estimate,
    estimate_macro,
    macro,
    mean,
    means,
    metrics_of,
    ratio,
    t_p_value,
    t_quantile,
)


def outcome(id, metrics, category="", **detail):
    return Outcome(str(id), category, "prompt", "A", "A", metrics, detail)


# Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (the score method without continuity correction).
@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_that_of_a_published_table(successes, count, low, high):
    found = mean([1] * successes + [0] * (count - successes))
    assert (found.value, found.count, found.method) == (successes / count, count, "Wilson")
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_all_items_right_is_no_certainty():
    found = mean([1] * 20)
    assert found.high == 1.0
    assert round(found.low, 4) == round(1 - 0.1611, 4)  # the mirror of 0 of 20


def test_one_item_has_an_interval_only_if_it_is_right_or_wrong():
    assert scipy.stats.binomtest(1, 1).proportion_ci(method="wilson").low == pytest.approx(mean([1]).low)
    assert (mean([0.5]).low, mean([0.5]).method) == (None, "none")


def test_the_interval_of_another_mean_is_students():
    values = [0.1, 0.4, 0.35, 0.8, 0.66, 0.2]
    found = mean(values)
    low, high = scipy.stats.t.interval(0.95, 5, np.mean(values), scipy.stats.sem(values))
    assert (found.low, found.high, found.method) == (pytest.approx(low), pytest.approx(high), "t")


@pytest.mark.parametrize("freedom", [1, 2, 5, 29, 100, 1000, 14041, 99_999])
def test_quantiles_of_t_are_scipys(freedom):
    assert t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-9)


def test_beyond_a_hundred_thousand_items_t_is_normal():
    assert t_quantile(500_000) == pytest.approx(scipy.stats.t.ppf(0.975, 500_000), rel=1e-5)


@pytest.mark.parametrize(("t", "freedom"), [(0.0, 3), (0.3, 1), (1.0, 7), (-2.5, 40), (6.0, 300), (4.2, 20_000)])
def test_p_values_of_t_are_scipys(t, freedom):
    assert t_p_value(t, 1.0, freedom + 1) == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom), rel=1e-9)


def test_no_difference_is_no_sign_and_one_item_says_nothing():
    assert (t_p_value(0.0, 0.0, 9), t_p_value(0.1, 1.0, 1)) == (1.0, None)


def test_equal_differences_are_as_sure_as_that_all_signs_agree():
    assert t_p_value(0.1, 0.0, 9) == 2 / 2**9  # all nine up, or all down
    assert t_p_value(0.1, 1e-34, 2) == 0.5


def test_clusters_widen_the_interval_as_their_sums_vary():
    # Four passages with two questions each, both right or both wrong: as good as four questions.
    values, passages = [1, 1, 0, 0, 1, 1, 0, 0], list("aabbccdd")
    found = mean(values, passages)
    # Sums of residuals +1, -1, +1, -1: variance of the mean 4 * 4 / 3 / 64 = 1 / 12; of eight single items 0.25 / 7.
    # Effective number of items 8 * (0.25 / 7) / (1 / 12) = 24 / 7; z is the t quantile of 3 degrees of freedom.
    effective, z = 24 / 7, scipy.stats.t.ppf(0.975, 3)
    half = z * math.sqrt(0.25 / effective + z**2 / (4 * effective**2)) / (1 + z**2 / effective)
    assert (found.clusters, found.count) == (4, 8)
    assert (found.low, found.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert found.high - found.low > mean(values).high - mean(values).low


def test_a_single_cluster_has_no_interval():
    assert mean([1, 0, 1], ["a", "a", "a"]).low is None


def test_the_clustered_error_of_other_means_is_millers():
    values, passages = [1.2, 1.4, 1.9, 1.7, 1.5], ["a", "a", "b", "b", "c"]
    # Residuals from the mean 1.54: sums -0.48, 0.52, -0.04. Variance (0.2304 + 0.2704 + 0.0016) * 3 / 2 / 25.
    half = scipy.stats.t.ppf(0.975, 2) * math.sqrt(0.5024 * 1.5 / 25)
    found = mean(values, passages)
    assert (found.low, found.high) == (pytest.approx(1.54 - half), pytest.approx(1.54 + half))


def test_outcomes_name_their_cluster():
    single = [outcome(1, {"acc": 1.0}), outcome(2, {"acc": 0.0}, cluster="p")]
    shared = [*single, outcome(3, {"acc": 1.0}, cluster="p")]
    assert clusters_of(single) is None
    assert estimate(shared, "acc").clusters == 2


def test_perplexity_is_of_all_tokens_and_its_interval_of_documents():
    documents = [(30.0, 10.0), (26.0, 13.0), (55.0, 20.0), (21.0, 7.0)]
    found = estimate([outcome(n, {"nll": nll, "tokens": count}) for n, (nll, count) in enumerate(documents)], "perplexity")
    # R = 132 / 50 = 2.64. Residuals nll - R * tokens: 3.6, -8.32, 2.2, 2.52; squares 12.96 + 69.2224 + 4.84 + 6.3504 = 93.3728.
    half = scipy.stats.t.ppf(0.975, 3) * math.sqrt(93.3728 * 4 / 3) / 50
    assert found.value == pytest.approx(math.exp(2.64))
    assert (found.low, found.high) == (pytest.approx(math.exp(2.64 - half)), pytest.approx(math.exp(2.64 + half)))
    assert found.method == "ratio"


def test_the_delta_method_agrees_with_the_bootstrap_over_documents():
    randomness = np.random.default_rng(3)
    tokens = randomness.integers(50, 400, 200).astype(float)
    nll = tokens * randomness.normal(2.5, 0.3, 200)
    found = ratio(nll, tokens, math.exp)
    drawn = scipy.stats.bootstrap(
        (nll, tokens), lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)), paired=True, rng=randomness, n_resamples=4000
    ).confidence_interval
    width = drawn.high - drawn.low
    assert found.low == pytest.approx(drawn.low, abs=0.05 * width)
    assert found.high == pytest.approx(drawn.high, abs=0.05 * width)


def test_bits_per_byte_are_nats_over_log_two():
    found = estimate([outcome(1, {"nll": 10.0, "bytes": 40.0}), outcome(2, {"nll": 14.0, "bytes": 40.0})], "bits_per_byte")
    assert found.value == pytest.approx(24 / 80 / math.log(2))


def test_a_pair_of_sum_and_count_is_one_metric():
    outcomes = [outcome(1, {"acc": 1.0, "inst.sum": 2.0, "inst.count": 3.0}), outcome(2, {"acc": 0.0, "inst.sum": 0.0, "inst.count": 1.0})]
    assert metrics_of(outcomes) == ["acc", "inst"]
    about = About("t", "t", "generate", "acc", 0, False, "MIT", "here", "d")
    assert means(TaskResult(about, outcomes)) == {"acc": 0.5, "inst": 0.5}


def test_sums_of_a_document_are_no_metrics_of_their_own():
    assert metrics_of([outcome(1, {"nll": 10.0, "tokens": 4.0, "bytes": 12.0})]) == ["perplexity", "byte_perplexity", "bits_per_byte"]


def test_values_that_are_no_numbers_are_left_out_and_counted():
    found = estimate([outcome(1, {"f1": 0.5}), outcome(2, {"f1": math.nan}), outcome(3, {"f1": 0.7}), outcome(4, {})], "f1")
    assert (found.value, found.count) == (pytest.approx(0.6), 2)
    assert estimate([outcome(1, {"f1": math.inf})], "f1") is None


def test_the_mean_over_categories_weighs_each_alike():
    many = [outcome(n, {"acc": 1.0}, "law") for n in range(8)] + [outcome(n, {"acc": 0.0}, "art") for n in range(8, 10)]
    assert estimate(many, "acc").value == pytest.approx(0.8)
    assert estimate_macro(many, "acc").value == pytest.approx(0.5)


def test_the_interval_over_categories_adds_their_variances():
    strata = [np.array([0.1, 0.5, 0.3, 0.9]), np.array([0.6, 0.8, 0.4])]
    found = macro([(column, None) for column in strata])
    variance = sum(np.var(column, ddof=1) / len(column) for column in strata) / 4
    half = scipy.stats.t.ppf(0.975, 5) * math.sqrt(variance)
    assert found.value == pytest.approx((0.45 + 0.6) / 2)
    assert (found.low, found.high) == (pytest.approx(found.value - half), pytest.approx(found.value + half))


def test_categories_of_equal_size_give_the_interval_of_all_items():
    columns = [[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]]
    found, plain = macro([(column, None) for column in columns]), mean([value for column in columns for value in column])
    assert (found.value, found.low, found.high) == (pytest.approx(plain.value), pytest.approx(plain.low), pytest.approx(plain.high))


def test_clusters_whose_items_are_not_alike_cost_nothing_over_categories_either():
    randomness = np.random.default_rng(0)
    columns = [(randomness.random(400) < 0.5).astype(float) for _ in range(2)]
    passages = [str(number // 4) for number in range(400)]
    plain, clustered = macro([(column, None) for column in columns]), macro([(column, passages) for column in columns])
    assert clustered.high - clustered.low == pytest.approx(plain.high - plain.low, rel=0.1)


def test_a_category_of_one_item_leaves_no_interval():
    assert macro([([1.0, 0.0], None), ([1.0], None)]).low is None


def test_wilsons_interval_holds_the_truth_nineteen_times_of_twenty():
    randomness = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        found = mean((randomness.random(40) < 0.3).astype(float))
        inside += found.low <= 0.3 <= found.high
    assert 0.93 < inside / 2000 < 0.98


def test_the_interval_of_shares_does_not_leave_them() -> None:
    found = mean([0.0, 0.0, 0.1, 0.0])
    assert (found.value, found.low) == (pytest.approx(0.025), 0.0)
    found = mean([1.0, 0.9, 1.0, 1.0])
    assert (found.value, found.high) == (pytest.approx(0.975), 1.0)
    assert mean([0.0, 0.0, 2.0, 0.0]).low < 0  # no shares
    found = macro([([0.0, 0.1, 0.0], None), ([0.9, 0.0], None)])
    assert (found.value, found.low) == (pytest.approx((0.1 / 3 + 0.45) / 2), 0.0)
    assert macro([([0.0, 0.1, 0.0], None), ([2.0, 0.0], None)]).low < 0


def test_the_interval_of_a_share_of_sums_does_not_leave_it() -> None:
    outcomes = [outcome(1, {"inst.sum": 1.0, "inst.count": 2.0}), outcome(2, {"inst.sum": 3.0, "inst.count": 3.0})]
    found = estimate(outcomes, "inst")
    assert (found.value, found.low, found.high) == (0.8, 0.0, 1.0)
    scores = [outcome(1, {"score.sum": 1.0, "score.count": 2.0}), outcome(2, {"score.sum": 9.0, "score.count": 3.0})]
    assert estimate(scores, "score").high > 1


def test_no_perplexity_is_below_one_and_those_of_one_nat_a_token_may_be_above_e() -> None:
    found = estimate([outcome(1, {"nll": 0.1, "tokens": 20.0}), outcome(2, {"nll": 3.0, "tokens": 3.0})], "perplexity")
    assert found.low == 1.0
    assert found.high > math.e
