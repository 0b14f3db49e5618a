"""Evaluation: tasks declared as data, scored by stated modes, with intervals and comparisons. ``run`` is the file to read first."""

from swift.registry import Registry

TASKS = Registry("task", {}, group="swift.task")
"""Tasks in Python, made by ``make(spec, ...)``; those declared in tasks/*.yaml need no line here."""

EVALUATORS = Registry(
    "evaluation back end",
    {
        "evalscope": "swift.evaluate.external.evalscope",
        "lm_eval": "swift.evaluate.external.lm_eval",
        "opencompass": "swift.evaluate.external.opencompass",
        "vlmevalkit": "swift.evaluate.external.vlmevalkit",
    },
    group="swift.evaluator",
)
