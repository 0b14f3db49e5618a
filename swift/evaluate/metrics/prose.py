"""Sentences and words of English prose, counted as nltk counts them as far as rules without its trained tables can."""

import re

# Behind these a full stop ends no sentence.
_SHORT = frozenset(
    "mr mrs ms dr prof rev hon st jr sr gen col capt lt sgt maj gov sen rep pres inc co corp ltd bros vs approx dept"
    " jan feb aug sep sept oct nov dec ave blvd rd a.m p.m u.s u.k u.n d.c ph.d b.a m.a".split()
)
# Words that begin a sentence even so.
_STARTERS = frozenset(
    "the a an this that these those it he she they we i you in on at but and however if when as there his her with for so oh"
    " let my your our its what how who to of from by after before then now not no yes all some each".split()
)
# A sign counts before white space or one of these signs.
_END = re.compile(r"[.?!]+(?=\s|$|[)\"';}\]*:@({\[])")
_CLOSING = re.compile(r"[\"')\]}]*")
_CONTRACTION = re.compile(r"(?i)^(.+?)(n't|'(?:s|m|d|ll|re|ve))$")
_JOINED = {"cannot": 2, "gimme": 2, "gonna": 2, "gotta": 2, "lemme": 2, "wanna": 2}


def count_sentences(text: str) -> int:
    """How many ``sentences`` there are."""
    return len(sentences(text))


def sentences(text: str) -> list[str]:
    """A sentence ends with . ? or ! before white space or a bracket, quote or colon, whatever follows; new lines alone end none.

    No sentence ends behind an abbreviation or a single initial, unless a word that begins sentences follows, nor behind a number
    or an ellipsis in a sentence that goes on in lower case. Closing quotes and brackets belong to what they close.
    """
    found, begin = [], 0
    for match in _END.finditer(text):
        if set(match[0]) == {"."} and not _ends(text[begin : match.start()], match[0], text[match.end() :].lstrip(" \n\t\"')]}([*_“‘")):
            continue
        found.append(text[begin : match.end()].strip())
        begin = match.end()
    return [one for one in (*found, text[begin:].strip()) if not _CLOSING.fullmatch(one)]


def _ends(before: str, signs: str, after: str) -> bool:
    """Whether full stops between these texts end a sentence."""
    next_word = re.match(r"[^\W_]*", after)[0]  # type: ignore[index]  # it always matches
    if not after:
        return True
    if len(signs) > 1:
        return next_word[:1].isupper()
    word = before.split()[-1].lstrip("\"'“‘([*_").lower() if before.strip() else ""
    if re.fullmatch(r"\d+", word):
        return not next_word[:1].islower()
    if word in _SHORT or (re.fullmatch("[a-z]", word) and word != "i"):
        return next_word[:1].isupper() and next_word.lower() in _STARTERS
    return True


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
