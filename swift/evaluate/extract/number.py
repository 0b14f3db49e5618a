r"""The number, or the value in LaTeX, that a written answer ends with.

Rules in their order: right behind #### (the first, since what follows a final answer is another question; not in a heading,
"#### 1. Add"), \boxed{} (the last), "the answer is" (the last), the last number.
"""

import re
from fractions import Fraction

from swift.evaluate.characters import narrow
from swift.evaluate.extract.parts import stated
from swift.evaluate.judging import Extractor, Found, Question, Setting

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d{4})|\d+)(?:\.\d+)?|\.\d+"
_FRACTION = r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"
# A sign counts where no other number, letter or closing bracket stands before it: 7-3 ends with 3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}%.])[-−–+]\s?)?(?:(?:[$€£¥￥]|\\\$)\s?(?P<inner>-)?)?"
    rf"(?:{_FRACTION}|(?P<top>(?<![\d/])\d+)\s?/\s?(?P<bottom>\d+)(?![\d/])|(?P<plain>{_DIGITS})(?P<power>[eE][-+]?\d+)?)"
)
_MARKED = re.compile(r"####\s*\**(?!\d+[.)]\s+[^\W\d])([^\n]*)")
_FINAL = re.compile(r"\banswers?\b[^.\n#]{0,40}?(?:\bis\b|:|=)|答案\s*(?:应该|应|就)?(?:是|为|:|：)+", re.IGNORECASE)
_NEAR = 60  # characters between "the answer is" and the number


def make(setting: Setting) -> Extractor:
    """The value found is written without commas, currency and units: "-3", "2.5", "3/4"."""
    setting.take()
    return _number


def make_math(setting: Setting) -> Extractor:
    """The text inside the last \\boxed{}, else what is behind the last "answer is", else the last number."""
    setting.take()
    return _math


def _number(text: str, question: Question) -> Found:
    plain = narrow(text)
    if not plain.strip():
        return Found(None, "the answer is empty")
    for marked in _MARKED.finditer(plain):
        if number := _NUMBER.match(marked[1]):
            return Found(_written(number), "####")
    if (inside := boxed(plain)) is not None and (value := _first(inside)) is not None:
        return Found(value, "boxed")
    for match in reversed(list(_FINAL.finditer(plain))):
        line = plain[match.end() :].split("\n", 1)[0]
        if (number := _NUMBER.search(line)) and number.start() < _NEAR:
            return Found(_last(_sentence(line)) or _written(number), "statement")
    value = _last(plain)
    return Found(value, "last number") if value is not None else Found(None, "no number")


def _sentence(line: str) -> str:
    """Up to the end of a sentence that reckons: "The answer is 3 + 4 = 7. Next" ends with 7."""
    return re.split(r"(?<!\d)[.。]|[.。](?!\d)", line, maxsplit=1)[0] if "=" in line else ""


def _math(text: str, question: Question) -> Found:
    if not text.strip():
        return Found(None, "the answer is empty")
    if (inside := boxed(text)) is not None:
        return Found(inside.strip(), "boxed") if inside.strip() else Found(None, "the box is empty")
    if value := re.split(r"\.(?:\s|$)|。", stated(text) or "")[0].strip(" *"):
        return Found(value, "statement")
    found = _last(text)
    return Found(found, "last number") if found is not None else Found(None, "neither a box nor a number")


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} or \fbox{} holds, with balanced braces; None if there is none that ends."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            if word := re.match(r"[^\s$]+", rest):
                return word[0]
            continue
        depth = 0
        for place, char in enumerate(rest):
            depth += (char == "{") - (char == "}")
            if not depth:
                return rest[1:place]
    return None


def _first(text: str) -> str | None:
    match = _NUMBER.search(text)
    return None if match is None else _written(match)


def _last(text: str) -> str | None:
    found = list(_NUMBER.finditer(text))
    return _written(found[-1]) if found else None


def _written(match: re.Match[str]) -> str:
    sign = "-" if (match["sign"] or "").strip() in ("-", "−", "–") or match["inner"] else ""
    if match[3] is not None:
        return f"{sign}{match[3]}/{match[4]}"
    if match["top"] is not None:
        return f"{sign}{match['top']}/{match['bottom']}"
    digits = match["plain"].replace(",", "")
    return sign + ("0" + digits if digits.startswith(".") else digits) + (match["power"] or "")


def value_of(text: str) -> Fraction | None:
    """The number that ``text`` is: commas of thousands, currency, a sign, a fraction and a per cent sign (which is left out) are known.

    An exponent of four digits or more is none that a task means, and a fraction of that size would fill the memory.
    """
    bare = narrow(text).strip().strip("$€£¥￥%").replace("−", "-").replace("\\", "").rstrip(". %")
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare)
    bare = re.sub(r"^([-+]?)[$€£¥￥]", r"\1", bare)
    if re.search(r"[eE][-+]?[\d_]{4}", bare):
        return None
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None
