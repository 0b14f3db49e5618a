"""How a written answer is judged. ``METRICS`` maps names to what makes a Metric: ``make(setting)``.

One that gives several numbers has a name of its own (rouge, ifeval); its numbers are named by it, and the first stands for the others.
"""

from swift.registry import Registry

METRICS = Registry(
    "metric of written answers",
    {
        "acc": "swift.evaluate.metrics.match:make_acc",
        "exact_match": "swift.evaluate.metrics.match:make_exact_match",
        "f1": "swift.evaluate.metrics.match:make_f1",
        "number": "swift.evaluate.metrics.numbers:make_number",
        "math": "swift.evaluate.metrics.numbers:make_math",
        "rouge": "swift.evaluate.metrics.overlap:make_rouge",
        "bleu": "swift.evaluate.metrics.overlap:make_bleu",
        "chrf": "swift.evaluate.metrics.overlap:make_chrf",
        "ifeval": "swift.evaluate.metrics.ifeval:make",
        "notice": "swift.evaluate.metrics.notice:make",
        "pass": "swift.evaluate.metrics.code:make",
    },
    group="swift.metric",
)
