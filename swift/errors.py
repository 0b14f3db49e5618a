"""The error tree of swift: each error says what happened and what would work.

SwiftError                  exit code 1
|- InputError               exit code 2: the user can mend it before anything runs
|  |- ConfigError           an option or a combination of options
|  |- DataError             a row, a file or a data set
|  |- HubError              a model or data set that cannot be found or fetched
|  |- ModelError            a model directory that cannot be read or used
|  |- CheckpointError       a run directory or checkpoint that cannot be read or used
|  |- DependencyError       a Python package that is not installed
|  `- MachineError          disk, permissions, memory, a device, a busy run directory
`- TrainingError            the run itself went wrong (NaN, divergence)

Interrupted                 exit code 130: the user stopped the run
"""

import difflib
from collections.abc import Iterable


class SwiftError(Exception):
    """An error that a person should read as one line, with an optional ``hint`` as a second."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(SwiftError):
    exit_code = 2


class ConfigError(InputError):
    pass


class DataError(InputError):
    pass


class HubError(InputError):
    pass


class ModelError(InputError):
    pass


class CheckpointError(InputError):
    pass


class DependencyError(InputError):
    pass


class MachineError(InputError):
    pass


class TrainingError(SwiftError):
    pass


class Interrupted(SwiftError):
    exit_code = 130


def first_line(problem: object) -> str:
    """The first line of what a library says, or the name of its error if it says nothing."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most likely means, or None if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return matches[0] if matches else None
