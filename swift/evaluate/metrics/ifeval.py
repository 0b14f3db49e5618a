"""IFEval: whether instructions that a program can check were followed (Zhou et al. 2023, arXiv:2311.07911).

The 25 kinds are checked as google-research/instruction_following_eval defines them. Two of its tools are replaced by rules of
our own, so that nothing need be installed: nltk's sentences and capital words (``prose``), langdetect's languages (``language``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from swift.errors import DataError, near
from swift.evaluate.base import Example
from swift.evaluate.judging import Judged, Metric, Setting, Verdict
from swift.evaluate.metrics.instructions import CHECKS


def make(setting: Setting) -> Metric:
    """Shares of prompts all of whose instructions were followed, and of all instructions, each strictly and loosely.

    Those of instructions are pooled over prompts, as published: a sum and a count of each prompt.
    """
    setting.take()
    for example in setting.examples:
        _check(example)

    def judge(judged: Judged) -> Verdict:
        strict, loose = followed(judged.text, judged.fields["instruction_id_list"], judged.fields["kwargs"])
        metrics = {"prompt_level_strict_acc": float(all(strict)), "prompt_level_loose_acc": float(all(loose))}
        for name, results in (("inst_level_strict_acc", strict), ("inst_level_loose_acc", loose)):
            metrics |= {f"{name}.sum": float(sum(results)), f"{name}.count": float(len(results))}
        return Verdict(metrics, {"instructions": list(judged.fields["instruction_id_list"]), "strict": strict, "loose": loose})

    return Metric(("prompt_level_strict_acc", "prompt_level_loose_acc"), judge)


def _check(example: Example) -> None:
    """DataError for a row whose instructions cannot be checked, before anything is answered."""
    try:
        followed("text", example.fields["instruction_id_list"], example.fields["kwargs"])
    except KeyError as problem:
        raise DataError(f"row {example.id} has no column {problem}") from None
    except DataError as problem:
        raise DataError(f"row {example.id}: {problem}", hint=problem.hint) from None


def followed(text: str, ids: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]) -> tuple[list[bool], list[bool]]:
    """(strict, loose): whether each instruction was followed; loosely, by the answer or by one of seven variants of it.

    Variants have no asterisks, no first line, no last line, or several of these. DataError for an unknown instruction.
    """
    if len(ids) != len(arguments):
        raise DataError(f"{len(ids)} instructions have {len(arguments)} kwargs")
    variants = _variants(text)
    strict: list[bool] = []
    loose: list[bool] = []
    for id, given in zip(ids, arguments, strict=True):
        if id not in CHECKS:
            match = near(id, CHECKS)
            raise DataError(f"unknown instruction {id!r}", hint=f"did you mean {match!r}?" if match else f"known: {', '.join(CHECKS)}")
        known = {name: value for name, value in (given or {}).items() if value is not None}
        try:
            results = [bool(variant.strip()) and bool(CHECKS[id](variant, known)) for variant in variants]
        except (KeyError, TypeError, ValueError) as problem:
            raise DataError(f"instruction {id!r} has kwargs that do not fit: {problem}") from None
        strict.append(results[0])
        loose.append(any(results))
    return strict, loose


def _variants(text: str) -> list[str]:
    """The answer itself first."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(one.replace("*", "") for one in cut)]
