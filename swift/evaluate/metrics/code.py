"""Programs judged by running them on the tests of their task: pass@1 of an answer, pass@k of several (Chen et al. 2021)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from swift.errors import ConfigError, DataError
from swift.evaluate.base import Outcome
from swift.evaluate.judging import Judged, Metric, Setting, Verdict
from swift.evaluate.metrics.limited import Limits, isolation, run_limited

PASS = "pass@1"
_LIMITS = ("timeout_s", "memory_mib")


def make(setting: Setting) -> Metric:
    """``pass@1``. ConfigError unless the user's arguments of the task say ``run_code``: answers are run here, as programs.

    Options, of the declaration or the user's: timeout_s, memory_mib.
    """
    setting.take(*_LIMITS)
    if setting.arguments.get("run_code") is not True:
        raise ConfigError(
            f"{setting.task} runs the programs that the model writes, on this machine and with your rights",
            hint=f'allow it with --eval_dataset_args \'{{"{setting.task}": {{"run_code": true}}}}\', better in a container',
        )
    given = {**setting.options, **{name: setting.arguments[name] for name in _LIMITS if name in setting.arguments}}
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{name} of {setting.task} is {value!r}", hint="give a number above 0")
    limits = Limits(timeout_s=float(given.get("timeout_s", 10.0)), memory_mib=int(given.get("memory_mib", 1024)))

    def judge(judged: Judged) -> Verdict:
        ran = run_limited(program_of(judged.fields, judged.found.value or ""), limits)
        return Verdict({PASS: float(ran.passed)}, {"ran": ran.reason, "has_no_network": bool(isolation())})

    return Metric((PASS,), judge, ("run_code", *_LIMITS))


def program_of(fields: Mapping[str, Any], code: str) -> str:
    """An answer with the tests of its row, as HumanEval (prompt, test, entry_point) or MBPP (test_list, test_setup_code) has them.

    HumanEval's answer goes on with the prompt, or defines the function anew; then the prompt stays, for its imports and helpers.
    """
    if {"prompt", "test", "entry_point"} <= fields.keys():
        joint = "\n\n" if f"def {fields['entry_point']}" in code else ""
        return f"{fields['prompt']}{joint}{code}\n\n{fields['test']}\n\ncheck({fields['entry_point']})\n"
    if "test_list" in fields:
        setup = fields.get("test_setup_code") or "\n".join(fields.get("test_imports") or [])
        return "\n\n".join([setup, code, *fields["test_list"]]) + "\n"
    raise DataError("a row has no tests", hint="HumanEval has prompt, test and entry_point; MBPP has test_list")


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k answers, drawn from n of which c pass, passes (Chen et al. 2021, eq. 1)."""
    if not 1 <= k <= num_samples:
        raise ConfigError(f"pass@{k} needs at least {k} answers to each question, not {num_samples}")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def pass_at(outcomes: Iterable[Outcome], k: int) -> float:
    """pass@k over questions, whose answers have the id of the question, # and a number."""
    results: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        results[outcome.id.rpartition("#")[0] or outcome.id].append(outcome.metrics[PASS])
    if not results:
        raise ConfigError("there are no answers to judge")
    return sum(pass_at_k(len(each), round(sum(each)), k) for each in results.values()) / len(results)
