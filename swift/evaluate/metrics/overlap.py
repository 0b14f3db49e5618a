"""What a text shares with a reference: ROUGE, BLEU and chrF of one answer each, from 0 to 1; a task's result is their mean.

ROUGE: Lin 2004 (F1; words are lower case, without punctuation, not stemmed). BLEU: Papineni et al. 2002 with mteval-13a's words,
n-grams up to 4, exponential smoothing (Chen and Cherry 2014, method 3) and, for short answers, only orders that occur, as
sacrebleu does for sentences. chrF: Popovic 2015, characters up to 6, beta 2. In Chinese and Japanese each character is a word.
BLEU is meant for a whole corpus; a mean over sentences is another number and must not be compared with published ones.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from swift.evaluate.characters import HAN
from swift.evaluate.judging import Judged, Metric, Setting, Verdict

ORDER, CHARACTERS, BETA = 4, 6, 2


def make_rouge(setting: Setting) -> Metric:
    """``rougeL``, ``rouge1`` and ``rouge2``."""
    return _best(setting, {"rougeL": rouge_l, "rouge1": lambda a, b: rouge_n(a, b, 1), "rouge2": lambda a, b: rouge_n(a, b, 2)})


def make_bleu(setting: Setting) -> Metric:
    """``bleu``."""
    return _best(setting, {"bleu": bleu})


def make_chrf(setting: Setting) -> Metric:
    """``chrf``."""
    return _best(setting, {"chrf": chrf})


def _best(setting: Setting, kinds: dict[str, Callable[[str, str], float]]) -> Metric:
    """With the reference that fits best, each by itself."""
    setting.take()

    def judge(judged: Judged) -> Verdict:
        text = judged.found.value or ""
        return Verdict({name: max((kind(text, gold) for gold in judged.golds), default=0.0) for name, kind in kinds.items()})

    return Metric(tuple(kinds), judge)


def rouge_words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, each Chinese character by itself."""
    return re.findall(rf"[{HAN}]|[^\W_{HAN}]+", text.lower())


def rouge_n(text: str, reference: str, order: int) -> float:
    """F1 of n-grams."""
    ours, theirs = _grams(rouge_words(text), order), _grams(rouge_words(reference), order)
    return _f1(sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values()))


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    ours, theirs = rouge_words(text), rouge_words(reference)
    return _f1(_common(ours, theirs), len(ours), len(theirs))


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for place, other in enumerate(theirs, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _grams(parts: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(parts[place : place + order]) for place in range(len(parts) - order + 1))


def bleu_words(text: str) -> list[str]:
    """Words as mteval-13a cuts them, with Chinese characters apart; case is kept."""
    made = re.sub(rf"([{HAN}，。！？；：、（）《》“”])", r" \1 ", f" {text} ")
    made = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", made)
    made = re.sub(r"([^0-9])([.,])", r"\1 \2 ", made)
    made = re.sub(r"([.,])([^0-9])", r" \1 \2", made)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", made).split()


def bleu(text: str, reference: str) -> float:
    """Of one sentence with one reference."""
    ours, theirs = bleu_words(text), bleu_words(reference)
    logs: list[float] = []
    smooth = 1.0
    for order in range(1, ORDER + 1):
        have = _grams(ours, order)
        if not (total := sum(have.values())):
            break
        common = sum((have & _grams(theirs, order)).values())
        if order == 1 and not common:
            return 0.0
        if not common:
            smooth *= 2
        logs.append(math.log(common / total if common else 1 / (smooth * total)))
    if not logs:
        return 0.0
    brevity = min(0.0, 1 - len(theirs) / len(ours))
    return math.exp(brevity + sum(logs) / len(logs))


def chrf(text: str, reference: str) -> float:
    """F of characters: precision and recall are means over the orders that both texts have."""
    ours, theirs = ("".join(one.split()) for one in (text, reference))
    precisions: list[float] = []
    recalls: list[float] = []
    for order in range(1, CHARACTERS + 1):
        have, want = (Counter(one[place : place + order] for place in range(len(one) - order + 1)) for one in (ours, theirs))
        if have and want:
            common = sum((have & want).values())
            precisions.append(common / sum(have.values()))
            recalls.append(common / sum(want.values()))
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
