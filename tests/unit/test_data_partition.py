"""Every device of a run divides the same data in the same way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab.data.partition import Share, partition, split_by_name, stratified_subset
from p2pcollab.errors import UsageError

labels_lists = st.lists(st.integers(0, 5), max_size=200).map(lambda items: np.array(items, dtype=np.int64))
seeds = st.integers(0, 2**31 - 1)


def counts(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, minlength=6)


@given(labels_lists, st.integers(1, 12), st.sampled_from(["iid", "skewed"]), seeds)
def test_parts_are_disjoint_and_together_hold_everything(labels, parts, kind, seed):
    divided = partition(labels, parts, kind, seed=seed)
    assert len(divided) == parts
    assert sorted(np.concatenate(divided).tolist()) == list(range(len(labels)))


@given(labels_lists, st.integers(1, 12), seeds)
def test_iid_parts_are_equal_within_one_sample_in_all_and_of_each_class(labels, parts, seed):
    divided = partition(labels, parts, seed=seed)
    sizes = [len(part) for part in divided]
    per_class = np.array([counts(labels[part]) for part in divided])
    assert max(sizes) - min(sizes) <= 1
    assert (per_class.max(axis=0) - per_class.min(axis=0)).max() <= 1


@given(labels_lists, st.integers(1, 12), st.sampled_from(["iid", "skewed"]), seeds)
def test_the_same_seed_gives_the_same_parts(labels, parts, kind, seed):
    first, second = (partition(labels, parts, kind, seed=seed) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_parts_stay_the_same_for_ever():
    """Devices with different versions of numpy divide one data set: a change here breaks running runs."""
    labels = np.arange(1000) % 7
    parts = np.concatenate(partition(labels, 3, seed=5)).astype("<i8")
    limited = stratified_subset(labels, 100, seed=5).astype("<i8")
    digests = [hashlib.sha256(indices.tobytes()).hexdigest()[:16] for indices in (parts, limited)]
    assert digests == ["3895794f35a68bde", "7bf72e527ce0560b"]


def test_another_seed_gives_other_parts():
    labels = np.zeros(100, dtype=np.int64)
    assert not np.array_equal(partition(labels, 2, seed=1)[0], partition(labels, 2, seed=2)[0])


def test_skewed_parts_have_few_classes():
    labels = np.repeat(np.arange(10), 100)
    parts = partition(labels, 5, "skewed", seed=1)
    assert all(len(np.unique(labels[part])) <= 2 for part in parts)


@given(labels_lists, st.integers(1, 250), seeds)
def test_a_limit_keeps_the_proportions_of_the_classes(labels, limit, seed):
    kept = stratified_subset(labels, limit, seed=seed)
    assert len(kept) == min(limit, len(labels))
    assert len(set(kept.tolist())) == len(kept)
    if len(labels):
        expected = counts(labels) * len(kept) / len(labels)
        assert np.abs(counts(labels[kept]) - expected).max() <= 3


@given(labels_lists, st.integers(1, 250), st.integers(0, 50), seeds)
def test_a_smaller_limit_takes_some_of_what_a_larger_one_takes(labels, limit, more, seed):
    small, large = (stratified_subset(labels, count, seed=seed) for count in (limit, limit + more))
    assert set(small.tolist()) <= set(large.tolist())


@given(labels_lists)
def test_one_in_five_of_each_class_is_held_out(labels):
    names = [f"{index}.jpg" for index in range(len(labels))]
    train, test = split_by_name(labels, names)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for count, held in zip(counts(labels), counts(labels[test]), strict=True):
        assert held == (0 if count < 3 else max(1, round(count / 5)))


def test_the_split_follows_names_wherever_they_are_in_the_list():
    names = [f"{index}.jpg" for index in range(50)]
    labels = np.zeros(50, dtype=np.int64)
    backwards = names[::-1]
    held = {names[index] for index in split_by_name(labels, names)[1]}
    assert {backwards[index] for index in split_by_name(labels, backwards)[1]} == held


def test_adding_an_image_moves_hardly_any_other_to_the_other_side():
    names = [f"{index}.jpg" for index in range(101)]
    labels = np.zeros(101, dtype=np.int64)
    before = {names[index] for index in split_by_name(labels[:100], names[:100])[1]}
    after = {names[index] for index in split_by_name(labels, names)[1]}
    assert len(before ^ after) <= 2


@pytest.mark.parametrize(
    ("text", "share"), [("1/1", Share(1, 1)), ("2/5", Share(2, 5)), (" 5 / 5 ", Share(5, 5))]
)
def test_a_share_is_read(text, share):
    assert Share.parse(text) == share
    assert Share.parse(str(share)) == share


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3/2", "part 3 of only 2"),
        ("0/5", "counted from 1"),
        ("1/0", "no parts"),
        ("a/b", "not two whole numbers"),
        ("", "not two whole numbers"),
        ("2", "not two whole numbers"),
        ("-1/5", "not two whole numbers"),
        ("1.5/5", "not two whole numbers"),
        ("1/2/3", "not two whole numbers"),
        ("\u0662/\u0665", "not two whole numbers"),
        ("1/999999", "more than 10000 parts"),
        ("1" * 5000 + "/2", "not two whole numbers"),
    ],
)
def test_a_share_that_cannot_be_is_refused_with_the_reason(text, reason):
    with pytest.raises(UsageError, match=reason) as caught:
        Share.parse(text)
    assert "2/5" in caught.value.fix
