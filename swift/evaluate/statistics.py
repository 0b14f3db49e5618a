"""How sure a result is: means over items and over categories, ratios of sums, each with a 95 % confidence interval.

The items of a task are taken as drawn from all questions that it could have asked (Miller 2024, arXiv:2411.00640).

Items count as clustered only where they share a text: three hypotheses about one premise, ten questions on one passage. An
outcome says so by ``detail["cluster"]``. Categories are no clusters. The subjects of MMLU are the benchmark itself, not a sample
of subjects: another draw of questions would have the same subjects. Clustering by them would answer another question, how the
model would do on other subjects. Leaving the stratification out, as the mean over items does, can only widen its interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from swift.evaluate.base import Outcome, TaskResult

CONFIDENCE = 0.95
_NOTHING = 1e-20  # of a variance beside the square of the mean: what rounding leaves
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)

Floats = npt.NDArray[np.float64]
Clusters = Sequence[str] | None


@dataclass(frozen=True)
class Estimate:
    """``value`` of ``count`` items in ``clusters`` clusters; the ends of its 95 % interval are None where nothing can be said."""

    value: float
    low: float | None
    high: float | None
    count: int
    clusters: int
    method: str
    """"Wilson" (0 or 1 an item), "t" (other means), "ratio" (of sums), or "none" where there is no interval."""


@dataclass(frozen=True)
class Ratio:
    """A metric that is no mean of items: ``transform`` of the sum of ``above`` over the sum of ``below``."""

    above: str
    below: str
    transform: Callable[[float], float]
    """Monotone, so that the ends of the interval of the ratio become those of the metric."""
    slope: Callable[[float], float]
    """Its derivative, for differences."""


def _exp(nats: float) -> float:
    """Infinity where squares of it would be no float, as of a model whose weights are broken, or a "word" that is a whole Chinese text."""
    return math.exp(nats) if nats < 300 else math.inf


RATIOS = {
    "perplexity": Ratio("nll", "tokens", _exp, _exp),
    "word_perplexity": Ratio("nll", "words", _exp, _exp),
    "byte_perplexity": Ratio("nll", "bytes", _exp, _exp),
    "bits_per_byte": Ratio("nll", "bytes", lambda nats: nats / math.log(2), lambda _: 1 / math.log(2)),
}
"""``nll`` is minus the log-probability of a document in nats; ``tokens``, ``words`` and ``bytes`` are its lengths. Only the
last two compare models with different tokenizers. Any other metric NAME of this kind is written as NAME.sum and NAME.count."""


def ratio_of(metric: str, keys: Mapping[str, float]) -> Ratio | None:
    """How ``metric`` follows from sums, if it does for outcomes with these metrics."""
    rule = RATIOS.get(metric) or Ratio(f"{metric}.sum", f"{metric}.count", float, lambda _: 1.0)
    return rule if metric not in keys and rule.above in keys and rule.below in keys else None


def metrics_of(outcomes: Sequence[Outcome]) -> list[str]:
    """All metrics that the outcomes lead to, in the order of their first appearance; sums that make a ratio are none."""
    keys = {key: 0.0 for outcome in outcomes for key in outcome.metrics}
    ratios = [name for name in [*RATIOS, *(key.removesuffix(".sum") for key in keys if key.endswith(".sum"))] if ratio_of(name, keys)]
    parts = {part for name in ratios if (rule := ratio_of(name, keys)) for part in (rule.above, rule.below)}
    return [key for key in keys if key not in parts] + ratios


def means(result: TaskResult) -> dict[str, float]:
    """The value of each metric of a task."""
    return {name: value.value for name in metrics_of(result.outcomes) if (value := estimate(result.outcomes, name))}


def estimate(outcomes: Sequence[Outcome], metric: str) -> Estimate | None:
    """``metric`` over the items that have a finite value of it; None if none has."""
    used = finite(outcomes, metric)
    if not used:
        return None
    clusters = clusters_of(used)
    rule = ratio_of(metric, used[0].metrics)
    if rule:
        above, below = _column(used, rule.above), _column(used, rule.below)
        return ratio(above, below, rule.transform, clusters, is_share=metric not in RATIOS and are_shares(above, below))
    return mean(_column(used, metric), clusters)


def estimate_macro(outcomes: Sequence[Outcome], metric: str) -> Estimate | None:
    """Mean over categories of the mean over the items of each; None for ratios of sums, and where ``estimate`` is None."""
    used = finite(outcomes, metric)
    if not used or ratio_of(metric, used[0].metrics):
        return None
    strata: dict[str, list[Outcome]] = {}
    for outcome in used:
        strata.setdefault(outcome.category, []).append(outcome)
    return macro([(_column(items, metric), clusters_of(items)) for items in strata.values()])


def finite(outcomes: Sequence[Outcome], metric: str) -> list[Outcome]:
    """The outcomes from which ``metric`` can be computed."""

    def has(outcome: Outcome) -> bool:
        rule = ratio_of(metric, outcome.metrics)
        keys = (rule.above, rule.below) if rule else (metric,)
        return all(math.isfinite(outcome.metrics.get(key, math.nan)) for key in keys)

    return [outcome for outcome in outcomes if has(outcome)]


def clusters_of(outcomes: Sequence[Outcome]) -> list[str] | None:
    """The cluster of each outcome, or None if no two outcomes share one."""
    names = [f"={name}" if (name := outcome.detail.get("cluster")) is not None else outcome.id for outcome in outcomes]
    return names if len(set(names)) < len(names) else None


def mean(values: Sequence[float] | Floats, clusters: Clusters = None) -> Estimate:
    """Mean of ``values``: Wilson's interval if all are 0 or 1, else Student's t, of shares (all from 0 to 1) not beyond these.

    In clusters, Wilson's is that of the effective number of items, n / design effect, with the t quantile of the number of
    clusters (Korn and Graubard 1998, Survey Methodology 24, for Clopper-Pearson's; Dean and Pagano 2015 for Wilson's).
    """
    column = np.asarray(values, dtype=np.float64)
    count, value = len(column), float(column.mean())
    groups = count if clusters is None else len(set(clusters))
    variance = variance_of_sum(column - value, clusters) / count**2
    if not is_binary(column):
        return _student(value, variance, groups - 1, count, groups, is_share=are_shares(column))
    if clusters is None:
        return _wilson(value, count, count, count, Z)
    if groups < 2:
        return Estimate(value, None, None, count, groups, "none")
    effective = effective_count(count, groups, value * (1 - value) / (count - 1), variance)
    return _wilson(value, effective, count, groups, t_quantile(groups - 1))


def ratio(
    above: Sequence[float] | Floats,
    below: Sequence[float] | Floats,
    transform: Callable[[float], float],
    clusters: Clusters = None,
    *,
    is_share: bool = False,
) -> Estimate:
    """Transform of sum(above) / sum(below), with the delta method's interval (Cochran 1977, Sampling Techniques, chapter 6).

    Without negative terms the ratio is taken as not below 0, and if it ``is_share`` as not above 1.
    """
    numerators, denominators = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    total = float(denominators.sum())
    value = float(numerators.sum()) / total
    groups = len(numerators) if clusters is None else len(set(clusters))
    variance = variance_of_sum(numerators - value * denominators, clusters) / total**2
    plain = _student(value, variance, groups - 1, len(numerators), groups, is_share=is_share)
    if plain.low is None or plain.high is None:
        return Estimate(transform(value), None, None, plain.count, groups, "none")
    low = max(plain.low, 0.0) if numerators.min() >= 0 else plain.low
    return Estimate(transform(value), transform(low), transform(plain.high), plain.count, groups, "ratio")


def macro(strata: Sequence[tuple[Sequence[float] | Floats, Clusters]]) -> Estimate:
    """Unweighted mean of the means of ``strata``, each of which is sampled by itself (Cochran 1977, chapter 5).

    0/1 values get Wilson's interval of the number of items that would give this variance, and in clusters t, as in ``mean``.
    There is no interval if a stratum has a single item or cluster, whose variance is unknown.
    """
    columns = [np.asarray(values, dtype=np.float64) for values, _ in strata]
    value = float(np.mean([column.mean() for column in columns]))
    groups = [len(column) if names is None else len(set(names)) for column, (_, names) in zip(columns, strata, strict=True)]
    count = sum(len(column) for column in columns)
    if len(strata) == 1:
        return mean(*strata[0])
    if min(groups) < 2:
        return Estimate(value, None, None, count, sum(groups), "none")
    parts = [variance_of_sum(column - column.mean(), names) / len(column) ** 2 for column, (_, names) in zip(columns, strata, strict=True)]
    variance = sum(parts) / len(parts) ** 2
    freedom = sum(groups) - len(groups)
    if not all(is_binary(column) for column in columns):
        return _student(value, variance, freedom, count, sum(groups), is_share=all(are_shares(column) for column in columns))
    # As many items, and clusters, as would be if each stratum had the same number of them.
    most, least = (len(sizes) ** 2 / sum(1 / size for size in sizes) for sizes in ([len(column) for column in columns], groups))
    effective = effective_count(most, least, value * (1 - value) / most, variance)
    return _wilson(value, effective, count, sum(groups), Z if count == sum(groups) else t_quantile(freedom))


def is_binary(values: Floats) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def are_shares(above: Floats, below: float | Floats = 1.0) -> bool:
    """Whether each of ``above`` is a part of ``below``."""
    return bool(np.all((above >= 0) & (above <= below)))


def effective_count(count: float, groups: float, plain: float, clustered: float) -> float:
    """As how many independent items ``count`` items in ``groups`` clusters count, by the variances without and with clusters.

    Not more than there are; and as many as clusters where nothing varies, which says nothing about how alike items of one are.
    """
    return min(count, plain / clustered * count) if clustered > 1e-12 * plain else groups


def variance_of_sum(residuals: Floats, clusters: Clusters = None) -> float:
    """Estimated variance of a sum whose terms less their means are ``residuals``; 0 for a single cluster.

    Sum over clusters of (sum of the residuals of a cluster)^2, times G / (G - 1) for G clusters (Miller 2024, section 2.2).
    """
    if clusters is not None:
        _, where = np.unique(np.asarray(clusters), return_inverse=True)
        residuals = np.bincount(where, weights=residuals).astype(np.float64)
    size = len(residuals)
    return 0.0 if size < 2 else float(np.square(residuals).sum()) * size / (size - 1)


def t_p_value(difference: float, variance: float, clusters: int) -> float | None:
    """Two-sided p value of a difference from 0 with this variance of ``clusters`` clusters; None if nothing can be said.

    Where all clusters differ by the same, t says nothing; it is the chance then that the signs of all agree (the sign test).
    """
    if clusters < 2:
        return None
    if variance <= _NOTHING * difference**2:
        return 1.0 if difference == 0 else 2.0 ** (1 - clusters)
    return _t_tails(difference / math.sqrt(variance), clusters - 1)


@lru_cache(maxsize=4096)
def t_quantile(freedom: int) -> float:
    """The t beyond whose two sides Student's distribution has 1 - CONFIDENCE."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tails(middle, freedom) > 1 - CONFIDENCE else (low, middle)
    return (low + high) / 2


