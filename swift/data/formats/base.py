"""The contract of a data format."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from swift.data.records import Record


@dataclass(frozen=True)
class Format:
    """One layout of rows.

    ``matches`` sees the columns that hold something. ``convert`` raises DataError with the reason, without the position
    (which the caller knows), if the row is not what its columns promise.
    """

    matches: Callable[[Set[str]], bool]
    convert: Callable[[dict[str, Any]], Record]
