"""Tasks that are evaluated while training: the model answers as it is, and is left as it was."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from swift.config.commands import SftConfig
from swift.engine.native.score import scorer_of
from swift.engine.scoring import Score, Scorer, Text
from swift.engine.transformers import TransformersEngine
from swift.errors import ConfigError, near
from swift.evaluate import compare
from swift.evaluate.base import Task, TaskResult
from swift.evaluate.live import LiveEvaluation
from swift.evaluate.statistics import estimate, metrics_of
from swift.hub import Snapshot
from swift.model.load import Loaded, context_length

LOWER_IS_BETTER = ("loss", *sorted(compare.LOWER_IS_BETTER))  # endings of names of metrics
BATCH = 8  # answers that are written together


class _LiveEngine(TransformersEngine):
    """Answers by ``generate``, and scores by ``scorer``, of a model that goes on being trained."""

    def __init__(self, loaded: Loaded, scorer: Scorer) -> None:
        super().__init__(loaded, max_batch_size=BATCH, is_live=True)
        self.scorer = scorer

    def scores(self, texts: Sequence[Text]) -> Iterator[tuple[int, Score]]:
        """See Scorer."""
        return self.scorer.scores(texts)


def read_tasks(config: SftConfig, snapshot: Snapshot, tokenizer: Any) -> LiveEvaluation | None:
    """The tasks of --eval_dataset with their data; None if there are none. Raises InputError for what cannot be evaluated."""
    metric = config.metric_for_best_model.removeprefix("eval_")
    live = LiveEvaluation(config, tokenizer, context_length(snapshot.path) or 2**31) if config.eval_dataset else None
    known = ["loss", "token_acc", *(live.metrics if live else [])]
    if metric not in known:
        match = near(metric, known)
        hint = f"did you mean {match!r}?" if match else f"choose from: {', '.join(known)}"
        raise ConfigError(f"--metric_for_best_model does not know {metric!r}", hint=hint)
    return live


def task_text(task: Task) -> str:
    """What is asked, for a reader."""
    about = task.about
    return f"{about.name}: {len(task.examples()):,} examples, {about.mode}, {about.num_fewshot} solved before each"


def evaluate_tasks(live: LiveEvaluation, loaded: Loaded, model: Any, *, is_compiled: bool = False) -> dict[str, float]:
    """The metrics of all tasks by names that begin with eval_, and the seconds they took.

    They are computed in the precision of the weights, as after training, whatever the steps compute in. A metric that no
    answer has a finite value of is left out.
    """
    begin = time.monotonic()
    # Compiled blocks would be compiled anew for each shape of a pass.
    eager = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    with scorer_of(model) as scorer, torch.no_grad(), eager:
        results = live.run(_LiveEngine(replace(loaded, model=model), scorer))
    if loaded.device.type != "cpu":
        torch.accelerator.empty_cache()
    values = {name: value for result in results for name, value in metric_values(result).items()}
    return values | {"eval_tasks_runtime": time.monotonic() - begin}


def metric_values(result: TaskResult) -> dict[str, float]:
    """Every metric of ``result`` as eval_TASK_METRIC; the one that stands for it has the ends of its 95% interval beside it."""
    values: dict[str, float] = {}
    for metric in metrics_of(result.outcomes):
        found, name = estimate(result.outcomes, metric), f"eval_{result.about.name}_{metric}"
        if found is None:
            continue
        values[name] = found.value
        if metric == result.about.metric and found.low is not None and found.high is not None:
            values |= {f"{name}_low": found.low, f"{name}_high": found.high}
    return values