def _column(outcomes: Sequence[Outcome], key: str) -> Floats:
    return np.array([outcome.metrics[key] for outcome in outcomes], dtype=np.float64)


def _student(value: float, variance: float, freedom: int, count: int, groups: int, *, is_share: bool) -> Estimate:
    if freedom < 1:
        return Estimate(value, None, None, count, groups, "none")
    half = t_quantile(freedom) * math.sqrt(variance)
    low, high = (max(0.0, value - half), min(1.0, value + half)) if is_share else (value - half, value + half)
    return Estimate(value, low, high, count, groups, "t")


def _wilson(value: float, effective: float, count: int, groups: int, z: float) -> Estimate:
    """Wilson 1927, JASA 22:209, for a share ``value`` of ``effective`` items."""
    scale = 1 + z**2 / effective
    centre = (value + z**2 / (2 * effective)) / scale
    half = z * math.sqrt(value * (1 - value) / effective + z**2 / (4 * effective**2)) / scale
    low = 0.0 if value == 0 else max(0.0, centre - half)
    high = 1.0 if value == 1 else min(1.0, centre + half)
    return Estimate(value, low, high, count, groups, "Wilson")


def _t_tails(t: float, freedom: int) -> float:
    """P(|T| > |t|) for Student's T: the regularised incomplete beta function I_x(freedom / 2, 1 / 2), x = freedom / (freedom + t^2)."""
    if freedom > 100_000:  # the normal distribution differs by less than 1e-5 there
        return math.erfc(abs(t) / math.sqrt(2))
    x = freedom / (freedom + t * t)
    a, b = freedom / 2, 0.5
    if x == 1:
        return 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), from its front by Lentz's method."""
    tiny = 1e-300
    numerator, denominator = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    value = denominator
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            denominator = 1 / (1 + step * denominator or tiny)
            numerator = 1 + step / numerator or tiny
            value *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-15:
            return value
    raise AssertionError(f"the incomplete beta function did not converge at {a}, {b}, {x}")
