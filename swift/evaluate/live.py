"""Tasks on a model that is being trained: data are read once, the model answers as it is, and is left as it was."""

from typing import Any

from swift.config.evaluate import TasksConfig
from swift.evaluate.base import Task, TaskResult
from swift.evaluate.declared import make_task
from swift.evaluate.run import answered
from swift.evaluate.spec import find_task


class LiveEvaluation:
    """``config`` is a TasksConfig that is also a model's. Raises for tasks and data that cannot be, when it is made."""

    def __init__(self, config: TasksConfig, tokenizer: Any, max_model_len: int) -> None:
        self.tasks: list[Task] = [make_task(find_task(name), config, tokenizer, max_model_len) for name in config.eval_dataset]

    @property
    def metrics(self) -> list[str]:
        """Names of what ``run`` gives."""
        return [f"{task.about.name}_{task.about.metric}" for task in self.tasks]

    def run(self, engine: Any) -> list[TaskResult]:
        """Outcomes of all examples, from an ``engine`` of the live model."""
        results = []
        for task in self.tasks:
            examples = list(task.examples())
            order = {example.id: number for number, example in enumerate(examples)}
            outcomes = sorted(answered(task, examples, engine), key=lambda outcome: order[outcome.id])
            results.append(TaskResult(task.about, outcomes))
        return results
