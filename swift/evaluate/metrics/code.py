"""Programs judged by running them on the tests of their task: pass@1 (Chen et al. 2021), of several answers to a question their mean."""

from collections.abc import Mapping
from typing import Any

from swift.errors import ConfigError, DataError
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
