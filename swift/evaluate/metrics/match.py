"""Equality of answers, and the words that they share.

Normalisation and F1 are those of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1): lower case, no punctuation, no
articles, single spaces. In Chinese, which has no spaces, each character is a word (as in CMRC 2018, arXiv:1810.07366).
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable

from swift.evaluate.characters import HAN
from swift.evaluate.extract.number import value_of
from swift.evaluate.judging import Judged, Metric, Setting, Verdict

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def by_equality(name: str, is_equal: Callable[[str, str], bool]) -> Callable[[Setting], Metric]:
    """What makes a metric that is 1 where something was found that equals a right answer."""

    def make(setting: Setting) -> Metric:
        setting.take()

        def judge(judged: Judged) -> Verdict:
            found = judged.found.value
            return Verdict({name: float(found is not None and any(is_equal(found, gold) for gold in judged.golds))})

        return Metric((name,), judge)

    return make


def make_f1(setting: Setting) -> Metric:
    """``f1`` of words with the right answer that it fits best."""
    setting.take()

    def judge(judged: Judged) -> Verdict:
        found = judged.found.value
        return Verdict({"f1": 0.0 if found is None else max((word_f1(found, gold) for gold in judged.golds), default=0.0)})

    return Metric(("f1",), judge)


def normalised(text: str) -> str:
    """See the top of this file. Punctuation of all scripts goes, since full-width signs are punctuation too."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation and not unicodedata.category(char).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def words(text: str) -> list[str]:
    """Words of a normalised text; each Chinese or Japanese character is one."""
    return re.findall(rf"[{HAN}]|[^\s{HAN}]+", normalised(text))


def word_f1(found: str, gold: str) -> float:
    """2 P R / (P + R) of the words as bags; two texts without words are equal."""
    ours, theirs = words(found), words(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def equal(found: str, gold: str) -> bool:
    """Equal numbers, or equal after normalisation, which would make 25 of 2.5."""
    left, right = value_of(found), value_of(gold)
    return left == right if left is not None and right is not None else normalised(found) == normalised(gold)


def same_text(found: str, gold: str) -> bool:
    """Equal letter for letter, but for case and white space."""
    return " ".join(found.split()).casefold() == " ".join(gold.split()).casefold()


make_acc = by_equality("acc", same_text)
make_exact_match = by_equality("exact_match", equal)
