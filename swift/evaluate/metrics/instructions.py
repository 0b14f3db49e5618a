"""The 25 kinds of instructions of IFEval, by their published names: each a check of a text with the instruction's arguments."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from swift.evaluate.metrics.language import language_of
from swift.evaluate.metrics.prose import capital_words, count_sentences, count_words

Arguments = Mapping[str, Any]
CHECKS: dict[str, Callable[[str, Arguments], bool]] = {}
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _check(name: str) -> Callable[[Callable[[str, Arguments], bool]], Callable[[str, Arguments], bool]]:
    def add(check: Callable[[str, Arguments], bool]) -> Callable[[str, Arguments], bool]:
        CHECKS[name] = check
        return check

    return add


def _compared(count: int, relation: str, bound: int) -> bool:
    """ "less than" excludes the bound, "at least" includes it."""
    if relation not in ("less than", "at least"):
        raise ValueError(f"the relation {relation!r} is neither 'less than' nor 'at least'")
    return count < bound if relation == "less than" else count >= bound


def _pattern(word: str, around: str = "") -> re.Pattern[str]:
    """Keywords are regular expressions, as the authors read them; one that is none is taken literally."""
    try:
        return re.compile(f"{around}{word}{around}", re.IGNORECASE)
    except re.error:
        return re.compile(f"{around}{re.escape(word)}{around}", re.IGNORECASE)


@_check("keywords:existence")
def _existence(text: str, given: Arguments) -> bool:
    return all(_pattern(word).search(text) for word in given["keywords"])


@_check("keywords:frequency")
def _frequency(text: str, given: Arguments) -> bool:
    return _compared(len(_pattern(given["keyword"].strip()).findall(text)), given["relation"], given["frequency"])


@_check("keywords:forbidden_words")
def _forbidden(text: str, given: Arguments) -> bool:
    return not any(_pattern(word, r"\b").search(text) for word in given["forbidden_words"])


@_check("keywords:letter_frequency")
def _letter_frequency(text: str, given: Arguments) -> bool:
    count = text.lower().count(given["letter"].strip().lower())
    return _compared(count, given["let_relation"], given["let_frequency"])


@_check("language:response_language")
def _language(text: str, given: Arguments) -> bool:
    """A text in which no language can be found counts as followed, as there."""
    return language_of(text) in (None, given["language"])


@_check("length_constraints:number_sentences")
def _sentences(text: str, given: Arguments) -> bool:
    return _compared(count_sentences(text), given["relation"], given["num_sentences"])


@_check("length_constraints:number_words")
def _words(text: str, given: Arguments) -> bool:
    return _compared(count_words(text), given["relation"], given["num_words"])


@_check("length_constraints:number_paragraphs")
def _paragraphs(text: str, given: Arguments) -> bool:
    """Parts between ***, of which the first and the last may be empty; they are not counted then."""
    parts = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(parts) == int(given["num_paragraphs"])


@_check("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, given: Arguments) -> bool:
    """Parts between empty lines; empty ones are not counted, but keep their places."""
    parts = text.split("\n\n")
    count, place = sum(bool(part.strip()) for part in parts), given["nth_paragraph"]
    if place > count or not (part := parts[place - 1].strip()):
        return False
    word = part.split()[0].lstrip("'").lstrip('"')
    return count == int(given["num_paragraphs"]) and re.split(r"[.,?!'\"]", word)[0].lower() == str(given["first_word"]).lower()


@_check("detectable_content:number_placeholders")
def _placeholders(text: str, given: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= int(given["num_placeholders"])


@_check("detectable_content:postscript")
def _postscript(text: str, given: Arguments) -> bool:
    marker = given["postscript_marker"].strip()
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    return re.search(patterns.get(marker, rf"\s*{marker.lower()}.*$"), text.lower(), re.MULTILINE) is not None


@_check("detectable_format:number_bullet_lists")
def _bullets(text: str, given: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == int(given["num_bullets"])


@_check("detectable_format:constrained_response")
def _constrained(text: str, given: Arguments) -> bool:
    return any(option in text for option in _OPTIONS)


@_check("detectable_format:number_highlighted_sections")
def _highlights(text: str, given: Arguments) -> bool:
    single = sum(bool(part.strip("*").strip()) for part in re.findall(r"\*[^\n\*]*\*", text))
    double = sum(bool(part.removeprefix("**").removesuffix("**").strip()) for part in re.findall(r"\*\*[^\n\*]*\*\*", text))
    return single + double >= int(given["num_highlights"])


@_check("detectable_format:multiple_sections")
def _sections(text: str, given: Arguments) -> bool:
    return len(re.split(rf"\s?{given['section_spliter'].strip()}\s?\d+\s?", text)) - 1 >= int(given["num_sections"])


@_check("detectable_format:json_format")
def _json(text: str, given: Arguments) -> bool:
    bare = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        bare = bare.removeprefix(fence)
    try:
        json.loads(bare.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@_check("detectable_format:title")
def _title(text: str, given: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


@_check("combination:two_responses")
def _two_responses(text: str, given: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    whole = [part for part in parts if part]
    return all(parts[1:-1]) and len(whole) == 2 and whole[0] != whole[1]


@_check("combination:repeat_prompt")
def _repeat(text: str, given: Arguments) -> bool:
    return text.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())


@_check("startend:end_checker")
def _end(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(str(given["end_phrase"]).strip().lower())


@_check("startend:quotation")
def _quotation(text: str, given: Arguments) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


@_check("change_case:capital_word_frequency")
def _capital_words(text: str, given: Arguments) -> bool:
    return _compared(len(capital_words(text)), given["capital_relation"], given["capital_frequency"])


@_check("change_case:english_capital")
def _capital(text: str, given: Arguments) -> bool:
    return text.isupper() and language_of(text) in (None, "en")


@_check("change_case:english_lowercase")
def _lowercase(text: str, given: Arguments) -> bool:
    return text.islower() and language_of(text) in (None, "en")


@_check("punctuation:no_comma")
def _no_comma(text: str, given: Arguments) -> bool:
    return "," not in text
