"""Paired comparisons beside scipy, published tables and values worked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from swift.errors import DataError
from swift.evaluate.base import About, ModelResult, Outcome, TaskResult
from swift.evaluate.compare import compare, compare_all, difference_interval, holm, is_lower_better, mcnemar

ABOUT = About("mmlu", "MMLU", "letter", "acc", 5, False, "MIT", "hf::cais/mmlu", "d" * 64)
NAMES = ("base", "tuned")


def result(values, *, about=ABOUT, clusters=None, metric="acc", start=0):
    outcomes = [
        Outcome(f"q{start + n}", "", "prompt", "A", "A", value if isinstance(value, dict) else {metric: float(value)}, {})
        for n, value in enumerate(values)
    ]
    for item, cluster in zip(outcomes, clusters or (), strict=bool(clusters)):
        item.detail["cluster"] = cluster
    return TaskResult(about, outcomes)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 9), (7, 7), (12, 3), (40, 61), (700, 801)])
def test_mcnemars_test_is_a_binomial_test_of_the_differing_items(first, second):
    expected = 1.0 if first + second == 0 else scipy.stats.binomtest(first, first + second, 0.5).pvalue
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_thousands_of_differing_items_are_no_trouble():
    assert 0 < mcnemar(6000, 6500) < 1e-4


def test_counts_difference_and_p_value_are_of_the_same_items():
    # Both right 1, only the first 1, only the second 7, neither 12: Bentur et al., as in Fagerland, Lydersen and Laake 2014
    # (Statistics in Medicine 33:2850), whose exact McNemar p value is 0.070.
    first = result([1] + [1] + [0] * 7 + [0] * 12)
    second = result([1] + [0] + [1] * 7 + [0] * 12)
    found = compare(first, second, names=NAMES)
    assert (found.counts.both, found.counts.only_first, found.counts.only_second, found.counts.neither) == (1, 1, 7, 12)
    assert found.difference == pytest.approx(6 / 21)
    assert round(found.p_value, 3) == 0.070
    assert found.method == "McNemar"
    # A pair more on each side: shares 2 / 23 and 8 / 23, difference 6 / 23, variance (10 / 23 - 36 / 529) / 23.
    half = 1.959964 * math.sqrt((10 / 23 - 36 / 529) / 23)
    assert (found.low, found.high) == (pytest.approx(6 / 23 - half), pytest.approx(6 / 23 + half))


def test_equal_answers_leave_a_difference_of_the_items_number():
    low, high = difference_interval(0, 0, 10)
    assert (low, high) == (pytest.approx(-high), pytest.approx(1.959964 * math.sqrt(2 / 12 / 12)))


def test_other_metrics_are_compared_by_paired_t():
    first, second = [0.2, 0.5, 0.9, 0.4, 0.7], [0.3, 0.9, 0.8, 0.6, 0.8]
    found = compare(result(first), result(second), names=NAMES)
    expected = scipy.stats.ttest_rel(second, first)
    low, high = expected.confidence_interval(0.95)
    assert (found.p_value, found.low, found.high) == (pytest.approx(expected.pvalue), pytest.approx(low), pytest.approx(high))
    assert (found.method, found.counts) == ("paired t", None)


def test_items_in_clusters_are_compared_cluster_by_cluster():
    # Two questions on each of four passages; the models differ on both questions of a passage, or on none.
    passages = list("aabbccdd")
    found = compare(result([0, 0, 0, 0, 0, 0, 1, 1], clusters=passages), result([1, 1, 1, 1, 0, 0, 1, 1], clusters=passages), names=NAMES)
    expected = scipy.stats.ttest_1samp([1, 1, 0, 0], 0)  # means of the passages, all of one size
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.method, found.counts.only_second) == ("paired t", 4)
    # The variance of eight single differences 4/8 is 0.25 / 7, that of four passages 1/12: 24/7 items, of which 12/7 differ.
    size, t = 24 / 7 + 2, scipy.stats.t.ppf(0.975, 3)
    a, b = 1 / size, (12 / 7 + 1) / size
    half = t * math.sqrt((a + b - (b - a) ** 2) / size)
    assert (found.low, found.high) == (pytest.approx(b - a - half), 1.0)  # beyond 1 nothing can lie


@pytest.mark.parametrize("second", [[0] * 6, [1] * 6])
def test_a_few_passages_without_exception_are_no_certainty(second):
    passages = list("aabbcc")
    found = compare(result([0] * 6, clusters=passages), result(second, clusters=passages), names=NAMES)
    assert found.high - found.low > 0.5
    assert found.p_value >= 0.25  # three passages: two of eight ways to agree


def test_the_interval_of_a_difference_of_shares_does_not_leave_them():
    about = replace(ABOUT, metric="f1")
    found = compare(result([0.1, 0.9], metric="f1", about=about), result([1.0, 0.95], metric="f1", about=about), names=NAMES)
    assert (found.low, found.high) == (-1.0, 1.0)
    other = compare(result([0.1, 0.9], metric="f1", about=about), result([9.0, 0.95], metric="f1", about=about), names=NAMES)
    assert other.high > 1


def test_the_interval_of_a_difference_of_shares_of_sums_does_not_leave_them():
    about = replace(ABOUT, metric="inst")
    sides = [
        result([{"inst.sum": float(followed), "inst.count": 2.0} for followed in side], about=about) for side in ([0, 0, 1], [2, 0, 1])
    ]
    found = compare(*sides, names=NAMES)
    assert (found.difference, found.low, found.high) == (pytest.approx(1 / 3), -1.0, 1.0)


def test_perplexities_are_compared_on_the_documents_that_both_read():
    about = replace(ABOUT, mode="perplexity", metric="perplexity")
    randomness = np.random.default_rng(5)
    tokens = randomness.integers(50, 300, 120)
    base = tokens * randomness.normal(2.5, 0.2, 120)
    tuned = base - tokens * randomness.normal(0.05, 0.03, 120)
    sides = [
        result([{"nll": float(a), "tokens": float(b)} for a, b in zip(nll, tokens, strict=True)], about=about) for nll in (base, tuned)
    ]
    found = compare(*sides, names=NAMES)

    def statistic(a, b, t, axis):
        return np.exp(b.sum(axis) / t.sum(axis)) - np.exp(a.sum(axis) / t.sum(axis))

    drawn = scipy.stats.bootstrap((base, tuned, tokens), statistic, paired=True, rng=randomness, n_resamples=4000).confidence_interval
    width = drawn.high - drawn.low
    assert found.difference == pytest.approx(math.exp(tuned.sum() / tokens.sum()) - math.exp(base.sum() / tokens.sum()))
    assert (found.low, found.high) == (pytest.approx(drawn.low, abs=0.1 * width), pytest.approx(drawn.high, abs=0.1 * width))
    assert found.p_value < 0.001


def test_a_perplexity_without_end_is_not_compared():
    about = replace(ABOUT, mode="perplexity", metric="word_perplexity")
    broken, sound = (result([{"nll": nll + n, "words": 1.0} for n in range(3)], about=about) for nll in (1000.0, 5.0))
    found, refused = compare_all([ModelResult("broken", [broken]), ModelResult("sound", [sound])])
    assert (found, [item.reason for item in refused]) == ([], ["the word_perplexity of broken has no end"])


def test_items_of_one_side_alone_are_counted():
    found = compare(result([1, 0, 1]), result([1, 1], start=1), names=NAMES)
    assert (found.count, found.alone_first, found.alone_second) == (2, 1, 0)
    assert (found.value_first, found.value_second) == (0.5, 1.0)


def test_holm_is_that_of_the_paper():
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, and not less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.7]) == [1.0, None, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"digest": "e" * 64}, "other data or settings, digests dddddddddddd and eeeeeeeeeeee"),
        ({"digest": "e" * 64, "mode": "generate"}, "mode letter and generate"),
        ({"digest": "e" * 64, "num_fewshot": 0}, "num_fewshot 5 and 0"),
        ({"digest": "e" * 64, "uses_chat_template": True}, "uses_chat_template False and True"),
    ],
)
def test_other_questions_are_not_compared(changes, told):
    with pytest.raises(DataError, match="not asked the same questions") as caught:
        compare(result([1]), result([1], about=replace(ABOUT, **changes)), names=NAMES)
    assert told in caught.value.message
    assert "mmlu: base and tuned cannot be compared" in caught.value.message


def test_the_same_questions_may_lie_in_another_place():
    found = compare(result([1, 0]), result([1, 1], about=replace(ABOUT, source="/data/mmlu")), names=NAMES)
    assert found.difference == 0.5


def test_no_item_in_common_is_no_comparison():
    with pytest.raises(DataError, match="no example in common"):
        compare(result([1, 0]), result([1, 0], start=2), names=NAMES)


def test_models_are_compared_with_the_first_and_with_baselines():
    def model(name, *tasks):
        return ModelResult(name, list(tasks))

    other = replace(ABOUT, name="ceval", digest="c" * 64)
    base = model("base", result([1, 0, 0, 1]), result([1, 1, 0, 0], about=other))
    tuned = model("tuned", result([1, 1, 1, 1]), result([1, 1, 1, 0], about=other))
    old = model("old", result([0, 0, 0, 0]), result([0, 0, 0, 0], about=replace(other, digest="f" * 64)))
    compared, refused = compare_all([base, tuned], [old])
    assert [(item.first, item.second, item.task) for item in compared] == [
        ("base", "tuned", "mmlu"),
        ("base", "tuned", "ceval"),
        ("old", "base", "mmlu"),
        ("old", "tuned", "mmlu"),
    ]
    assert [(item.first, item.second, item.task) for item in refused] == [("old", "base", "ceval"), ("old", "tuned", "ceval")]
    assert "digests ffffffffffff and cccccccccccc" in refused[0].reason
    # Two of two differing items, and one of one: p values 0.5 and 1; Holm doubles the smaller.
    assert [(item.p_value, item.p_adjusted) for item in compared[:2]] == [(0.5, 1.0), (1.0, 1.0)]


def test_a_task_that_one_side_has_not_is_told():
    _, refused = compare_all([ModelResult("a", [result([1])]), ModelResult("b", [])])
    assert [item.reason for item in refused] == ["there is no result of b"]


@pytest.mark.parametrize("metric", ["perplexity", "word_perplexity,none", "wer:mean", "likelihood_diff,none"])
def test_less_of_it_is_better(metric):
    assert is_lower_better(metric)
    assert not is_lower_better("acc,none")
