"""The letter of a choice in a written answer, in English or Chinese.

Rules in their order, each of which is tried on the whole answer; the name of the one that found the letter is kept:
boxed, the text of a choice, a statement ("the answer is (B)", the last one counts), a letter at the beginning,
an emphasised letter, the last letter. A letter is never taken out of a word, and neither the article "A" is one.
"""

import re
from collections.abc import Callable, Iterator

from swift.evaluate.characters import narrow
from swift.evaluate.extract.parts import stated
from swift.evaluate.judging import Extractor, Found, Question, Setting

_OPEN = r"[\\\s*_`\"'“‘(\[{$]*"
_CLOSE = r"[\\\s*_`\"'”’)\]}$]*"
# Words that may follow a letter "A" or "I" that is no article and no pronoun.
_AFTER = "because|as|since|is|and|or|for|over|here|was|would|will|seems|fits"
_WIDE = {ord(wide): narrow for wide, narrow in zip("：，．！？；【】", ":,.!?;[]", strict=True)}
_WRONG = r"\s*(?:选项|项)?\s*(?:(?:是|is|are|was)\s*)?(?:不(?!选|是)|错|incorrect|wrong|false|not\b)"

# What stands before a letter that is stated to be the answer.
_BEFORE = (
    r"\banswers?\b(?:[^.\n]{0,60}?)(?:\bis\b|\bbe\b|:|=)\s*:?\s*(?:most likely|probably|therefore|thus|clearly|definitely|indeed)?,?\s*"
    r"(?:the\s+)?(?:correct\s+|right\s+)?(?:option|choice|letter|statement|answer)?\s*",
    r"\A\W*(?:option|choice|选项)\s*",
    r"\banswer\s+(?:option\s+|choice\s+)?",
    r"\b(?:correct|right|best|true)\s+(?:option|choice|statement|one|letter)\b[^.\n]{0,40}?(?:\bis\b|:|=)\s*"
    r"(?:the\s+)?(?:option|choice|letter)?\s*",
    r"\b(?:choose|choosing|chose|select|selected|pick|picked|go with|going with)\s+(?:the\s+)?(?:option|choice|letter|answer)?\s*",
    r"答案\s*(?:应该|应当|应|就|可能|大概|显然)?\s*(?:是|为|选择?|:|=)?\s*:?\s*(?:选项|选择?)?\s*",
    r"正确的?(?:答案|选项|说法|一项|项|描述|表述)?\s*(?:应该|应|就)?\s*(?:是|为|:)\s*:?\s*(?:选项)?\s*",
    r"(?<!不)(?<!不能)(?<!不应)(?<!不该)(?<!不可)(?<!不应该)选(?:择)?(?:选项)?(?!项)\s*(?:的?是|为|:)?\s*",
)
# What stands behind one.
_BEHIND = (
    r"\s*(?:is|are)\s+(?:the\s+|most\s+)?(?:\w+\s+)?(?:correct|right|true|best|answer)\b",
    r"\s*(?:选项|项)?\s*(?:是|为)?\s*最?(?:正确|对的|符合题意|合适|恰当)",
)


def make(setting: Setting) -> Extractor:
    """An option ``last`` that is false leaves the last rule out, which takes the last letter whatever is said of it."""
    setting.take("last")
    rules = _RULES if setting.options.get("last", True) else _RULES[:-1]

    def extract(text: str, question: Question) -> Found:
        plain = _plain(text)
        if not plain:
            return Found(None, "the answer is empty")
        for name, rule in rules:
            found = rule(plain, question)
            if found is not None:
                return Found(found, name) if found else Found(None, "several letters are named")
        return Found(None, "no letter of a choice")

    return extract


def _plain(text: str) -> str:
    """Full-width letters and signs as those of ASCII."""
    return narrow(text).translate(_WIDE).strip()


def _letter(letters: str) -> str:
    """A pattern of one letter that is no part of a word, a name such as C++, or an article."""
    article = rf"(?!(?<=[AI])[ \t]+(?!(?:{_AFTER})\b)[a-z])"
    return rf"(?<![A-Za-z0-9_.])([{letters}])(?![A-Za-z0-9_]|['’-][A-Za-z]|\+\+|#){article}"


def _both(letters: str) -> str:
    return letters + letters.lower()


def _boxed(text: str, question: Question) -> str | None:
    found = re.findall(rf"\\boxed\s*\{{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{{)?\s*\(?([{_both(question.letters)}])\)?\s*[}}.:]", text)
    return found[-1].upper() if found else None


