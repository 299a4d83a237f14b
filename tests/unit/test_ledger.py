"""The ledger is a join-semilattice, and its counts count every sample once."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_examples import T0, contribution, device, history, small_spec, successor

from p2pcollab.ledger import (
    NOTHING_MERGED,
    Contribution,
    Ledger,
    frontier_of,
    joined_seen,
    states_digest,
    supersedes,
)
from p2pcollab.run import STEM, ShardId

histories = st.integers(0, 10_000).map(history)


def newest_by_hand(contributions: list[Contribution]) -> dict[object, Contribution]:
    """The deliberately dumb ledger."""
    newest: dict[object, Contribution] = {}
    for entry in contributions:
        held = newest.get(entry.key)
        if held is None or entry.version > held.version:
            newest[entry.key] = entry
    return newest


def frontier_by_hand(contributions: list[Contribution]) -> set[str]:
    return {
        entry.tensors_digest
        for entry in contributions
        if not any(
            other is not entry and all(dict(other.seen).get(who, 0) >= count for who, count in entry.seen)
            for other in contributions
        )
    }


@given(histories, st.integers(0, 100))
def test_order_and_repetition_of_arrival_do_not_matter(made: list[Contribution], seed: int) -> None:
    shuffled = made + made[: len(made) // 2]
    random.Random(seed).shuffle(shuffled)
    one, other = Ledger(made), Ledger()
    for entry in shuffled:
        other = other.add(entry)
    assert one.digest() == other.digest()
    assert one.entries == other.entries == newest_by_hand(made)


@given(histories)
def test_join_is_commutative_associative_and_idempotent(made: list[Contribution]) -> None:
    a, b, c = Ledger(made[::3]), Ledger(made[1::3]), Ledger(made[2::3])
    assert a.join(b) == b.join(a)
    assert a.join(b).join(c) == a.join(b.join(c))
    assert a.join(a) is a
    assert a.join(Ledger()) is a


@given(histories)
def test_adding_what_is_known_or_older_changes_nothing(made: list[Contribution]) -> None:
    ledger = Ledger(made)
    assert ledger.add_all(made) is ledger


def test_stale_contribution_never_replaces_newer() -> None:
    first = contribution(0)
    second = successor((first,), 0)
    assert Ledger([second]).add(first).get(T0, device(0)) is second
    assert Ledger([first]).add(second).get(T0, device(0)) is second


@given(histories)
def test_frontier_is_what_no_other_contribution_contains(made: list[Contribution]) -> None:
    ledger = Ledger(made)
    for shard in (T0, ShardId("t1")):
        frontier = ledger.frontier(shard)
        assert {entry.tensors_digest for entry in frontier} == frontier_by_hand(list(ledger.of_shard(shard)))
        assert [entry.device for entry in frontier] == sorted(entry.device for entry in frontier)


@given(histories)
def test_no_sample_is_counted_twice_and_none_is_forgotten(made: list[Contribution]) -> None:
    ledger = Ledger(made)
    for shard in (T0, ShardId("t1")):
        trained: dict[str, int] = {}
        for entry in made:
            if entry.shard == shard:
                trained[entry.device] = trained.get(entry.device, 0) + entry.lease_samples
        assert ledger.seen(shard) == ledger.visits(shard) == trained
        assert ledger.samples(shard) == sum(trained.values())


@given(histories)
def test_knowing_more_never_lowers_progress(made: list[Contribution]) -> None:
    spec = small_spec()
    before = 0.0
    for end in range(len(made)):
        progress = Ledger(made[: end + 1]).progress(T0, spec)
        assert progress >= before
        before = progress


@given(histories, st.integers(0, 100))
def test_one_exchange_in_both_directions_makes_two_ledgers_equal(made: list[Contribution], seed: int) -> None:
    rng = random.Random(seed)
    one = Ledger(entry for entry in made if rng.random() < 0.6)
    other = Ledger(entry for entry in made if rng.random() < 0.6)
    answer = other.newer_than(one.summary())
    asked = other.older_than(one.summary())
    one_after = one.add_all(answer)
    other_after = other.add_all(one.entries[key] for key in asked)
    assert one_after.digest() == other_after.digest()
    assert not one_after.newer_than(other_after.summary())
    assert not one_after.older_than(other_after.summary())


def test_equivocation_still_converges() -> None:
    one = contribution(0, tensors_digest="a" * 64)
    other = contribution(0, tensors_digest="b" * 64)
    assert Ledger([one, other]) == Ledger([other, one])
    assert Ledger([one]).newer_than(Ledger([other]).summary()) == (one,)
    assert Ledger([one]).older_than(Ledger([other]).summary()) == (one.key,)


def test_equal_headers_with_different_signatures_still_converge() -> None:
    one, other = contribution(0, signature=b"a"), contribution(0, signature=b"b")
    assert Ledger([one]).digest() != Ledger([other]).digest()
    assert Ledger([one, other]) == Ledger([other, one])


def test_two_contributions_that_claim_to_contain_each_other_do_not_both_vanish() -> None:
    forged = [contribution(author, {0: 10, 1: 10}) for author in (0, 1)]
    for order in itertools.permutations(forged):
        assert len(frontier_of(order)) == 1
    assert supersedes(*forged) != supersedes(*reversed(forged))


def test_shard_is_complete_at_its_budget_and_progress_stops_at_one() -> None:
    spec = small_spec(2, budget=100, seal=0.5)
    other = contribution(0, {0: 100}, shard=ShardId("t1"))
    ledger = Ledger([contribution(0, {0: 99}), contribution(0, {0: 50}, shard=STEM), other])
    assert ledger.progress(T0, spec) == 0.99
    assert ledger.progress(STEM, spec) == 1.0
    assert not ledger.complete(spec)
    ledger = ledger.add(contribution(0, {0: 250}, generation=2))
    assert ledger.progress(T0, spec) == 1.0
    assert ledger.complete(spec)


def test_removed_contribution_no_longer_counts() -> None:
    honest = contribution(0)
    greedy = contribution(1, {0: 10**6, 1: 10**6}, generation=2)
    ledger = Ledger([honest, greedy])
    assert ledger.frontier(T0) == (greedy,)
    assert ledger.without(greedy).frontier(T0) == (honest,)


def test_nobody_has_trained_the_initial_state() -> None:
    ledger = Ledger()
    assert ledger.generation(T0) == 0
    assert ledger.samples(T0) == 0
    assert states_digest(ledger.frontier(T0)) == NOTHING_MERGED


@pytest.mark.parametrize("field", ["tensors_digest", "lease_samples", "generation"])
def test_state_has_another_name_when_its_mean_may_differ(field: str) -> None:
    one, other = contribution(0), contribution(1)
    changes: dict[str, Any] = {field: "c" * 64 if field == "tensors_digest" else 99}
    changed = replace(other, **changes)
    assert states_digest([one, other]) == states_digest([other, one])
    assert states_digest([one, other]) != states_digest([one, changed])


def test_seen_joins_to_the_greatest_count() -> None:
    entries = [contribution(0, {0: 3, 1: 9}), contribution(1, {1: 7, 2: 1})]
    assert joined_seen(entries) == {device(0): 3, device(1): 9, device(2): 1}
