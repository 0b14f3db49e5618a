"""How good a notice of a winter warning is, beside the facts that it was to be made of: data set snow-alerts, English and Chinese.

A notice copies each number of its facts and adds none. Lines of the facts that an answer repeats as they stand are no part
of a notice: they are taken out before anything is looked for, so that a copy of the facts tells nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swift.data.snow_alerts.places import LEVELS, PLACES
from swift.errors import DataError
from swift.evaluate.judging import Judged, Metric, Setting, Verdict

MOST_LENGTH = 2.0  # of a notice, in lengths of its facts; those of the data set have about one
ENOUGH_WORDS = 0.75  # of an advice, in one sentence; in Chinese of its characters

NAMES = ("facts", "acc", "level", "place", "time", "amounts", "advice", "grounded", "language", "form")
_MONTHS = ("January February March April May June July August September October November December").split()
_LABELS = {
    "en": r"Warning|Area|Issued|Valid|Snowfall|Snow depth|Wind|(?:Road|Lowest) temperature|Advice|Hotline",
    "zh": r"预警|地区|发布|时效|降雪量|积雪|风力|路面温度|最低气温|建议|电话",
}
_COLOURS = {level: rf"\b{en}\b|{zh[0]}色" for level, (en, zh) in LEVELS.items()}
_GRADES = {level: rf"\blevel\s+{level}\b|(?<![IV]){level}\s*级" for level in LEVELS}
_AMOUNTS = {
    "hours": r"(\d+)[\s-]*(?:hours?\b|hrs?\b|个?小时)",
    "snowfall": r"(\d+)\s*(?:mm\b|millimet(?:re|er)s?|毫米)",
    "depth": r"(\d+)\s*(?:cm\b|centimet(?:re|er)s?|厘米)",
    "wind": r"force[\s-]*(\d+)|(\d+)\s*级",
    "temperature": r"((?:minus\s+|零下|[-\N{MINUS SIGN}\N{EN DASH}])?\s*\d+)\s*(?:°\s*C|℃|degrees?|度)",
}
_NUMBER = re.compile(r"\d+(?:[:.]\d+)*")
_NOT = re.compile(r"\bnot\b|\bnever\b|n't\b|不|勿|禁止", re.IGNORECASE)
_HAN = re.compile(r"[\u4e00-\u9fff]")
# A full stop ends a sentence where a space or the end follows.
_END = r"(?:[.!?](?=\s|$)|[。！？])"


def _names() -> list[str]:
    """All places and offices that the data set knows, each part of a name by itself."""
    whole = [name for place in PLACES for name in (place.en, place.zh, place.office_en, place.office_zh)]
    return sorted({part for name in whole for part in name.split(", ")})


_NAMES = _names()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a notice must tell. ``amounts`` are by their names in _AMOUNTS; ``lines`` are the facts as the model read them."""

    language: str
    level: str
    hazard: str
    place: str
    issuer: str
    month: int
    day: int
    clock: str
    amounts: Mapping[str, str]
    advice: tuple[str, ...]
    hotline: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def make(setting: Setting) -> Metric:
    """An option ``facts`` names the field that holds the facts; by default it is called facts."""
    setting.take("facts")
    field = str(setting.options.get("facts", "facts"))

    def judge(judged: Judged) -> Verdict:
        return judge_notice(judged.text, read_facts(str(judged.fields.get(field, ""))))

    return Metric(NAMES, judge)


def read_facts(text: str) -> Facts:
    """The facts in the words of the data set. DataError if ``text`` does not have them."""
    for language, labels in _LABELS.items():
        lines = tuple(line.strip() for line in text.splitlines() if re.match(rf"\s*(?:{labels})\s*[:：]", line))
        values = [re.split(r"\s*[:：]\s*", line, maxsplit=1) for line in lines]
        found = {name: value for name, value in values}
        try:
            return (_read_en if language == "en" else _read_zh)(found, lines)
        except (KeyError, TypeError, ValueError):
            continue
    raise DataError(f"these are no facts of a winter warning: {' '.join(text.split())[:80]!r}")