def _choice_text(text: str, question: Question) -> str | None:
    """The answer, its first line or what is said to be the answer is the text of exactly one choice."""
    wanted = {_bare(part) for part in (text, text.split("\n")[0], stated(text) or "")}
    hits = {
        letter
        for letter, choice in zip(question.letters, question.choices, strict=False)
        if _bare(choice) in wanted and not re.fullmatch("[a-z]?", _bare(choice))
    }
    return hits.pop() if len(hits) == 1 else None


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", _plain(text)).strip(" \t*_`\"'“”‘’()[].。!,;").casefold()


def _statement(text: str, question: Question) -> str | None:
    """The last statement; "" if it names several letters."""
    found = sorted(_statements(text, question.letters))
    return found[-1][1] if found else None


def _statements(text: str, letters: str) -> Iterator[tuple[int, str]]:
    """(place, letter) of each statement."""
    one = _letter(letters)
    more = rf"{_CLOSE}(?:\bor\b|\band\b|/|&|、|和|或|与|及){_OPEN}{one}"
    # A letter in lower case counts in brackets, behind a colon at the end of a line, or at the end of a sentence.
    low = rf"([{letters.lower()}])"
    small = rf"\({low}\)|(?<=:)\s*{low}[.)]?\s*$|(?<![A-Za-z0-9'’]){low}(?:[.)]\s*$|\s*\Z)"
    for before in _BEFORE:
        for match in re.finditer(rf"(?i:{before})(?:{_OPEN}{one}|{small})", text, re.MULTILINE):
            letter = next(group for group in match.groups() if group)
            rest = text[match.end() :]
            if re.match(rf"{_CLOSE}{_WRONG}", rest):
                continue
            yield match.end(), "" if re.match(more, rest) else letter.upper()
    for behind in _BEHIND:
        for match in re.finditer(rf"{one}{_CLOSE}{behind}", text):
            yield match.end(), match[1]


def _beginning(text: str, question: Question) -> str | None:
    if re.fullmatch(rf"{_OPEN}[{question.letters.lower()}]{_CLOSE}[.。]?", text):
        return text.strip(" \t\n*_`\"'“”‘’()[]{}$.。").upper()
    if _lists_choices(text, question.letters):
        return None
    if small := re.match(rf"([{question.letters.lower()}])\)\s", text):
        return small[1].upper()
    one = _letter(question.letters)
    if re.match(rf"{_OPEN}{one}{_CLOSE}(?:,\s*)?(?:\bor\b|\band\b|/|&|,|、|和|或|与){_OPEN}{one}", text):
        return ""
    after = r"(?=\s*$|\s*\n|\s*[.)\]}*:,、。;_`\"”’]|\s+[A-Z(]|\s*[\u4e00-\u9fff]|\s+(?:because|since|as)\b)"
    match = re.match(rf"{_OPEN}{one}{after}", text)
    if match is None or re.match(rf"{_CLOSE}[.:]?{_WRONG}", text[match.end() :]):
        return None
    return match[1]


def _lists_choices(text: str, letters: str) -> bool:
    """Whether lines begin with several letters: the choices are repeated, or gone through."""
    return len(set(re.findall(rf"^{_OPEN}([{_both(letters)}]){_CLOSE}[.):、]", text, re.MULTILINE))) > 1


def _emphasised(text: str, question: Question) -> str | None:
    found = re.findall(rf"(?<!\*)\*\*\W*{_letter(question.letters)}(?:[.):、\s][^*\n]*)?\*\*", text)
    return found[-1] if len(set(found)) == 1 else None


def _last(text: str, question: Question) -> str | None:
    """The last letter that is not said to be wrong, outside of lines that repeat choices."""
    if _lists_choices(text, question.letters):
        text = re.sub(rf"^{_OPEN}[{question.letters}]{_CLOSE}[.):、].*$", "", text, flags=re.MULTILINE)
    denied = r"(?:\bnot|n't|\bneither|\bnor|不是|不选|并非|排除)\s*(?:option|choice|选项)?\s*[(\[*]*$"
    for match in reversed(list(re.finditer(_letter(question.letters), text))):
        is_wrong = re.match(rf"{_CLOSE}{_WRONG}", text[match.end() :])
        if not is_wrong and not re.search(denied, text[: match.start()], re.IGNORECASE):
            return match[1]
    return None


_RULES: tuple[tuple[str, Callable[[str, Question], str | None]], ...] = (
    ("boxed", _boxed),
    ("the text of a choice", _choice_text),
    ("statement", _statement),
    ("beginning", _beginning),
    ("emphasis", _emphasised),
    ("last letter", _last),
)
