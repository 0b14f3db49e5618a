"""Tasks of declarations: what the modes share, and which module asks in which mode."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

import msgspec

from swift.config.evaluate import EvalConfig
from swift.errors import ConfigError, DataError
from swift.evaluate import TASKS
from swift.evaluate.base import About, Example, Task
from swift.evaluate.prompt import Chat, Prompt, Shot, check_syntax, render, scope, value
from swift.evaluate.read import Data, read, texts_of
from swift.evaluate.settings import Settings, refuse_without_effect, settings_of
from swift.evaluate.spec import AnyMode, Choosing, Mode, Reading, TaskSpec, Writing

LETTERS = ascii_uppercase
"""Of choices."""
RULES = 2  # of extraction and metrics; raised when one of them changes, so that marks given by different rules are never mixed


def make_task(spec: TaskSpec, config: Any, tokenizer: Any, max_model_len: int | None) -> Task:
    """The task that ``spec`` declares, with the options of ``config`` (a TasksConfig), for a model that reads ``max_model_len`` tokens.

    Data are read and checked here. Raises ConfigError, DataError and HubError, each with one line that says what to do.
    """
    if spec.python is not None:
        made: Task = TASKS.get(spec.python)(spec, config, tokenizer, max_model_len)
        return made
    settings = settings_of(spec, config)
    if isinstance(config, EvalConfig):
        refuse_without_effect(config, tokenizer)
    mode = settings.mode_of(spec)
    _check_syntax(spec, mode)
    if settings.mode == "generate":
        from swift.evaluate.generated import make_generated

        return make_generated(spec, settings, tokenizer, max_model_len, config)
    if max_model_len is None:
        raise ConfigError(f"--eval_mode {settings.mode} needs the model itself", hint="say --eval_mode generate")
    from swift.evaluate import scored

    declared = declare(spec, settings, tokenizer)
    if isinstance(mode, Reading):
        return scored.Documents(declared, mode, tokenizer, max_model_len)
    assert isinstance(mode, Choosing)
    return scored.Choices(declared, mode, tokenizer, max_model_len)


def _check_syntax(spec: TaskSpec, mode: AnyMode) -> None:
    templates, expressions = texts_of(spec, mode)
    fields = [text for layout in spec.source.layouts for text in layout.fields.values()]
    check_syntax([*spec.fields.values(), *fields, *expressions], expressions=True)
    check_syntax(templates, expressions=False)


@dataclass
class Declared:
    """A task's data with its settings, for one tokenizer."""

    spec: TaskSpec
    settings: Settings
    data: Data
    about: About
    chat: Chat | None
    _shots: dict[str, list[tuple[str, Shot]]] = field(default_factory=dict)

    def scope(self, example: Example) -> dict[str, Any]:
        """What the declaration's texts see of ``example``."""
        return scope(example.fields, example.category, self.spec.category_names)

    def where(self, example: Example) -> str:
        """File and line, for messages."""
        return self.data.where.get(example.id, f"task {self.spec.name}: {example.id}")

    def prompt(self, mode: Mode, example: Example, question: str) -> Prompt:
        """``question`` with description and solved examples; an example is never among its own."""
        fields, where = self.scope(example), self.where(example)
        shots = [shot for id, shot in self._solved(mode, example.category) if id != example.id] if self.settings.num_fewshot else []
        prefix = render(mode.prefix, fields, where) if isinstance(mode, Writing) and mode.prefix else ""
        return Prompt(
            question=question,
            description=render(mode.description, fields, where) if mode.description else "",
            shots=tuple(shots[: self.settings.num_fewshot]),
            delimiter=mode.delimiter,
            separator=mode.separator,
            prefix=prefix,
        )

    def _solved(self, mode: Mode, category: str) -> list[tuple[str, Shot]]:
        """(id, solved example) of those that can stand before a question of ``category``, made once."""
        if category not in self._shots:
            wanted = self.settings.num_fewshot + (self.spec.shots.split == self.spec.split)
            found = self.data.shots_for(category)[self.spec.shots.skip :][:wanted]
            self._shots[category] = [(shot.id, self.shot(mode, shot)) for shot in found]
        return self._shots[category]

    def shot(self, mode: Mode, example: Example) -> Shot:
        """``example`` with its answer."""
        fields, where = self.scope(example), self.where(example)
        if isinstance(mode, Writing):
            answer = render(mode.prefix, fields, where) + render(mode.target, fields, where)
            return Shot(render(mode.prompt, fields, where), answer)
        assert isinstance(mode, Choosing)
        choices, golds = choices_of(mode, fields, where)
        if mode.contexts is None:
            return Shot(render(mode.prompt, fields, where), choices[golds[0]])
        return Shot(value(mode.contexts, fields, where)[golds[0]], render(mode.ending, fields, where))

    def laid_out(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """The text that the model reads before the answer, and notes."""
        return (prompt.plain(), {}) if self.chat is None else self.chat.text(prompt)


def declare(spec: TaskSpec, settings: Settings, tokenizer: Any) -> Declared:
    """Read the data, and say what a report says of the task."""
    data = read(spec, settings)
    mode = settings.mode_of(spec)
    chat = None
    if settings.wants_chat(tokenizer):
        chat = Chat(tokenizer, system=settings.system, enable_thinking=settings.enable_thinking)
    about = About(
        name=spec.name,
        title=spec.title,
        mode=settings.mode,
        metric=mode.metrics[0],
        num_fewshot=settings.num_fewshot,
        uses_chat_template=chat is not None,
        licence=spec.licence,
        source=data.source,
        digest=_digest(spec, settings, data, chat is not None),
        groups=spec.group_of,
        counts=data.counts,
    )
    return Declared(spec, settings, data, about, chat)


def _digest(spec: TaskSpec, settings: Settings, data: Data, uses_chat: bool) -> str:
    """SHA-256 (hex) of all that makes questions and marks what they are; not of the limit, which says only how many are asked."""
    chat = [settings.system, settings.enable_thinking] if uses_chat else None
    what = [RULES, spec, settings.mode, settings.num_fewshot, chat, settings.subsets, settings.arguments, data.digest]
    return hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()


def choices_of(mode: Choosing, fields: dict[str, Any], where: str) -> tuple[list[str], list[int]]:
    """The texts of the choices, and the indices of the right ones. DataError for an answer that is none of them."""
    found = value(mode.choices, fields, where) if isinstance(mode.choices, str) else mode.choices
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) < 1:
        raise DataError(f"{where}: the choices are {_shown(found)}, not a list of texts")
    choices = [choice if isinstance(choice, str) else str(choice) for choice in found]
    gold = value(mode.gold, fields, where)
    golds = [_index(one, choices, f"{where}: {mode.gold}") for one in (gold if isinstance(gold, list | tuple) else [gold])]
    if not golds:
        raise DataError(f"{where}: no choice is right, by {mode.gold}")
    return choices, golds


def _index(gold: Any, choices: list[str], where: str) -> int:
    """The place of the right answer, given as a number or as the text of a choice."""
    if isinstance(gold, bool):
        gold = int(gold)
    if isinstance(gold, int):
        if 0 <= gold < len(choices):
            return gold
    elif gold in choices:
        return choices.index(gold)
    shown = f"{', '.join(choices)}" if len(", ".join(choices)) < 60 else f"the {len(choices)} choices"
    raise DataError(f"{where} is {_shown(gold)}, none of {shown}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