def _read_en(found: Mapping[str, str], lines: tuple[str, ...]) -> Facts:
    hazard, level, _ = _groups(r"(.+), level (\w+) \((\w+)\)", found["Warning"])
    day, month, clock, issuer = _groups(r"(\d+) (\w+) (\d+:\d+), (.+)", found["Issued"])
    return Facts(
        language="en",
        level=_known(level),
        hazard=hazard,
        place=found["Area"],
        issuer=issuer,
        month=_MONTHS.index(month) + 1,
        day=int(day),
        clock=clock,
        amounts=_amounts(" ".join(found[name] for name in found if name not in ("Warning", "Issued", "Hotline"))),
        advice=tuple(found["Advice"].split("; ")),
        hotline=found["Hotline"],
        lines=lines,
    )


def _read_zh(found: Mapping[str, str], lines: tuple[str, ...]) -> Facts:
    hazard, _, level = _groups(r"(.+?)(.色)（(\w+)级）", found["预警"])
    month, day, clock, issuer = _groups(r"(\d+)月(\d+)日(\d+:\d+)，(.+)", found["发布"])
    return Facts(
        language="zh",
        level=_known(level),
        hazard=hazard,
        place=found["地区"],
        issuer=issuer,
        month=int(month),
        day=int(day),
        clock=clock,
        amounts=_amounts(" ".join(found[name] for name in found if name not in ("预警", "发布", "电话"))),
        advice=(found["建议"],),
        hotline=found["电话"],
        lines=lines,
    )


def _known(level: str) -> str:
    if level not in LEVELS:
        raise ValueError(level)
    return level


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ValueError(text)
    return match.groups()


def _amounts(text: str) -> dict[str, str]:
    return {name: values[0] for name, pattern in _AMOUNTS.items() if (values := _values(pattern, text))}


def _values(pattern: str, text: str) -> list[str]:
    """All values that ``text`` gives of an amount, with "-" for what is below zero."""
    found = [next(group for group in match.groups() if group) for match in re.finditer(pattern, text, re.IGNORECASE)]
    return [re.sub(r"^(?:minus\s+|零下|[-\N{MINUS SIGN}\N{EN DASH}])\s*", "-", value, flags=re.IGNORECASE).strip() for value in found]


def judge_notice(answer: str, facts: Facts) -> Verdict:
    """Metrics of an answer, each from 0 to 1; ``acc`` is 1 for a notice that could be sent as it is.

    facts     share of the facts that the notice tells, each as the facts have it
    level     its colour or its grade is told, and no other one
    place     the place is told
    time      date, clock and hours are told
    amounts   share of snowfall, depth, wind and temperature that are told
    advice    share of the advice that is told, and not turned into its opposite
    grounded  share of the numbers, levels and names in it that are those of the facts; 0 if there are none
    language  it is written in the language of the facts
    form      whole sentences, none of them twice, not much longer than the facts, and no line of the facts as it stands
    """
    text, num_copied = without_copies(answer, facts)
    told = facts_told(text, facts)
    right, wrong = grounds(text, facts)
    amounts = [is_told for name, is_told in told.items() if name in ("snowfall", "depth", "wind", "temperature")]
    advice = [is_told for name, is_told in told.items() if name.startswith("advice")]
    metrics = {
        "facts": _share(list(told.values())),
        "level": float(told["level"]),
        "place": float(told["place"]),
        "time": float(all(told.get(name, True) for name in ("date", "clock", "hours"))),
        "amounts": _share(amounts),
        "advice": _share(advice),
        "grounded": len(right) / max(len(right) + len(wrong), 1),
        "language": float(written_in(text) == facts.language),
        "form": float(not num_copied and has_form(text, facts)),
    }
    is_right = all(value == 1 for value in metrics.values())
    missing = [name for name, is_told in told.items() if not is_told]
    return Verdict(
        {"facts": metrics.pop("facts"), "acc": float(is_right), **metrics},
        {"missing": missing, "invented": wrong, "copied_lines": num_copied},
    )


def without_copies(answer: str, facts: Facts) -> tuple[str, int]:
    """``answer`` without the lines of the facts, and how many there were; those of a list, too, where a mark stands before them."""
    text, count = answer, 0
    for line in facts.lines:
        words = r"\s*".join(re.escape(part) for part in re.split(r"\s+|(?<=[:：])", line) if part)
        text, times = re.subn(words, " ", text, flags=re.IGNORECASE)
        count += times
    return text.strip(), count


