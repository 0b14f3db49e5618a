"""ROUGE, BLEU and chrF of single answers, beside rouge_score 0.1.2 and sacrebleu 2.6.0 (divided by 100)."""

import pytest

from swift.evaluate.judging import Found, Judged, Setting
from swift.evaluate.metrics import METRICS
from swift.evaluate.metrics.overlap import bleu, chrf, rouge_l, rouge_n

# (answer, reference, rougeL, rouge1, rouge2, bleu, chrf). rouge_score: no stemmer; for Chinese its tokenizer was one of characters.
# sacrebleu: sentence_score with effective order; tokenize 13a, and zh for Chinese.
PAIRS = [
    ("The cat sat on the mat.", "The cat is on the mat.", 0.833333, 0.833333, 0.6, 0.488923, 0.671727),
    (
        "It is snowing heavily in Nanjing today, so stay at home.",
        "Heavy snow is falling in Nanjing today; please stay home.",
        *(0.571429, 0.571429, 0.210526, 0.157278, 0.461557),
    ),
    ("snow", "snow", 1, 1, 0, 1, 1),
    ("snow ice", "rain", 0, 0, 0, 0, 0.108696),
    ("The answer is 3.5, not 3,000!", "The answer is 3.5 or 3,000.", 0.875, 0.875, 0.714286, 0.365555, 0.701293),
    ("a b c d e f", "a b c d e f g h", 0.857143, 0.857143, 0.833333, 0.716531, 0.646541),
    ("Hello world", "Hello there world, how are you?", 0.5, 0.5, 0, 0.035205, 0.241571),
    ("Sure - it's well-known (really).", "It's well known, really.", 0.909091, 0.909091, 0.888889, 0.065673, 0.516682),
    ("南京今天有大雪。", "南京今天会有大雪，请注意。", 0.777778, 0.777778, 0.625, 0.276716, 0.255496),
    ("今天下雨", "明天晴天", 0.25, 0.25, 0, 0.159736, 0.0625),
    ("南京GDP增长5.2%。", "南京的GDP增长了5.2%。", 0.875, 0.875, 0.571429, 0.305924, 0.449957),
]


@pytest.mark.parametrize(("text", "reference", "l", "one", "two", "of_bleu", "of_chrf"), PAIRS)
def test_overlap_is_that_of_the_libraries(text, reference, l, one, two, of_bleu, of_chrf):  # noqa: E741
    found = rouge_l(text, reference), rouge_n(text, reference, 1), rouge_n(text, reference, 2), bleu(text, reference), chrf(text, reference)
    assert found == pytest.approx((l, one, two, of_bleu, of_chrf), abs=1e-6)


def test_an_empty_answer_shares_nothing():
    assert [kind("", "snow") for kind in (rouge_l, bleu, chrf)] == [0, 0, 0]
    assert [kind("snow", "") for kind in (rouge_l, bleu, chrf)] == [0, 0, 0]


def test_the_reference_that_fits_best_counts():
    metric = METRICS.get("rouge")(Setting("t"))
    assert metric.judge(Judged("snow", Found("snow", "text"), ("rain", "snow"))).metrics == {"rougeL": 1.0, "rouge1": 1.0, "rouge2": 0.0}
    assert metric.names == ("rougeL", "rouge1", "rouge2")
