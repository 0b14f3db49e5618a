"""swift eval: every question that can be checked is checked first; then each model answers; then the report. Read this first."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift import console
from swift.config.evaluate import EvalConfig
from swift.engine.answers import answers
from swift.engine.base import Engine
from swift.engine.scoring import Score, Scorer, Text
from swift.errors import ConfigError, Interrupted
from swift.evaluate import EVALUATORS, report
from swift.evaluate.base import Asked, Example, ModelResult, Outcome, Task, TaskResult
from swift.evaluate.contamination import Contamination, find_contamination
from swift.evaluate.declared import make_task
from swift.evaluate.results import ITEMS, TaskFile, file_of, result_of
from swift.evaluate.spec import find_task, task_table
from swift.evaluate.subject import Subject, subjects

MOST_BYTES = 2**24  # of texts that are given to a scorer at once, and of images: beginnings are shared among these
TOKEN_BYTES = 8  # of a number in a tuple


@dataclass(frozen=True)
class Evaluation:
    """What was found, and the folder of the report."""

    folder: Path
    models: list[ModelResult]


def run_eval(config: EvalConfig) -> Evaluation | None:
    """Evaluate the models of ``config`` on its tasks; None if only the list of tasks was wanted."""
    if config.list_tasks:
        console.table(*task_table())
        return None
    folder = Path(config.eval_output_dir)
    models = subjects(config)
    baselines = [result for place in config.eval_baseline for result in report.load(Path(place))]
    if config.eval_backend != "native":
        found = EVALUATORS.get(config.eval_backend).run(config, models, folder)
        return _finish(config, folder, found, baselines, None)
    prepared = [_Prepared(model, folder) for model in models]
    contaminated = find_contamination(config, prepared[0].tasks) if config.eval_train_dataset else None
    results = [one.run() for one in prepared]
    return _finish(config, folder, results, baselines, contaminated)


def _finish(
    config: EvalConfig, folder: Path, models: list[ModelResult], baselines: list[ModelResult], contaminated: Contamination | None
) -> Evaluation:
    place = report.write(folder, models, baselines=baselines, contamination=contaminated, config=config)
    report.show(models, baselines, contaminated)
    kept = folder / (ITEMS if config.eval_backend == "native" else config.eval_backend)
    console.say(f"report: {place / 'report.html'}; every prompt and answer: {kept}")
    return Evaluation(place, models)


class _Prepared:
    """A model with its tasks, whose data are read and whose prompts can be made: no weights are loaded yet."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        config = subject.config
        reader, length = (None, None) if subject.is_remote else (subject.reader, subject.source.max_model_len)
        self.tasks: list[Task] = [make_task(find_task(name), config, reader, length) for name in config.eval_dataset]
        self.files = [TaskFile(file_of(folder, subject.facts, task.about), task.about, subject.facts) for task in self.tasks]

    def run(self) -> ModelResult:
        """Answer what is not answered yet. The weights are freed afterwards."""
        engine: Engine | None = None
        facts = dict(self.subject.facts)
        results: list[TaskResult] = []
        try:
            for task, file in zip(self.tasks, self.files, strict=True):
                missing = [example for example in task.examples() if example.id not in file.done]
                if missing and engine is None:
                    begin = time.monotonic()
                    engine = self.subject.engine()
                    facts |= self.subject.engine_facts(engine) | {"load_s": round(time.monotonic() - begin, 1)}
                results.append(self._answer(task, file, missing, engine))
        finally:
            if engine is not None:
                engine.close()
            self.subject.free()
        return ModelResult(self.subject.name, results, facts)

    def _answer(self, task: Task, file: TaskFile, missing: list[Example], engine: Engine | None) -> TaskResult:
        """The result of ``task``, of which the examples ``missing`` are asked now."""
        name, total = f"{self.subject.name}: {task.about.name}", len(task.examples())
        if missing and len(missing) < total:
            console.say(f"{name}: {total - len(missing)} of {total} examples are answered already")
        begin, before = time.monotonic(), _tokens(engine)
        try:
            with file.appending() if missing else contextlib.nullcontext(), console.progress() as bar:
                line = bar.add_task(name, total=total, completed=total - len(missing), facts="")
                for outcome in answered(task, missing, engine) if missing else ():
                    file.add(outcome)
                    bar.update(line, advance=1)
        except KeyboardInterrupt:
            count = sum(example.id in file.done for example in task.examples())
            raise Interrupted(f"{name}: stopped after {count} of {total} examples", hint="the same command goes on there") from None
        facts = {"seconds": round(time.monotonic() - begin, 1), "asked_now": len(missing)}
        facts |= {key: count - before[key] for key, count in _tokens(engine).items() if missing and key in before}
        return result_of(file, task.about, [example.id for example in task.examples()], facts)


def _tokens(engine: Any) -> dict[str, float]:
    """What a scorer has computed so far, and what common beginnings have saved it."""
    scorer = getattr(engine, "scorer", None)
    if scorer is None:
        return {}
    return {"tokens_computed": scorer.num_computed, "tokens_shared": scorer.num_given - scorer.num_computed}


def answered(task: Task, examples: Sequence[Example], engine: Any) -> Iterator[Outcome]:
    """Outcomes of ``examples`` in the order in which they are done. ConfigError if ``engine`` cannot do what the task asks."""
    for part in _parts(task, examples):
        scored = [(example, asked) for example, asked in part if asked.request is None]
        if scored:
            yield from _scored(task, scored, engine)
        written = [(example, asked) for example, asked in part if asked.request is not None]
        requests = (replace(asked.request, id=str(number)) for number, (_, asked) in enumerate(written) if asked.request is not None)
        for (example, asked), completion in zip(written, answers(engine, requests) if written else (), strict=True):
            yield task.score(example, asked, completion)


def _parts(task: Task, examples: Sequence[Example]) -> Iterator[list[tuple[Example, Asked]]]:
    """What is asked, so much at a time that the prompts of a large task are never all in memory."""
    part: list[tuple[Example, Asked]] = []
    used = 0
    for example in examples:
        asked = task.requests(example)
        part.append((example, asked))
        used += _size(asked)
        if used > MOST_BYTES:
            yield part
            part, used = [], 0
    if part:
        yield part


def _size(asked: Asked) -> int:
    """Bytes that are held until it is answered."""
    size = TOKEN_BYTES * sum(len(text.tokens) for text in asked.texts)
    if asked.request is not None:
        size += TOKEN_BYTES * len(asked.request.prompt) + (asked.request.media.size_bytes if asked.request.media is not None else 0)
    return size


def _scored(task: Task, part: Sequence[tuple[Example, Asked]], engine: Any) -> Iterator[Outcome]:
    if not isinstance(engine, Scorer):
        raise ConfigError(
            f"--infer_backend {type(engine).__name__} gives no scores of texts, which mode {task.about.mode} needs",
            hint="remove --infer_backend, or say --eval_mode generate",
        )
    texts: list[Text] = []
    owners: list[int] = []
    firsts: list[int] = []
    for number, (_, asked) in enumerate(part):
        firsts.append(len(texts))
        texts += asked.texts
        owners += [number] * len(asked.texts)
    missing = [len(asked.texts) for _, asked in part]
    found: dict[int, Score] = {}
    for index, score in engine.scores(texts):
        found[index] = score
        owner = owners[index]
        missing[owner] -= 1
        if not missing[owner]:
            example, asked = part[owner]
            scores = [found.pop(firsts[owner] + place) for place in range(len(asked.texts))]
            yield task.score(example, asked, scores)
