"""Prompts: Jinja texts of a declaration in a sandbox, and the question with its solved examples as plain text or as turns of a chat."""

import ast
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from swift.data.template import ChatTemplate
from swift.errors import DataError

GIVEN = frozenset({"row", "category", "category_name"})
"""Names that every text of a declaration sees beside the columns."""


def _regex_replace(text: str, pattern: str, new: str) -> str:
    return re.sub(pattern, new, text)


def _columns(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the columns ``names`` that the row has, with something in them."""
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def _literal(text: Any) -> Any:
    """A Python literal written as text, as some data sets keep lists; other values are as they are."""
    return ast.literal_eval(text) if isinstance(text, str) else text


def _places(values: Sequence[Any], wanted: Any) -> list[int]:
    """The indices at which ``values`` has ``wanted``."""
    return [index for index, one in enumerate(values) if one == wanted]


def _letter(value: Any) -> int:
    """The place of a choice that is given as its letter (A is 0); a number is one already."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and len(text) == 1 and text in ascii_uppercase:
        return ascii_uppercase.index(text)
    if isinstance(value, int):
        return value
    raise ValueError(f"{value!r} is no letter of a choice")


def _boxed(text: str) -> str:
    """What the last box of a solution in LaTeX holds."""
    from swift.evaluate.extract.number import boxed

    found = boxed(text)
    if found is None:
        raise ValueError("there is no \\boxed{} in it")
    return found


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    made.filters |= {
        "regex_replace": _regex_replace,
        "columns": _columns,
        "literal": _literal,
        "letter": _letter,
        "places": _places,
        "boxed": _boxed,
    }
    return made


@functools.lru_cache(maxsize=1024)
def _template(text: str) -> jinja2.Template:
    return environment().from_string(text)


@functools.lru_cache(maxsize=1024)
def _expression(text: str) -> Callable[..., Any]:
    return environment().compile_expression(text, undefined_to_none=False)


def scope(fields: Mapping[str, Any], category: str, names: Mapping[str, str]) -> dict[str, Any]:
    """What the texts of a declaration see of a row; its own column ``category`` where it has no subject."""
    category = category or str(fields.get("category") or "")
    return {**fields, "row": fields, "category": category, "category_name": names.get(category, category)}


def check_syntax(texts: Iterable[str], *, expressions: bool) -> None:
    """DataError for the first text that is no template, or no expression."""
    for text in texts:
        try:
            _expression(text) if expressions else _template(text)
        except jinja2.TemplateSyntaxError as problem:
            kind = "expression" if expressions else "template"
            raise DataError(f"{text!r} is no Jinja {kind}: {problem.message}") from None


def render(template: str, fields: Mapping[str, Any], where: str = "") -> str:
    """The text of ``template``; DataError, which names ``where``, if it cannot be made of ``fields``."""
    return str(_run(lambda: _template(template).render(fields), template, where))


def value(expression: str, fields: Mapping[str, Any], where: str = "") -> Any:
    """What ``expression`` is for ``fields``. DataError as for ``render``."""
    found = _run(lambda: _expression(expression)(fields), expression, where)
    if isinstance(found, jinja2.Undefined):
        raise DataError(f"{where}: {expression!r} has no value")
    return found


def _run(work: Callable[[], Any], text: str, where: str) -> Any:
    try:
        return work()
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, SyntaxError, re.error) as problem:
        raise DataError(f"{where}: {_shortened(text)!r} cannot be computed: {problem}") from None


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def names_in(templates: Iterable[str] = (), expressions: Iterable[str] = ()) -> set[str]:
    """The columns that these texts read."""
    texts = [*templates, *("{{ " + expression + " }}" for expression in expressions)]
    return {name for text in texts for name in meta.find_undeclared_variables(environment().parse(text))} - GIVEN


@dataclass(frozen=True)
class Shot:
    """A solved example."""

    question: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """What is asked, before it is laid out. ``prefix`` begins the answer."""

    question: str
    description: str = ""
    shots: tuple[Shot, ...] = ()
    delimiter: str = " "
    separator: str = "\n\n"
    prefix: str = ""

    def with_question(self, question: str) -> "Prompt":
        return replace(self, question=question)

    def without_first_shot(self) -> "Prompt":
        return replace(self, shots=self.shots[1:])

    def plain(self) -> str:
        """Description, solved examples and question in one text."""
        shots = "".join(shot.question + self.delimiter + shot.answer + self.separator for shot in self.shots)
        return self.description + shots + joined(self.question, self.prefix, self.delimiter)

    def messages(self, system: str | None = None) -> list[dict[str, Any]]:
        """The same as turns; ``system`` stands before the description."""
        text = joined(system or "", self.description, self.separator)
        found = [{"role": "system", "content": text}] if text else []
        for shot in self.shots:
            found += [{"role": "user", "content": shot.question}, {"role": "assistant", "content": shot.answer}]
        return [*found, {"role": "user", "content": self.question}]


def joined(first: str, second: str, delimiter: str) -> str:
    """Both texts, with ``delimiter`` between them if both are there and no space is."""
    if not first or not second:
        return first + second
    return first + second if first[-1].isspace() or second[0].isspace() else first + delimiter + second


class Chat:
    """Lays prompts out with the model's chat template. DataError if it has none."""

    def __init__(self, tokenizer: Any, *, system: str | None = None, enable_thinking: bool | None = None) -> None:
        self.template = ChatTemplate(tokenizer, enable_thinking=enable_thinking)
        self.system = system
        self.has_system = True

    def text(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """The text up to the answer, and notes: a system message that the template refuses stands before the first question."""
        messages = prompt.messages(self.system)
        if self.has_system:
            try:
                return self.template.text(messages, prompt=True) + prompt.prefix, {}
            except DataError:
                if messages[0]["role"] != "system":
                    raise
                self.has_system = False
        return self.template.text(_without_system(messages), prompt=True) + prompt.prefix, self._note(messages)

    def _note(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"system_in_question": True} if messages[0]["role"] == "system" else {}


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if messages[0]["role"] != "system":
        return messages
    system, first, *others = messages
    return [{**first, "content": joined(system["content"], first["content"], "\n\n")}, *others]
