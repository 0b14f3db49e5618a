r"""Equality of numbers and of mathematical expressions.

Expressions are compared as text after the ways to write them are made one (\dfrac and \frac, \left, units, "x ="), and as
exact numbers where they are numbers. No algebra is done: (x+1)^2 and x^2+2x+1 count as different, so the share of right
answers is a lower bound.
"""

import re
from fractions import Fraction

from swift.evaluate.extract.number import value_of
from swift.evaluate.metrics.match import by_equality

_GROUP = r"\{([^{}]*)\}"


def same_number(one: str, other: str) -> bool:
    """The same rational number (5, 5.0, 5.00; 1/2 and 0.5). False also if one of both is no number."""
    left, right = value_of(one), value_of(other)
    return left is not None and left == right


def same_math(one: str, other: str) -> bool:
    """See the top of this file. Tuples and sets written with commas are compared part by part, in their order."""
    left, right = plain_math(one), plain_math(other)
    if left == right:
        return bool(left)
    ours, theirs = _parts(left), _parts(right)
    if len(ours) == 1 or len(ours) != len(theirs) or (left[:1], left[-1:]) != (right[:1], right[-1:]):
        return _same_value(left, right)
    return all(a == b or _same_value(a, b) for a, b in zip(ours, theirs, strict=True))


def plain_math(text: str) -> str:
    """``text`` in one way of writing, without white space."""
    made = text.strip().lstrip("$").rstrip("$. ")
    made = re.sub(r"(?<!\\)\\ ", "", made).replace("\\\\", "\\")  # a space by name; then the end of a row, spaces around it or not
    made = re.sub(r"\\(?:(?:left|right|displaystyle)(?![a-z])|[!,;:>])", "", made).replace("{,}", ",")
    made = re.sub(
        r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{\s*(?:cm|mm|m|km|kg|g|s|inches|inch|feet|units?|degrees?|hours?|dollars?)?\s*\}"
        r"(?:\s*\^\s*\{?\d\}?)?\s*$",
        "",
        made,
    )
    made = re.sub(r"(?<=[\d}])\s*\\(?:text|mbox)\s*\{\s[a-zA-Z. ]*\}(?:\s*\^\s*\{?\d\}?)?\s*$", "", made)  # any other unit
    made = re.sub(rf"\\(?:text|mathrm|mathbf|textbf|mbox)\s*{_GROUP}", r"\1", made)
    made = made.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cdot", "*").replace("\\times", "*")
    made = made.replace("^\\circ", "").replace("^{\\circ}", "").replace("\\%", "").replace("%", "").replace("\\$", "")
    made = re.sub(r"\\frac(?:\s*(\d)|\s+([a-z]))\s*(?=[\da-z{])", r"\\frac{\1\2}", made)
    made = re.sub(rf"\\frac\s*{_GROUP}\s*([\da-z])", r"\\frac{\1}{\2}", made)
    made = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", made)
    made = re.sub(r"\s+", "", made)
    made = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", made)
    return re.sub(r"^[a-zA-Z]=", "", made)


def _parts(text: str) -> list[str]:
    """Parts between the commas that stand in no braces or inner brackets."""
    inner = text[1:-1] if text[:1] in ("(", "[") and text[-1:] in (")", "]") else text
    parts, depth = [""], 0
    for char in inner:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _same_value(one: str, other: str) -> bool:
    left, right = _value(one), _value(other)
    return left is not None and left == right


def _value(text: str) -> Fraction | None:
    match = re.fullmatch(rf"(-?)\\frac{_GROUP}{_GROUP}", text)
    if match is None:
        return value_of(text)
    top, bottom = value_of(match[2]), value_of(match[3])
    if top is None or not bottom:
        return None
    return (-1 if match[1] else 1) * top / bottom


make_number = by_equality("acc", same_number)
make_math = by_equality("acc", same_math)
