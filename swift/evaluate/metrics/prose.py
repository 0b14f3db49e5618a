"""Sentences and words of English prose, counted as nltk counts them as far as rules without its trained tables can."""

import re

# Behind these a full stop ends no sentence.
_SHORT = frozenset(
    "mr mrs ms dr prof rev hon st jr sr gen col capt lt sgt maj gov sen rep pres inc co corp ltd bros vs approx dept est fig"
    " jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun ave blvd rd mt ft e.g i.e a.m p.m u.s u.k u.n"
    " d.c ph.d b.a m.a vol ed eds cf al no".split()
)
# Words that begin a sentence even so.
_STARTERS = frozenset("the a an this that these those it he she they we i you in on at but and however if when as there his her".split())
_END = re.compile(r"(\S*?)([.?!]+)([\"'”’)\]}*_]*)(?=\s+(\S+)|\s*$)")
_CONTRACTION = re.compile(r"(?i)^(.+?)(n't|'(?:s|m|d|ll|re|ve))$")
_JOINED = {"cannot": 2, "gimme": 2, "gonna": 2, "gotta": 2, "lemme": 2, "wanna": 2}


def count_sentences(text: str) -> int:
    """A sentence ends with . ? or ! before white space, whatever follows; new lines alone end none.

    No sentence ends behind an abbreviation or a single initial, unless a word that begins sentences follows.
    """
    count, begin = 0, 0
    for match in _END.finditer(text):
        word, signs, _, follower = match.groups()
        if signs == "." and follower is not None and not _ends(word, follower):
            continue
        if set(signs) == {"."} and len(signs) > 1 and follower is not None and not follower.lstrip("\"'“‘([*_")[:1].isupper():
            continue  # an ellipsis within a sentence
        count += bool(text[begin : match.end()].strip())
        begin = match.end()
    return count + bool(text[begin:].strip())


def _ends(word: str, follower: str) -> bool:
    bare = word.lstrip("\"'“‘([*_").lower()
    next_word = follower.strip("\"'“”‘’()[]*_,.;:!?")
    if bare in _SHORT or re.fullmatch(r"(?:[a-z]\.)+[a-z]", bare):
        return next_word[:1].isupper() and next_word.lower() in _STARTERS
    return not (re.fullmatch("[a-z]", bare) and bare != "i" and next_word[:1].isupper())


def count_words(text: str) -> int:
    r"""Runs of \\w."""
    return len(re.findall(r"\w+", text))


def capital_words(text: str) -> list[str]:
    """Words in capitals, cut as in the Penn Treebank: hyphens and slashes join, contractions and punctuation are cut off."""
    found: list[str] = []
    for word in re.split(r"[\s;@#$%&?!\"“”()\[\]{}<>]+|,(?!\d)|:(?!\d)|--+|\.\.+", text):
        parts = [word.rstrip(".'’") if not re.fullmatch(r"(?:\w\.)+", word) else word]
        while (match := _CONTRACTION.match(parts[0].replace("’", "'"))) is not None:
            parts = [match[1], match[2], *parts[1:]]
        parts *= _JOINED.get(parts[0].lower(), 1)
        found += [part for part in parts if part.isupper()]
    return found
