"""Which linear layers of a block share their input, in which order they run, and where the results of its parts come from.

Found by running the block once on a few tokens; no architecture is known by name.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same tensor. ``child`` is the part of the block that they are in, None for the block itself.

    ``ends_child``: the part's result is that of the group's one layer, and nothing else.
    """

    layers: tuple[str, ...]
    child: str | None
    ends_child: bool = False


Level = tuple[Group, ...]
"""Groups that do not depend on each other: one, or the same layers of several experts."""


@dataclass
class _Seen:
    name: str
    input: Tensor
    output: Any


def find_levels(block: nn.Module, run: Callable[[], Any], skips: Callable[[str], bool]) -> tuple[list[Level], dict[str, int]]:
    """The groups of the linear layers of ``block`` that ``run`` (which runs it) uses, in their order, without those of ``skips``.

    And for each part of the block with such layers the length of the tuple that it gives, 0 if it gives a tensor.
    Layers of experts that got no token are put beside those of the same name that got some.
    """
    linear = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    children = {name: child for name, child in block.named_children() if any(key.startswith(f"{name}.") for key in linear)}
    calls: list[_Seen] = []
    results: dict[str, list[Any]] = {name: [] for name in children}
    handles = [module.register_forward_hook(_note(name, calls)) for name, module in linear.items()]
    handles += [child.register_forward_hook(_keep(results[name])) for name, child in children.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    counts = {name: sum(call.name == name for call in calls) for name in linear}
    groups: list[Group] = []
    last: _Seen | None = None
    for call in calls:
        if counts[call.name] != 1 or skips(call.name):
            continue
        child = call.name.partition(".")[0] if call.name.partition(".")[0] in children else None
        if last is not None and _is_same(last.input, call.input) and groups[-1].child == child:
            groups[-1] = Group((*groups[-1].layers, call.name), child)
        else:
            groups.append(Group((call.name,), child))
        last = call
    groups = [_with_end(group, groups, calls, results) for group in groups]
    idle = [name for name in linear if counts[name] == 0 and NUMBER.search(name) and not skips(name)]
    lengths = {name: len(given[0]) if given and isinstance(given[0], tuple) else 0 for name, given in results.items()}
    return _levels(groups, idle), lengths


def _note(name: str, calls: list[_Seen]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append(_Seen(name, args[0], output))

    return hook


def _keep(results: list[Any]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        results.append(output)

    return hook


def first_of(output: Any) -> Any:
    """The hidden states in what a module gave."""
    return output[0] if isinstance(output, tuple) else output


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.shape[-1] == other.shape[-1]


def _with_end(group: Group, groups: Sequence[Group], calls: Sequence[_Seen], results: dict[str, list[Any]]) -> Group:
    if group.child is None or len(group.layers) != 1 or len(results[group.child]) != 1:
        return group
    is_last = [other for other in groups if other.child == group.child][-1] is group
    output = next(call.output for call in calls if call.name == group.layers[0])
    result = first_of(results[group.child][0])
    is_end = is_last and isinstance(result, Tensor) and _is_same(output, result)
    return Group(group.layers, group.child, is_end)


def _levels(groups: Sequence[Group], idle: Sequence[str]) -> list[Level]:
    """Groups of numbered modules (experts) beside those whose names differ in the number alone."""
    levels: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        pattern = tuple(NUMBER.sub(".*.", name) for name in group.layers)
        levels.setdefault(pattern, []).append(group)
    for pattern, known in levels.items():
        numbers: dict[str, list[str]] = {}
        for name in idle:
            if NUMBER.sub(".*.", name) in pattern:
                numbers.setdefault(NUMBER.search(name)[0], []).append(name)  # type: ignore[index]
        known += [Group(tuple(names), known[0].child) for names in numbers.values()]
    return [tuple(level) for level in levels.values()]
