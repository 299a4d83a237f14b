"""Which contributions count: only what their makers' peers have signed, and honest work always."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from coordinator_examples import SILENCE, Record, coordinator, mine
from hypothesis import given
from hypothesis import strategies as st
from ledger_examples import T0, contribution, device, history, small_spec, successor

from p2pcollab.claims import equivocation, own_count
from p2pcollab.coordinator import Coordinator, CoordinatorSettings
from p2pcollab.ledger import Contribution, Ledger
from p2pcollab.trust import Verdict

PATIENCE_S = CoordinatorSettings().replication.write_off_s
SPEC = small_spec(4)
#: A device that only listens.
LISTENER = 99


def listener(live: Iterable[int] = (), now: float = 0.0) -> Coordinator:
    one = coordinator(LISTENER)
    see(one, live, now)
    return one


def see(one: Coordinator, live: Iterable[int], now: float) -> None:
    """Let time go by up to `now` with these devices alive."""
    records = [Record(device=device(index), beat=int(now * 10) + 1, state="observer") for index in live]
    one.observe_board(records, now)


def deliver(one: Coordinator, entries: Sequence[Contribution], seed: int) -> None:
    """In a random order, some of them twice, some together."""
    rng = random.Random(seed)
    left = [*entries, *rng.sample(entries, len(entries) // 2)]
    rng.shuffle(left)
    while left:
        count = rng.randint(1, 4)
        one.receive(left[:count], 0.0)
        del left[:count]


def signed(entries: Iterable[Contribution], key: tuple[str, str]) -> int:
    return max((own_count(entry) for entry in entries if entry.key == key), default=0)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_honest_work_counts_as_soon_as_what_it_was_built_on_was_heard_of_in_any_order(
    seed: int, order: int
) -> None:
    made = [mine(entry) for entry in history(seed)]
    one = listener(range(4))
    deliver(one, made, order)
    assert one.believed == one.ledger == Ledger(made)
    assert one.refusals() == ()
    assert one.proofs == ()


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 12))
def test_nobody_counts_for_more_than_what_it_has_signed(seed: int, order: int, heard: int) -> None:
    made = [mine(entry) for entry in history(seed)]
    random.Random(order).shuffle(made)
    one = listener(range(4))
    one.receive(made[:heard], 0.0)
    for entry in one.believed.entries.values():
        for other, count in entry.seen:
            assert count <= signed(made[:heard], (entry.shard, other))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_work_on_top_of_what_died_with_its_maker_counts_after_a_while(seed: int, order: int) -> None:
    """Device 0 has died with its last lease, whose header only those that built on it had heard of."""
    made = [mine(entry) for entry in history(seed)]
    last = next((entry for entry in reversed(made) if entry.device == device(0)), None)
    heard = [entry for entry in made if entry is not last]
    one = listener(range(1, 4))
    deliver(one, heard, order)
    see(one, range(1, 4), PATIENCE_S / 2)
    see(one, range(1, 4), PATIENCE_S + 1)
    assert one.believed == Ledger(heard)
    # What is made on top of it later need not wait again.
    frontier = one.believed.frontier(T0)
    later = mine(successor(frontier, 1))
    one.receive([later], PATIENCE_S + 2)
    assert one.believed.frontier(T0) == (later,)


def test_a_claim_of_a_live_devices_work_that_it_has_not_signed_never_counts() -> None:
    one = listener([1, 2])
    honest = mine(contribution(1))
    one.receive([honest], 0.0)
    greedy = mine(contribution(2, {1: 500, 2: 10}, generation=2))
    one.receive([greedy], 0.0)
    assert one.ledger.get(T0, device(2)) == greedy
    for step in range(1, 40):
        see(one, [1, 2], step * SILENCE)
        assert one.believed.frontier(T0) == (honest,)
        assert one.believed.samples(T0) == 10
    (told,) = one.refusals()
    assert told.contribution == greedy
    assert "500 samples" in told.reason and "signed 10" in told.reason


def test_not_more_than_a_lease_is_granted_of_a_device_that_is_gone_and_only_once() -> None:
    lease_max = SPEC.schedule.lease_samples + SPEC.schedule.batch_size
    one = listener([2])
    gone = mine(contribution(1))
    now = 0.0
    one.receive([gone], now)
    for generation in range(2, 8):
        claim = mine(
            contribution(2, {1: 10 + generation * lease_max, 2: 10 * generation}, generation=generation)
        )
        one.receive([claim], now)
        see(one, [2], now + PATIENCE_S / 2)
        now += PATIENCE_S + 1
        see(one, [2], now)
        assert one.believed.frontier(T0) == (gone,)
    within = mine(contribution(2, {1: 10 + lease_max, 2: 90}, generation=9))
    one.receive([within], now)
    assert one.believed.frontier(T0) == (gone,)
    now += PATIENCE_S + 1
    see(one, [2], now)
    assert one.believed.frontier(T0) == (within,)
    beyond = mine(contribution(2, {1: 11 + lease_max, 2: 100}, generation=10))
    one.receive([beyond], now)
    see(one, [2], now + PATIENCE_S / 2)
    see(one, [2], now + PATIENCE_S + 1)
    assert one.believed.frontier(T0) == (within,)


def test_a_claim_counts_once_the_device_that_it_is_about_has_signed_it() -> None:
    one = listener([1, 2])
    first = mine(contribution(1))
    second = mine(successor((first,), 1))
    on_top = mine(successor((second,), 2))
    one.receive([first, on_top], 0.0)
    assert one.believed.frontier(T0) == (first,)
    one.receive([second], 50 * PATIENCE_S)
    assert one.believed.frontier(T0) == (on_top,)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_two_stories_of_one_device_are_proof_in_any_order_and_cost_nobody_else_anything(
    seed: int, order: int
) -> None:
    made = [mine(entry) for entry in history(seed)]
    liar = mine(contribution(7))
    other = replace(liar, tensors_digest="another story")
    later = mine(contribution(7, {7: 500}, generation=9))
    one = listener(range(8))
    deliver(one, [*made, liar, other], order)
    one.receive([later], 1.0)
    assert one.believed == Ledger(made)
    ((first, second),) = one.proofs
    assert equivocation(first, second)
    assert {told.contribution.device for told in one.refusals()} == {device(7)}
    assert one.receive([liar, other, later], 2.0) == ()
    assert one.refusals() == ()


def test_what_came_before_the_two_stories_still_counts() -> None:
    one = listener([7])
    first = mine(contribution(7))
    second = mine(successor((first,), 7))
    one.receive([first], 0.0)
    one.receive([second], 0.0)
    one.receive([replace(second, tensors_digest="another story")], 0.0)
    assert one.believed.frontier(T0) == (first,)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_replayed_contributions_change_nothing(seed: int, order: int) -> None:
    made = [mine(entry) for entry in history(seed)]
    one = listener(range(4))
    one.receive(made, 0.0)
    before, believed = one.ledger.digest(), one.believed.digest()
    replayed = list(made)
    random.Random(order).shuffle(replayed)
    for entry in replayed:
        assert one.receive([entry], 1.0) == ()
    assert (one.ledger.digest(), one.believed.digest()) == (before, believed)
    assert one.refusals() == ()


def test_refused_tensors_leave_what_came_before_and_the_next_ones_get_their_chance() -> None:
    one = listener([1, 2])
    first = mine(contribution(1))
    poison = mine(successor((first,), 2))
    one.receive([first, poison], 0.0)
    one.judged(poison, Verdict(reason="of the wrong shape", gross=True, malformed=True))
    assert one.believed.frontier(T0) == (first,)
    # It is known all the same, so that gossip comes to rest.
    assert one.ledger.get(T0, device(2)) == poison
    assert one.receive([poison], 1.0) == ()
    see(one, [1, 2], 1.0)
    assert one.believed.frontier(T0) == (first,)
    better = mine(successor((first, poison), 2))
    one.receive([better], 2.0)
    assert one.believed.frontier(T0) == (better,)
