r"""The number, or the value in LaTeX, that a written answer ends with.

Rules in their order: behind #### (the first, since what follows a final answer is another question), \boxed{} (the last),
"the answer is" (the last), the last number.
"""

import re
import unicodedata
from fractions import Fraction

from swift.evaluate.judging import Extractor, Found, Question, Setting

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d{4})|\d+)(?:\.\d+)?|\.\d+"
_FRACTION = r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"
# A sign counts where no other number, letter or closing bracket stands before it: 7-3 ends with 3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}%.])[-−–+]\s?)?(?:(?:[$€£¥￥]|\\\$)\s?(?P<inner>-)?)?"
    rf"(?:{_FRACTION}|(?P<top>(?<![\d/])\d+)\s?/\s?(?P<bottom>\d+)(?![\d/])|(?P<plain>{_DIGITS})(?P<power>[eE][-+]?\d+)?)"
)
_FINAL = re.compile(
    r"(?:answer|result|total)\b[^.\n#]{0,40}?(?:\bis\b|:|=)|答案\s*(?:应该|应|就)?(?:是|为|:|：)+|(?:^|\n)\s*Answer\s*:", re.I
)


def make(setting: Setting) -> Extractor:
    """The value found is written without commas, currency and units: "-3", "2.5", "3/4"."""
    setting.take()
    return _number


def make_math(setting: Setting) -> Extractor:
    """The text inside the last \\boxed{}, else what is behind the last "answer is", else the last number."""
    setting.take()
    return _math


def _number(text: str, question: Question) -> Found:
    plain = unicodedata.normalize("NFKC", text)
    if not plain.strip():
        return Found(None, "the answer is empty")
    marked = re.search(r"####\s*([^\n]*)", plain)
    if marked is not None and (value := _first(marked[1])) is not None:
        return Found(value, "####")
    if (inside := boxed(plain)) is not None and (value := _first(inside)) is not None:
        return Found(value, "boxed")
    for match in reversed(list(_FINAL.finditer(plain))):
        if (value := _first(plain[match.end() : match.end() + 60].split("\n")[0])) is not None:
            return Found(_last(_sentence(plain[match.end() :])) or value, "statement")
    value = _last(plain)
    return Found(value, "last number") if value is not None else Found(None, "no number")


def _sentence(text: str) -> str:
    """Up to the end of a sentence: "The answer is 3 + 4 = 7. Next" ends with 7."""
    return re.split(r"\n|(?<!\d)[.。]|[.。](?!\d)", text, maxsplit=1)[0] if "=" in text.split("\n")[0] else ""


def _math(text: str, question: Question) -> Found:
    if not text.strip():
        return Found(None, "the answer is empty")
    if (inside := boxed(text)) is not None:
        return Found(inside.strip(), "boxed") if inside.strip() else Found(None, "the box is empty")
    said = re.findall(r"(?:answer is|answer:|答案是|答案为|答案[:：])\s*:?\s*([^\n]+)", text, re.IGNORECASE)
    if said and (value := re.split(r"\.(?:\s|$)|。", said[-1])[0].strip()):
        return Found(value, "statement")
    value = _last(text)
    return Found(value, "last number") if value is not None else Found(None, "neither a box nor a number")


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
    """The number that ``text`` is: commas, currency, a sign, a fraction and a per cent sign (which is left out) are known."""
    bare = unicodedata.normalize("NFKC", text).strip().strip("$€£¥%").replace(",", "").replace("−", "-").replace("\\", "").rstrip(". %")
    bare = re.sub(r"^([-+]?)[$€£¥]", r"\1", bare)
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None
