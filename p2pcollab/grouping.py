"""Which classes are trained as a unit: the tasks of a new run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from . import limits
from .errors import UsageError
from .name_lists import join_names, split_names
from .run import TaskSpec

Groups = tuple[tuple[int, ...], ...]
"""Indices of classes, group by group."""


def consecutive(order: Sequence[int], count: int) -> Groups:
    """So many groups of neighbours in an order of the classes; their sizes differ by at most 1."""
    bounds = [len(order) * index // count for index in range(count + 1)]
    return tuple(tuple(order[bounds[index] : bounds[index + 1]]) for index in range(count))


def sized(classes: int, size: int) -> Groups:
    """As few groups of consecutive classes as keep to a size.

    Raises:
        UsageError: no group, or too many, are of that size.
    """
    if not 1 <= size <= classes:
        raise UsageError(f"{size} classes per task do not fit a run of {classes} classes")
    count = math.ceil(classes / size)
    if count > limits.TASKS_MAX:
        fix = f"use --classes-per-task {math.ceil(classes / limits.TASKS_MAX)} or more"
        raise UsageError(f"{count} tasks are more than {limits.TASKS_MAX}", fix)
    return consecutive(range(classes), count)


def parse_groups(text: str, classes: Sequence[str]) -> Groups:
    """Read groups as a person writes them: one task a line, its classes as in `name_lists`.

    Empty lines, and lines that begin with #, are left out. Classes that are not named get a task each.

    Raises:
        UsageError: a class does not exist, or is named twice, or the quotes are wrong.
    """
    index = {name: number for number, name in enumerate(classes)}
    groups: list[tuple[int, ...]] = []
    line_of: dict[str, int] = {}
    # Not `splitlines`: that also parts at characters which the name of a class may have.
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"line {number} of the groups"
        if line.lstrip().startswith("#"):
            continue
        names = [name if name in index else name.strip() for name in split_names(line.strip("\r"), where)]
        names = [name for name in names if name]
        for name in names:
            if name not in index:
                raise UsageError(f"{where} names {name!r}, which the data do not have")
            if name in line_of:
                raise UsageError(f"lines {line_of[name]} and {number} of the groups both name {name!r}")
            line_of[name] = number
        if names:
            groups.append(tuple(sorted(index[name] for name in names)))
    rest = [(number,) for number, name in enumerate(classes) if name not in line_of]
    return (*groups, *rest)


def format_groups(groups: Iterable[Iterable[str]]) -> str:
    """Groups of classes as `parse_groups` reads them."""
    return "".join(f"{join_names(names)}\n" for names in groups)


def regrouped(groups: Groups) -> Groups:
    """Other groups of the same sizes: classes that share a task share none here, as far as that can be.

    Groups of one class stay as they are.
    """
    longest = max(len(group) for group in groups)
    mixed = [group[place] for place in range(longest) for group in groups if place < len(group)]
    return tuple(tuple(sorted(group)) for group in consecutive(mixed, len(groups)))


def tasks(groups: Groups, sets: int) -> tuple[TaskSpec, ...]:
    """A task for each group, and further sets of tasks over other groupings of the same classes.

    Raises:
        UsageError: that makes too many tasks.
    """
    if sets * len(groups) > limits.TASKS_MAX:
        raise UsageError(
            f"{sets} times {len(groups)} tasks are more than {limits.TASKS_MAX}",
            "use fewer branches per class, or more classes per task",
        )
    made: list[TaskSpec] = []
    for _ in range(sets):
        made += [TaskSpec(id=f"t{len(made) + index}", classes=group) for index, group in enumerate(groups)]
        groups = regrouped(groups)
    return tuple(made)
