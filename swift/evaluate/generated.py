"""Tasks whose answers are written: the question as a request to an engine, and what is found in the answer and how it is judged.

``extract`` of a declaration names an extractor, or several that are tried in order, each as a name or as {name: options}; by default
it is letter where there are choices, else text.
``metrics`` names metrics. ``arguments`` are: ``images``, an expression for the images of a row; ``messages``, an expression for
messages in OpenAI's form that stand in place of the prompt; and options of a metric, by its name. With a chat
template, stop words that begin with a line break are left out: there the turn ends the answer, and its paragraphs belong to it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from swift.data.template import text_tokenizer
from swift.engine.base import Completion, Request, Sampling
from swift.engine.media import ImagePrompts
from swift.engine.scoring import Score
from swift.errors import ConfigError, DataError, ModelError
from swift.evaluate.base import Asked, Example, Outcome
from swift.evaluate.declared import LETTERS, Declared, declare
from swift.evaluate.encode import Encoder
from swift.evaluate.extract import EXTRACTORS
from swift.evaluate.extract.thinking import without_thinking
from swift.evaluate.generation import sampling_of
from swift.evaluate.judging import Extractor, Found, Judged, Metric, Question, Setting
from swift.evaluate.metrics import METRICS
from swift.evaluate.pictured import Pictures, data_url, messages_of, parts_of, shown
from swift.evaluate.prompt import Prompt, check_syntax, names_in, render, value
from swift.evaluate.settings import Settings
from swift.evaluate.spec import TaskSpec, Writing
from swift.evaluate.written import Written
from swift.files import sha256_file

ANSWERED = "answered"  # the metric that is 1 where something was found in the answer
_ARGUMENTS = ("images", "messages")


def make_generated(spec: TaskSpec, settings: Settings, tokenizer: Any, max_model_len: int | None, config: Any = None) -> "Generated":
    """The task of mode generate.

    ``tokenizer`` is the model's, or its processor for one that reads images. Without ``max_model_len`` a server answers, which is sent
    texts or messages as they are (Written). ``config`` gives options of generation where it has them (see sampling_of).
    """
    mode = settings.mode_of(spec)
    assert isinstance(mode, Writing)
    is_remote = max_model_len is None
    is_chat = settings.use_chat_template is not False if is_remote else settings.wants_chat(tokenizer)
    if is_remote and settings.enable_thinking is not None:
        raise ConfigError("--enable_thinking has no effect with --eval_url: the server renders the messages", hint="remove it")
    declared = declare(spec, replace(settings, use_chat_template=is_chat and not is_remote), None if is_remote else tokenizer)
    sampling = sampling_of(mode, config, is_chat)
    if is_remote:
        return Generated(declared, mode, sampling, is_chat, _RemoteAsker(declared, is_chat, settings.system))
    return Generated(declared, mode, sampling, is_chat, _Asker(declared, tokenizer, max_model_len or 0))


class Generated:
    """A Task; ``asker`` makes requests of prompts."""

    def __init__(self, declared: Declared, mode: Writing, sampling: Sampling, is_chat: bool, asker: "_Asker | _RemoteAsker") -> None:
        self.declared, self.mode, self._sampling, self._asker = declared, mode, sampling, asker
        spec = declared.spec
        self._num_samples = self._samples()
        self._extractors = [
            self._extractor(name, options) for name, options in _named(mode.extract or ("text" if mode.choices is None else "letter"))
        ]
        self._metrics = self._made_metrics()
        names = [name for metric in self._metrics for name in metric.names]
        main = mode.metrics[0] if mode.metrics[0] in names else names[0]
        system = declared.settings.system if asker.is_remote and is_chat else None  # the declaration's digest has it of a template
        asked = f"{declared.about.digest} {sampling} {is_chat} {asker.is_remote}" + ("" if system is None else f" {system!r}")
        digest = hashlib.sha256(asked.encode()).hexdigest()
        self.about = replace(declared.about, metric=main, uses_chat_template=is_chat, digest=digest)
        check_syntax([str(mode.arguments[name]) for name in _ARGUMENTS if name in mode.arguments], expressions=True)
        for example in declared.data.examples:  # what is wrong in a row is told before anything is computed
            fields, where = declared.scope(example), declared.where(example)
            self._question(fields, where)
            declared.prompt(mode, example, render(mode.prompt, fields, where))
        rows = {str(example.fields.get("index", example.id)): example.fields for example in declared.data.rows}
        self._pictures = Pictures(rows)
        if self._has_images or mode.arguments.get("messages"):
            if declared.settings.num_fewshot:
                raise ConfigError(f"task {spec.name} shows images, which solved examples cannot have", hint="give --eval_num_fewshot 0")
            asker.check_images()
        self.about = replace(self.about, digest=self._digest_with_files(digest))

    def _digest_with_files(self, digest: str) -> str:
        """``digest`` with what is in the files of images, which rows only name."""
        made = hashlib.sha256(digest.encode())
        count = 0
        for example in self.declared.data.rows:
            where = self.declared.where(example)
            for image in self._with_images(self.declared.scope(example), where)[1]:
                if (file := self._pictures.file(image, where)) is not None:
                    made.update(sha256_file(file).encode())
                    count += 1
        return made.hexdigest() if count else digest

    @property
    def _has_images(self) -> bool:
        return "images" in self.mode.arguments

    def _extractor(self, name: str, options: Mapping[str, Any]) -> Extractor:
        if name == "letter" and self.mode.choices is None:
            hint = "declare choices, or extract something else"
            raise ConfigError(f"task {self.declared.spec.name}: the extractor letter has no choices to name", hint=hint)
        made: Extractor = EXTRACTORS.get(name)(self._setting(options))
        return made

    def _setting(self, options: Mapping[str, Any]) -> Setting:
        return Setting(self.declared.spec.name, options, self.declared.settings.arguments, self.examples())

    def _samples(self) -> int:
        """How many answers to each question the user wants. ConfigError if all would be the same."""
        count = self.declared.settings.arguments.get("num_samples", 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"--eval_dataset_args: num_samples is {count!r}", hint="give a whole number from 1 on")
        if count > 1 and self._sampling.temperature == 0:
            raise ConfigError(f"num_samples {count} has no effect on greedy answers: all are the same", hint="say --temperature 0.8")
        return count

    def _made_metrics(self) -> list[Metric]:
        """ConfigError for arguments that nothing reads, of the declaration or the user."""
        for name in self.mode.arguments:
            if name not in (*_ARGUMENTS, *self.mode.metrics):
                raise ConfigError(f"task {self.declared.spec.name}: arguments.{name} is neither {', '.join(_ARGUMENTS)} nor a metric of it")
        made: list[Metric] = [METRICS.get(name)(self._setting(self.mode.arguments.get(name, {}))) for name in self.mode.metrics]
        known = ["num_samples", *(name for metric in made for name in metric.arguments)]
        for name in self.declared.settings.arguments:
            if name not in known:
                hint = f"it has {', '.join(known)}"
                raise ConfigError(f"--eval_dataset_args: {self.declared.spec.name} has no setting {name!r}", hint=hint)
        return made

    def examples(self) -> Sequence[Example]:
        """See Task. Of several answers to a question, each is an example with the id of the question, # and a number."""
        found = self.declared.data.examples
        if self._num_samples == 1:
            return found
        return [replace(example, id=f"{example.id}#{number}") for example in found for number in range(self._num_samples)]

    def _asked(self, example: Example) -> Example:
        """The row that ``example`` is an answer to."""
        return example if self._num_samples == 1 else replace(example, id=example.id.rpartition("#")[0])

    def _where(self, example: Example) -> str:
        """File and line, for messages."""
        return self.declared.where(self._asked(example))

    def requests(self, example: Example) -> Asked:
        """See Task."""
        fields, where = self.declared.scope(example), self._where(example)
        sampling = self._sampling
        if sampling.seed is not None:  # of its own, whatever else is asked
            sampling = replace(sampling, seed=(sampling.seed + int(hashlib.sha256(example.id.encode()).hexdigest()[:8], 16)) % 2**31)
        messages, images = self._with_images(fields, where)
        if messages:
            return self._asker.with_images(messages, [self._pictures.picture(image, where) for image in images], sampling, where)
        question = render(self.mode.prompt, fields, where)
        return self._asker.with_text(self.declared.prompt(self.mode, self._asked(example), question), sampling)

    def _with_images(self, fields: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages and images of a row; no messages if it is a text."""
        arguments = self.mode.arguments
        if "messages" in arguments and (given := value(arguments["messages"], fields, where)):
            return messages_of(given, where)
        if not self._has_images:
            return [], []
        images = value(arguments["images"], fields, where)
        images = list(images) if isinstance(images, list | tuple) else [images] if images else []
        question = render(self.mode.prompt, fields, where)
        messages = [{"role": "user", "content": parts_of(question, len(images))}]
        description = render(self.mode.description, fields, where)
        system = "\n\n".join(part.strip() for part in (self.declared.settings.system or "", description) if part.strip())
        return [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages] if system else messages, images

    def score(self, example: Example, asked: Asked, answer: Sequence[Score] | Completion) -> Outcome:
        """See Task. Where nothing is found, ``prediction`` is None and detail.rule says why; metrics count it as wrong."""
        assert isinstance(answer, Completion)
        fields, where = self.declared.scope(example), self._where(example)
        question, golds = self._question(fields, where)
        text, thinking = without_thinking(self._prefix(fields, asked, where) + answer.text)
        found = self._found(text, question, answer, thinking)
        metrics = {ANSWERED: float(found.value is not None)}
        detail: dict[str, Any] = {"answer": answer.text, "extracted": found.value, "rule": found.rule}
        detail |= {"finish_reason": answer.finish_reason, "num_tokens": len(answer.token_ids)}
        judged = Judged(text if found.value is not None else "", found, golds, fields)
        for metric in self._metrics:
            verdict = metric.judge(judged)
            metrics |= verdict.metrics
            detail |= verdict.detail
        if asked.notes:
            detail["notes"] = dict(asked.notes)
        if self.declared.spec.cluster is not None:
            detail["cluster"] = str(value(self.declared.spec.cluster, fields, where))
        elif self._num_samples > 1:
            detail["cluster"] = self._asked(example).id
        ordered = {self.about.metric: metrics[self.about.metric], **metrics}
        return Outcome(example.id, example.category, asked.prompt, " | ".join(golds), found.value, ordered, detail)

    def _prefix(self, fields: dict[str, Any], asked: Asked, where: str) -> str:
        """What the answer begins with before the model writes: it is read with the answer."""
        return render(self.mode.prefix, fields, where) if self.mode.prefix and "prefix_left_out" not in asked.notes else ""

    def _found(self, text: str, question: Question, answer: Completion, thinking: str | None) -> Found:
        """Of the first extractor that finds something; else the reasons of all."""
        if answer.finish_reason == "abort":
            return Found(None, "there is no answer")
        reasons: list[str] = []
        for extract in self._extractors:
            found = extract(text, question)
            if found.value is not None:
                return found
            reasons.append(found.rule)
        if thinking is not None:
            reasons.append(thinking)
        if answer.finish_reason == "length":
            reasons.append(f"the answer was cut off at {len(answer.token_ids)} tokens")
        return Found(None, "; ".join(dict.fromkeys(reasons)))

    def _question(self, fields: dict[str, Any], where: str) -> tuple[Question, tuple[str, ...]]:
        """The question, and right answers: letters where it has choices."""
        gold = value(self.mode.gold, fields, where) if self.mode.gold else []
        golds = list(gold) if isinstance(gold, list | tuple) else [gold]
        if self.mode.choices is None:
            return Question(fields=fields), tuple(str(one) for one in golds)
        given = value(self.mode.choices, fields, where) if isinstance(self.mode.choices, str) else self.mode.choices
        choices = [str(choice) for choice in (given.values() if isinstance(given, Mapping) else given)]
        letters = "".join(given) if isinstance(given, Mapping) else LETTERS[: len(choices)]
        # Of a row, single letters are texts as others are: blood groups, symbols of elements.
        is_of_row = isinstance(self.mode.choices, str) and names_in(expressions=[self.mode.choices])
        if not is_of_row and all(len(choice) == 1 and choice in LETTERS for choice in choices):
            letters, choices = "".join(choices), []
        return Question(letters, tuple(choices), fields), tuple(_as_letter(one, letters, choices, where) for one in golds)


def _as_letter(gold: Any, letters: str, choices: Sequence[str], where: str) -> str:
    """The letter of the right answer, given as its place, its letter or its text. A letter is never the text of another choice."""
    if isinstance(gold, int) and 0 <= gold < len(letters):
        return letters[gold]
    text = str(gold).strip()
    if len(text) == 1 and text in letters:
        return text
    if text in choices:
        return letters[choices.index(text)]
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    raise DataError(f"{where}: the right answer {str(gold)[:60]!r} is none of {', '.join(letters)}")


def _named(given: str | Iterable[str | Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, options) of each extractor."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for one in [given] if isinstance(given, str) else given:
        found += [(one, {})] if isinstance(one, str) else [(name, options or {}) for name, options in one.items()]
    return found


class _Asker:
    """Requests of token ids, for an engine. ``most`` tokens have prompt and answer together."""

    is_remote = False

    def __init__(self, declared: Declared, tokenizer: Any, most: int) -> None:
        self._declared, self._most = declared, most
        self._tokenizer = text_tokenizer(tokenizer)
        self._encoder = Encoder(self._tokenizer)
        self._processor = tokenizer if tokenizer is not self._tokenizer else None
        self._reader: ImagePrompts | None = None

    def with_text(self, prompt: Prompt, sampling: Sampling) -> Asked:
        """Solved examples are left out from the first on, and then the beginning is cut off, until there is room for the answer."""
        room = self._most - min(sampling.max_new_tokens, self._most // 2)
        num_shots = len(prompt.shots)
        text, notes = self._declared.laid_out(prompt)
        ids = self._ids(text)
        while len(ids) > room and prompt.shots:
            prompt = prompt.without_first_shot()
            text, notes = self._declared.laid_out(prompt)
            ids = self._ids(text)
        if len(prompt.shots) < num_shots:
            notes = {**notes, "shots_left_out": num_shots - len(prompt.shots)}
        if len(ids) > room:
            notes = {**notes, "truncated": len(ids) - room}
            ids = ids[-room:]
        return Asked(text, request=Request(id="", prompt=tuple(ids), sampling=sampling), notes=notes)

    def _ids(self, text: str) -> list[int]:
        if self._processor is not None:
            return list(ImagePrompts(self._processor, None).to_ids(text))
        return self._encoder.ids(text, special=self._declared.chat is None)

    def check_images(self) -> None:
        """ModelError or ConfigError if the model is not asked about images."""
        if self._processor is None:
            raise ModelError("the model reads text only, and the task shows images", hint="name a model that reads images")
        if self._declared.chat is None:
            raise ConfigError("images need the model's chat template", hint="remove --use_chat_template false")
        self._reader = ImagePrompts(self._processor, self._declared.chat.template)
        if not self._reader.takes_images:
            raise ModelError("the model's chat template takes no images", hint="--chat_template names another")

    def with_images(self, messages: list[dict[str, Any]], images: Sequence[Any], sampling: Sampling, where: str) -> Asked:
        """After ``check_images``. DataError if these do not fit the model's context."""
        assert self._reader is not None and self._declared.chat is not None
        try:
            ids, media = self._reader.ready(self._declared.chat.template.text(messages, prompt=True), images)
        except DataError as problem:
            raise DataError(f"{where}: {problem}") from None
        if len(ids) >= self._most:
            raise DataError(f"{where}: question and images have {len(ids)} tokens, the model reads {self._most}")
        return Asked(shown(messages), request=Request(id="", prompt=ids, sampling=sampling, media=media))


class _RemoteAsker:
    """Requests as texts, for a server that renders messages itself."""

    is_remote = True

    def __init__(self, declared: Declared, is_chat: bool, system: str | None) -> None:
        self._declared, self._is_chat, self._system = declared, is_chat, system

    def with_text(self, prompt: Prompt, sampling: Sampling) -> Asked:
        """A prefix of the answer is left out of messages, which end with the question."""
        if not self._is_chat:
            text = prompt.plain()
            return Asked(text, request=Written(id="", text=text, sampling=sampling))
        messages = prompt.messages(self._system)
        notes = {"prefix_left_out": prompt.prefix} if prompt.prefix else {}
        return Asked(shown(messages), request=Written(id="", messages=tuple(messages), sampling=sampling), notes=notes)

    def check_images(self) -> None:
        """ConfigError if the server is sent no messages."""
        if not self._is_chat:
            raise ConfigError("images need messages", hint="remove --use_chat_template false")

    def with_images(self, messages: list[dict[str, Any]], images: Sequence[Any], sampling: Sampling, where: str) -> Asked:
        pictures = iter(images)
        sent = [{**message, "content": [_sent(part, pictures) for part in message["content"]]} for message in messages]
        return Asked(shown(messages), request=Written(id="", messages=tuple(sent), sampling=sampling))


def _sent(part: dict[str, Any], pictures: Any) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": data_url(next(pictures))}}
