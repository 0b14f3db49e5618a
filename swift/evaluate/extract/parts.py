"""A part of an answer as it is: text, a line, a match, code, yes or no, JSON."""

import json
import re
from typing import Any

from swift.errors import ConfigError
from swift.evaluate.judging import Extractor, Found, Question, Setting

_EMPTY = "the answer is empty"
_FENCE = re.compile(r"^([ \t]*)(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\2[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")


def stated(text: str) -> str | None:
    """What stands behind the last "the answer is", up to the end of its line."""
    said = re.findall(r"(?:answer is|answer:|答案是|答案为|答案[:：])\s*:?\s*([^\n]+)", text, re.IGNORECASE)
    return said[-1] if said else None


def make_text(setting: Setting) -> Extractor:
    """All of it, without white space at both ends."""
    setting.take()
    return lambda text, question: Found(text.strip(), "text") if text.strip() else Found(None, _EMPTY)


def make_first_line(setting: Setting) -> Extractor:
    """The first line that is not empty."""
    setting.take()

    def extract(text: str, question: Question) -> Found:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return Found(lines[0], "first line") if lines else Found(None, _EMPTY)

    return extract


def make_regex(setting: Setting) -> Extractor:
    """A match of ``pattern``, its first group that took part if it has any: number ``select``, the last one by default (-1)."""
    setting.take("pattern", "select", "ignore_case")
    try:
        pattern = re.compile(str(setting.options["pattern"]), re.IGNORECASE if setting.options.get("ignore_case") else 0)
    except KeyError:
        raise ConfigError(f"task {setting.task}: the extractor regex needs a pattern") from None
    except re.error as problem:
        raise ConfigError(f"task {setting.task}: {setting.options['pattern']!r} is no regular expression: {problem}") from None
    select = setting.options.get("select", -1)
    if not isinstance(select, int):
        raise ConfigError(
            f"task {setting.task}: select of the extractor regex is {select!r}", hint="give a whole number: 0, 1, or -1 for the last"
        )

    def extract(text: str, question: Question) -> Found:
        found = list(pattern.finditer(text))
        if not -len(found) <= select < len(found):
            return Found(None, "no match" if not found else f"{len(found)} matches")
        match = found[select]
        return Found(next((group for group in match.groups() if group is not None), match[0]).strip(), "regex")

    return extract


def make_code(setting: Setting) -> Extractor:
    """Python: the fenced block that defines the function ``entry_point`` of the row, else the first block, else the answer itself."""
    setting.take()

    def extract(text: str, question: Question) -> Found:
        if not text.strip():
            return Found(None, _EMPTY)
        if _goes_on(text):
            return Found(text.split("\n```")[0].rstrip(), "text")
        # In a list, fence and code are indented alike, and the code by itself is not.
        found = [(kind, re.sub(f"^{indent}", "", body, flags=re.MULTILINE)) for indent, _, kind, body in _FENCE.findall(text)]
        blocks = [body for kind, body in found if kind.lower() in _PYTHON and body.strip()]
        name = question.fields.get("entry_point")
        defining = [body for body in blocks if name and re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(str(name))}\b", body, re.MULTILINE)]
        if defining:
            return Found(defining[-1], "code block")
        if blocks:
            return Found(blocks[0], "code block")
        if _FENCE.search(text):
            return Found(None, "no code block of Python")
        return Found(text.rstrip(), "text")

    return extract


def _goes_on(text: str) -> bool:
    """Whether the text goes on with the code of the prompt, up to a fence that ends it: code stands before the first one."""
    return re.match(r"\n*(?: {2,}|\t+|def |class |import |from \S+ import |@)\S", text) is not None


def make_yes_no(setting: Setting) -> Extractor:
    """Yes or no, as "yes" or "no", in English or Chinese: at the beginning, else the only one of them that is said."""
    setting.take()
    return _yes_no


_YES = r"\byes\b|(?<!\bnot )(?<!n't )\b(?:true|correct)\b|^是的?|^对的?|^正确|(?:答案|结论)\s*(?:是|为|[:：])\s*(?:是|对|正确)"
_NO = (
    r"\bno\b|\bfalse\b|\bincorrect\b|(?:\bnot|n't) (?:true|correct)\b|^不是|^不对|^否"
    r"|^错误?|^不正确|(?:答案|结论)\s*(?:是|为|[:：])\s*(?:否|不|错)"
)


def _yes_no(text: str, question: Question) -> Found:
    plain = text.strip().lstrip("*_\"'“‘(（ ")
    if not plain:
        return Found(None, _EMPTY)
    for value, pattern in (("no", _NO), ("yes", _YES)):
        if re.match(pattern, plain, re.IGNORECASE):
            return Found(value, "beginning")
    said = re.findall(r"answer(?:\s+is|\s*:)\s*\W*(yes|no|true|false)\b", plain, re.IGNORECASE)
    if said:
        return Found("yes" if said[-1].lower() in ("yes", "true") else "no", "statement")
    has_yes, has_no = (re.search(pattern, plain, re.IGNORECASE | re.MULTILINE) is not None for pattern in (_YES, _NO))
    if has_yes == has_no:
        return Found(None, "both yes and no" if has_yes else "neither yes nor no")
    return Found("yes" if has_yes else "no", "only one of both")


def make_json(setting: Setting) -> Extractor:
    """The first JSON object or list of the answer, written in one form; its member ``key`` if that is given."""
    setting.take("key")
    key = setting.options.get("key")

    def extract(text: str, question: Question) -> Found:
        if not text.strip():
            return Found(None, _EMPTY)
        value = _first_json(text)
        if value is None:
            return Found(None, "no JSON object or list")
        if key is not None:
            if not isinstance(value, dict) or key not in value:
                return Found(None, f"the JSON has no member {key!r}")
            value = value[key]
        return Found(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True), "json")

    return extract


def _first_json(text: str) -> Any:
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[{\[]", text):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
    return None
