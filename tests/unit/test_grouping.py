"""Tasks: every class has as many branches as wished, and groups of one class mix where they can."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab.errors import UsageError
from p2pcollab.grouping import consecutive, format_groups, parse_groups, regrouped, sized, tasks

NAMES = ("apple", "bear", "cloud", "dog")

groupings = st.integers(1, 40).flatmap(
    lambda classes: st.integers(1, classes).map(lambda size: sized(classes, size))
)
#: Of any characters that a name may have, and often of those that mean something in the file.
class_names = st.text(
    st.sampled_from('ab ,"#') | st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=8
)


@given(classes=st.integers(1, 100), count=st.integers(1, 100))
def test_consecutive_groups_hold_every_class_once_and_differ_by_one(classes: int, count: int) -> None:
    groups = consecutive(range(classes), min(count, classes))
    assert [index for group in groups for index in group] == list(range(classes))
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1


@given(groups=groupings, sets=st.integers(1, 3))
def test_each_class_is_in_one_task_of_each_set(groups, sets: int) -> None:
    made = tasks(groups, sets)
    assert [task.id for task in made] == [f"t{index}" for index in range(sets * len(groups))]
    classes = sum(len(group) for group in groups)
    for index in range(classes):
        assert sum(index in task.classes for task in made) == sets


@given(st.integers(2, 6), st.integers(2, 6))
def test_classes_that_shared_a_task_are_parted_where_there_are_as_many_tasks(size: int, more: int) -> None:
    groups = sized(size * (size + more), size)
    before = {frozenset((a, b)) for group in groups for a in group for b in group if a != b}
    after = {frozenset((a, b)) for group in regrouped(groups) for a in group for b in group if a != b}
    assert not before & after


def test_groups_are_read_as_written_and_the_rest_has_a_task_each() -> None:
    text = "# animals\n dog , bear\n\n"
    assert parse_groups(text, NAMES) == ((1, 3), (0,), (2,))


def test_a_name_with_a_comma_is_quoted() -> None:
    assert parse_groups('"salt, pepper", sugar\n', ["salt, pepper", "oil", "sugar"]) == ((0, 2), (1,))


@given(
    st.lists(class_names, min_size=1, max_size=12, unique=True).flatmap(
        lambda names: st.integers(1, len(names)).map(lambda count: (names, count))
    )
)
def test_groups_are_read_as_they_are_written_whatever_the_names(named: tuple[list[str], int]) -> None:
    names, count = named
    groups = consecutive(range(len(names)), count)
    text = format_groups([[names[index] for index in group] for group in groups])
    assert parse_groups(text, names) == groups


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dog, cat", "line 1 .* 'cat'"),
        ("dog\nbear, dog", "lines 1 and 2 .* 'dog'"),
        ("dog, dog", "lines 1 and 1"),
        ('dog\n"bear', "line 2 .* cannot be read"),
    ],
)
def test_groups_that_do_not_fit_the_data_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_groups(text, NAMES)


def test_too_many_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match="more than 128"):
        tasks(sized(100, 1), 2)