def facts_told(text: str, facts: Facts) -> dict[str, bool]:
    """Each fact by its name, and whether ``text`` tells it."""
    levels = {level for level in LEVELS if re.search(f"{_COLOURS[level]}|{_GRADES[level]}", text, re.IGNORECASE)}
    hour, minute = facts.clock.split(":")
    month = _MONTHS[facts.month - 1]
    day = rf"0?{facts.day}(?:st|nd|rd|th)?"
    date = rf"\b{day}\s+(?:of\s+)?{month}\b|\b{month}\s+{day}\b" if facts.language == "en" else rf"(?<!\d)0?{facts.month}月0?{facts.day}日"
    told = {
        "level": levels == {facts.level},
        "hazard": facts.hazard.lower() in text.lower(),
        "place": all(part in text for part in facts.place.split(", ")),
        "issuer": facts.issuer in text,
        "date": re.search(date, text, re.IGNORECASE) is not None,
        "clock": re.search(rf"(?<!\d)0?{int(hour)}(?::|：|时){minute}(?!\d)", text) is not None,
        "hotline": re.search(rf"(?<!\d){re.escape(facts.hotline)}(?!\d)", text) is not None,
    }
    for name, value in facts.amounts.items():
        told[name] = set(_values(_AMOUNTS[name], text)) == {value}
    advice = advice_told(text, facts.advice)
    return told | {f"advice {number}": is_told for number, is_told in enumerate(advice, 1)}


def advice_told(text: str, advice: Sequence[str]) -> list[bool]:
    """Whether most words of each advice stand in one sentence that denies no more and no less than the advice in it."""
    sentences = sentences_of(text)
    homes: dict[int, list[str]] = {}
    for item in advice:
        words = _words(item)
        home = next((at for at, sentence in enumerate(sentences) if _share([w in _words(sentence) for w in words]) >= ENOUGH_WORDS), None)
        if home is not None:
            homes.setdefault(home, []).append(item)
    kept = {
        item
        for at, items in homes.items()
        if len(_NOT.findall(sentences[at])) == sum(len(_NOT.findall(item)) for item in items)
        for item in items
    }
    return [item in kept for item in advice]


def grounds(text: str, facts: Facts) -> tuple[list[str], list[str]]:
    """Numbers, amounts, levels and names in ``text``: those of the facts, and those that are made up."""
    known = {_plain_number(number) for number in _NUMBER.findall(facts.text)}
    found = [(number, _plain_number(number) in known) for number in _NUMBER.findall(text)]
    for name, pattern in _AMOUNTS.items():
        found += [(f"{name} {value}", value == facts.amounts.get(name)) for value in _values(pattern, text)]
    for level in LEVELS:
        if re.search(f"{_COLOURS[level]}|{_GRADES[level]}", text, re.IGNORECASE):
            found.append((f"level {level}", level == facts.level))
    found += [(name, name in facts.text) for name in _NAMES if name in text]
    return [what for what, is_known in found if is_known], [what for what, is_known in found if not is_known]


def has_form(text: str, facts: Facts) -> bool:
    """Whether ``text`` is prose: at least two whole sentences, the end among them, none twice, no labels, of a fit length."""
    sentences = [" ".join(sentence.split()).lower() for sentence in sentences_of(text)]
    whole = [sentence for sentence in sentences if re.search(_END, sentence)]
    has_labels = re.search(rf"^\W*(?:{_LABELS[facts.language]})\s*[:：]", text, re.MULTILINE) is not None
    is_fit = len(text) <= MOST_LENGTH * len(facts.text)
    return len(whole) >= 2 and sentences[-1] == whole[-1] and len(set(whole)) == len(whole) and not has_labels and is_fit


def sentences_of(text: str) -> list[str]:
    """Sentences and lines without an end, as a title is."""
    marked = re.sub(f"({_END})", r"\1\n", text)
    return [line.strip() for line in marked.splitlines() if line.strip()]


def written_in(text: str) -> str:
    """ "zh" if most letters are Chinese, "en" if none is, "mixed" for what lies between and "" where there are none."""
    chinese, latin = len(_HAN.findall(text)), len(re.findall(r"[A-Za-z]", text))
    if not chinese + latin:
        return ""
    return "en" if not chinese else "zh" if chinese >= 0.8 * (chinese + latin) else "mixed"


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[\u4e00-\u9fff]", text.lower())


def _plain_number(number: str) -> str:
    return ":".join(part.lstrip("0") or "0" for part in number.split(":"))


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
