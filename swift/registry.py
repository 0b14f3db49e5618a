"""The one registry: names to things, loaded when first used.

A member is a "module:attribute" or "module" string (imported on first use), an object given to ``register``,
or an entry point of an installed distribution in the group of the registry.
"""

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any

from swift.errors import ConfigError, near


class Registry:
    """Members of one ``kind``; plug-ins join through the entry-point group ``group``."""

    def __init__(self, kind: str, members: dict[str, str] | None = None, *, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._members: dict[str, Any] = dict(members or {})
        self._plugins_read = group is None

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator: make the decorated object a member under ``name``."""
        if name in self._members:
            raise ConfigError(f"{self.kind} {name!r} is registered twice")

        def add(member: Any) -> Any:
            self._members[name] = member
            return member

        return add

    def get(self, name: str) -> Any:
        """The member called ``name``; ConfigError with a near match if there is none."""
        if name not in self._members:
            self._read_plugins()
        if name not in self._members:
            match = near(name, self._members)
            hint = f"did you mean {match!r}?" if match else f"known: {', '.join(self)}"
            raise ConfigError(f"unknown {self.kind} {name!r}", hint=hint)
        member = self._members[name]
        if isinstance(member, str):
            module, _, attribute = member.partition(":")
            found = importlib.import_module(module)
            member = self._members[name] = getattr(found, attribute) if attribute else found
        return member

    def __iter__(self) -> Iterator[str]:
        self._read_plugins()
        return iter(sorted(self._members))

    def __contains__(self, name: object) -> bool:
        self._read_plugins()
        return name in self._members

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True
        for point in entry_points(group=self.group or ""):
            self._members.setdefault(point.name, point.value)
