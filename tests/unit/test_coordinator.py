"""One device's decisions: liveness, claims, what a lease starts from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from coordinator_examples import (
    SETTINGS,
    SILENCE,
    SPEC,
    T1,
    Record,
    coordinator,
    digests,
    holding,
    mine,
    record_of,
    start,
)
from hypothesis import given
from hypothesis import strategies as st
from ledger_examples import T0, contribution, device, small_spec, successor

from p2pcollab.coordinator import (
    HOPELESS,
    WAIT_LEASES,
    Advert,
)
from p2pcollab.ledger import VOTE_STALENESS_MAX, states_digest
from p2pcollab.presence import FORGET_SILENCES, OVERDUE_FACTOR, OVERDUE_UNKNOWN_S, STEM_LEASE_MAX
from p2pcollab.run import STEM
from p2pcollab.trust import Verdict

REFUSED = Verdict(reason="worse", gross=False)

# --- liveness ---


def test_device_is_alive_until_its_beat_has_not_been_seen_to_rise_for_so_long() -> None:
    one = coordinator()
    for now in (0.0, 3.0, 6.0, SILENCE):
        one.observe_board([Record(device=device(1), beat=5)], now)
    assert one.live(SILENCE) == (device(0), device(1))
    one.observe_board([Record(device=device(1), beat=5)], SILENCE + 0.1)
    assert one.live(SILENCE + 0.1) == (device(0),)
    one.observe_board([Record(device=device(1), beat=6)], 12.0)
    assert one.live(12.0) == (device(0), device(1))


def test_silence_that_nobody_has_listened_to_is_no_death() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1), beat=5)], 0.0)
    one.observe_board([Record(device=device(1), beat=5)], SILENCE - 1)
    one.hear([Record(device=device(2), beat=1)], SILENCE + 1)
    assert set(one.live(SILENCE + 1)) == {device(0), device(1), device(2)}


def test_record_that_came_with_a_push_keeps_its_device_alive() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1), beat=5)], 0.0)
    one.hear([Record(device=device(1), beat=6)], 4.0)
    for now in (3.0, 6.0, SILENCE + 3.9):
        one.observe_board([Record(device=device(1), beat=5)], now)
    assert one.live(SILENCE + 3.9) == (device(0), device(1))


def test_stale_echo_of_a_record_does_not_revive_its_device() -> None:
    one = coordinator()
    for beat, now in ((5, 0.0), (6, 2.0), (5, 4.0), (6, 6.0), (5, 8.0), (6, 10.0), (5, 12.0)):
        one.observe_board([Record(device=device(1), beat=beat)], now)
    assert one.live(12.0) == (device(0),)


def test_device_that_is_no_longer_shown_is_forgotten_and_may_start_at_any_beat() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1), beat=500)], 0.0)
    later = FORGET_SILENCES * SILENCE + 1
    for step in range(1, int(later)):
        one.observe_board([], float(step))
    one.observe_board([Record(device=device(1), beat=1)], later)
    assert device(1) in one.live(later)


def test_device_that_left_is_gone_at_once() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1), beat=1)], 0.0)
    one.observe_board([Record(device=device(1), beat=2, state="left")], 1.0)
    assert one.live(1.0) == (device(0),)


def test_device_whose_host_says_that_it_is_gone_is_dead_until_its_beat_rises() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1), beat=5), Record(device=device(2), beat=5)], 0.0)
    one.observe_board([Record(device=device(2), beat=6)], 2.9)
    assert one.silent(2.5, 3.0) == (device(1),)
    one.found_dead(device(1))
    assert one.live(3.0) == (device(0), device(2))
    assert one.silent(2.5, 3.0) == ()
    # Its last record is still on the board, and the board is read after a pause.
    one.observe_board([Record(device=device(1), beat=5), Record(device=device(2), beat=6)], 30.0)
    assert device(1) not in one.live(30.0)
    one.observe_board([Record(device=device(1), beat=6)], 31.0)
    assert device(1) in one.live(31.0)


def test_leases_of_a_device_that_was_found_dead_are_free_at_once() -> None:
    one = coordinator()
    everything = tuple(SPEC.shards)
    one.observe_board([Record(device=device(1), beat=1, state="training", leases=everything)], 0.0)
    one.observe_board([Record(device=device(1), beat=2, state="training", leases=everything)], SILENCE / 2)
    before = one.decide(SILENCE / 2)
    assert before is None or before.shards != ()
    one.abandoned(SILENCE / 2)
    one.found_dead(device(1))
    claim = one.decide(SILENCE / 2)
    assert claim is not None
    assert one.confirm(SILENCE / 2) == claim.shards


def test_own_suspension_is_no_evidence_of_the_death_of_others() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1), beat=1)], 0.0)
    one.observe_board([Record(device=device(1), beat=1)], 100.0)
    assert device(1) in one.live(100.0)
    one.observe_board([Record(device=device(1), beat=1)], 103.0)
    one.observe_board([Record(device=device(1), beat=1)], 106.0)
    one.observe_board([Record(device=device(1), beat=1)], 109.0)
    assert device(1) not in one.live(109.0)


def test_dead_device_dies_on_a_board_that_is_always_slow_too() -> None:
    one = coordinator()
    gap = 0.7 * SILENCE
    for reading in range(6):
        one.observe_board([Record(device=device(1), beat=1)], reading * gap)
    assert one.live(5 * gap) == (device(0),)


def test_restarted_device_goes_on_above_its_own_record_on_the_board() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(0), beat=41, lease_sequence=7, leases=("t0",))], 0.0)
    fields = one.record_fields()
    assert fields.beat == 42
    assert fields.leases == ()
    claim = one.decide(0.0)
    assert claim is not None
    assert claim.sequence == 8
    assert one.foreign_beats == 1
    one.observe_board([record_of(one)], 1.0)
    assert one.foreign_beats == 1


# --- claims ---


def test_nothing_is_claimed_before_the_board_was_read() -> None:
    one = coordinator()
    assert one.decide(0.0) is None
    one.observe_board([], 0.0)
    assert one.decide(0.0) is not None


@pytest.mark.parametrize("reason", ["leaving", "paused", "busy"])
def test_nothing_is_claimed_when(reason: str) -> None:
    one = coordinator()
    one.observe_board([], 0.0)
    if reason == "leaving":
        one.leave()
    elif reason == "paused":
        one.advert = replace(one.advert, works=False)
    else:
        assert one.decide(0.0) is not None
    assert one.decide(0.0) is None


@given(st.integers(0, 1000), st.integers(2, 5))
def test_of_devices_that_claim_the_same_at_once_exactly_one_keeps_each_shard(seed: int, count: int) -> None:
    ones = [coordinator(index, seed=seed + index) for index in range(count)]
    for one in ones:
        # Nobody sees another: each takes itself for alone.
        one.observe_board([], 0.0)
        assert one.decide(0.0) is not None
    claimed = {shard for one in ones for shard in one.leases}
    records = [record_of(one) for one in ones]
    for one in ones:
        one.observe_board(records, 1.0)
    kept = [shard for one in ones for shard in one.confirm(1.0)]
    assert sorted(kept) == sorted(claimed)


def test_claim_yields_to_a_device_that_started_unseen() -> None:
    one = coordinator()
    one.observe_board([], 0.0)
    claim = one.decide(0.0)
    assert claim is not None
    rival = Record(device=device(1), state="training", leases=claim.shards, lease_sequence=1)
    one.observe_board([rival], 1.0)
    assert one.confirm(1.0) == ()
    assert one.leases == ()
    assert one.state == "idle"


def test_holders_that_a_claim_knew_of_do_not_contest_it() -> None:
    one = coordinator()
    others = [
        # They are far slower than this one, so that they keep nobody out.
        Record(device=device(1 + index), state="training", leases=(shard,), lease_sequence=1, speed=0.01)
        for index, shard in enumerate(SPEC.shards[:2])
    ] + [Record(device=device(7), state="idle"), Record(device=device(8), state="idle")]
    one.observe_board(others, 0.0)
    claim = one.decide(0.0)
    assert claim is not None
    one.observe_board([replace(record, beat=2) for record in others], 1.0)
    assert one.confirm(1.0) == claim.shards
    assert one.state == "training"


def test_device_does_not_wait_for_ever_for_an_idle_one_that_takes_nothing() -> None:
    one = coordinator(advert=Advert(speed=1.0, class_counts=(10,) * 4, tasks=frozenset({T0})))
    # A last lease is left, and the other one prefers it, but never claims it.
    one.receive(
        [mine(contribution(9, {9: SPEC.budget(STEM)}, shard=STEM)), mine(contribution(9, {9: 950}))], 0.0
    )
    idle = Record(device=device(1), prefer=("t0",))
    now = 0.0
    while now < SILENCE:
        one.observe_board([replace(idle, beat=int(now * 10) + 1)], now)
        if one.decide(now) is not None:
            break
        now += 1.0
    assert SILENCE / 2 <= now <= SILENCE


def test_device_with_unfit_data_takes_a_task_only_when_all_hope_is_gone() -> None:
    tasks = frozenset({T0})
    one = coordinator(advert=Advert(speed=1.0, class_counts=(0, 10, 10, 10), tasks=tasks))
    one.receive([mine(contribution(9, {9: SPEC.budget(STEM)}, shard=STEM))], 0.0)
    now = 0.0
    while now < 10 * SILENCE:
        one.observe_board([Record(device=device(1), beat=int(now * 10) + 1)], now)
        if one.decide(now) is not None:
            break
        now += 1.0
    assert HOPELESS * SILENCE / 2 <= now <= HOPELESS * SILENCE + 1


def test_unfit_device_first_looks_who_else_is_there() -> None:
    one = coordinator(advert=Advert(speed=1.0, class_counts=(0, 10, 10, 10), tasks=frozenset({T0})))
    one.receive([mine(contribution(9, {9: SPEC.budget(STEM)}, shard=STEM))], 0.0)
    one.observe_board([], 0.0)
    assert one.decide(0.0) is None
    one.observe_board([], SILENCE / 2)
    assert one.decide(SILENCE / 2) is not None


def test_lease_that_takes_far_too_long_is_trained_by_others() -> None:
    one = holding((STEM,))
    start(one, set(), 0.0)
    one.finished(10.0)
    one.advert = replace(one.advert, tasks=frozenset())
    entry = successor((), 2, SPEC.budget(STEM) - 50, shard=STEM)
    beside = successor((), 2, SPEC.budget(STEM) - 50)
    one.receive([mine(entry), mine(beside)], 10.0)
    stuck = Record(device=device(1), state="training", leases=("stem",), lease_sequence=1)
    claimed_at = None
    for now in range(11, 200):
        one.observe_board([replace(stuck, beat=now)], float(now))
        if one.decide(float(now)) is not None:
            claimed_at = now
            break
    assert claimed_at is not None
    assert OVERDUE_FACTOR * 10.0 <= claimed_at - 11 <= OVERDUE_FACTOR * 10.0 + 2


def test_lease_on_the_stem_is_given_longer_by_who_has_trained_branches_only() -> None:
    one = coordinator(advert=Advert(speed=1.0, class_counts=(10,) * 4, tasks=frozenset({T0})))
    holder = Record(device=device(1), state="training", leases=("stem",), lease_sequence=1)
    one.observe_board([holder], 0.0)
    claim = one.decide(0.0)
    assert claim is not None and claim.shards == (T0,)
    one.confirm(0.0)
    start(one, set(), 0.0)
    one.finished(10.0)
    one.advert = replace(one.advert, tasks=frozenset())
    claimed_at = None
    for now in range(11, 600):
        one.observe_board([replace(holder, beat=1 + now)], float(now))
        if one.decide(float(now)) is not None:
            claimed_at = now
            break
    assert claimed_at is not None
    assert 0 <= claimed_at - STEM_LEASE_MAX * OVERDUE_FACTOR * 10.0 <= 2


def test_device_waits_for_a_part_of_a_lease_until_another_branch_is_free() -> None:
    one = coordinator(advert=Advert(speed=1.0, class_counts=(10,) * 4, tasks=frozenset({T0, T1})))
    holder = Record(device=device(1), state="training", leases=(T1,), lease_sequence=1)
    sealed = mine(contribution(9, {9: SPEC.budget(STEM)}, shard=STEM))
    one.receive([sealed, mine(contribution(1, {1: 200}, shard=T1))], 0.0)
    one.observe_board([holder], 0.0)
    claim = one.decide(0.0)
    assert claim is not None and claim.shards == (T0,)
    one.confirm(0.0)
    start(one, digests(one), 0.0)
    one.receive([mine(contribution(0, {0: 200}, shard=T0))], 40.0)
    one.finished(40.0)
    claimed_at = None
    for tenths in range(400, 700):
        now = tenths / 10
        one.observe_board([replace(holder, beat=1 + tenths)], now)
        claim = one.decide(now)
        if claim is not None:
            claimed_at = now
            break
    assert claim is not None and claimed_at is not None
    assert T1 in claim.shards, "it joins the holder"
    assert claimed_at - 40.0 == pytest.approx(WAIT_LEASES * 40.0, abs=0.2)


def test_device_that_has_had_no_lease_does_not_wait_for_ever_for_one_that_is_stuck() -> None:
    one = coordinator(advert=Advert(speed=1.0, class_counts=(10, 10, 10, 10), tasks=frozenset()))
    seen = SPEC.budget(STEM) - 50
    one.receive([mine(successor((), 2, seen, shard=STEM)), mine(successor((), 2, seen))], 0.0)
    stuck = Record(device=device(1), state="training", leases=("stem",), lease_sequence=1)
    for now in range(int(OVERDUE_UNKNOWN_S) + 1):
        one.observe_board([replace(stuck, beat=now + 1)], float(now))
        assert one.decide(float(now)) is None
    one.observe_board([replace(stuck, beat=9999)], OVERDUE_UNKNOWN_S + 1)
    assert one.decide(OVERDUE_UNKNOWN_S + 1) is not None


def test_patience_with_idle_devices_does_not_run_while_nothing_is_free() -> None:
    """Or who had waited for its turn long enough would take what idle devices with better data are given."""
    one = coordinator(advert=Advert(speed=1.0, class_counts=(0, 10, 10, 10)))
    owner = Record(device=device(9), class_counts=(10, 10, 10, 10))
    busy = [
        Record(
            device=device(1 + index), state="training", leases=(shard,), lease_sequence=1,
            class_counts=(0, 10, 10, 10),
        )
        for index, shard in enumerate(SPEC.shards)
    ]  # fmt: skip
    for now in range(200):
        one.observe_board([replace(each, beat=now + 1) for each in (owner, *busy)], float(now))
        assert one.decide(float(now)) is None
    # t0 becomes free: it is the owner's.
    freed = [replace(each, state="idle", leases=()) if each.leases == (T0,) else each for each in busy]
    one.observe_board([replace(each, beat=201) for each in (owner, *freed)], 200.0)
    assert one.decide(200.0) is None


def test_patience_runs_while_a_shard_is_held_by_one_that_is_stuck() -> None:
    """The idle device that should take over may not find it stuck, after a long lease of its own."""
    one = coordinator(advert=Advert(speed=1.0, class_counts=(0, 10, 10, 10)))
    done = [mine(successor((), 2, SPEC.budget(shard), shard=shard)) for shard in SPEC.shards if shard != T0]
    one.receive(done, 0.0)
    owner = Record(device=device(9), class_counts=(10, 10, 10, 10))
    stuck = Record(
        device=device(1), state="training", leases=(T0,), lease_sequence=1, class_counts=(0, 10, 10, 10)
    )
    enough = int(OVERDUE_UNKNOWN_S + (HOPELESS + 1) * SETTINGS.silence_s)
    for now in range(enough):
        one.observe_board([replace(each, beat=now + 1) for each in (owner, stuck)], float(now))
        if one.decide(float(now)) is not None:
            break
    else:
        pytest.fail("it waits for ever")
    assert now > OVERDUE_UNKNOWN_S


def test_what_was_pushed_during_a_standstill_keeps_nobody_alive_for_longer_than_a_silence() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1))], 0.0)
    # It wakes, and a push has waited for it; its maker has died meanwhile.
    one.hear([Record(device=device(1), beat=2)], 100.0)
    one.observe_board([Record(device=device(1), beat=2)], 100.0)
    one.observe_board([], 100.0 + SILENCE / 4)
    assert device(1) in one.live(100.0 + SILENCE / 4)
    for quarter in range(2, 6):
        one.observe_board([], 100.0 + quarter * SILENCE / 4)
    assert device(1) not in one.live(100.0 + 5 * SILENCE / 4)


def test_who_is_there_is_known_after_as_long_as_a_live_device_may_be_silent() -> None:
    one = coordinator()
    assert not one.has_listened(1000.0)
    one.observe_board([], 1000.0)
    assert not one.has_listened(1000.0 + SILENCE - 0.1)
    assert one.has_listened(1000.0 + SILENCE)


def test_claim_names_the_devices_that_promise_newer_contributions() -> None:
    one = coordinator()
    ahead = Record(device=device(1), state="observer", progress=(("stem", 3, 300),))
    level = Record(device=device(2), state="observer")
    one.observe_board([ahead, level], 0.0)
    claim = one.decide(0.0)
    assert claim is not None
    assert claim.ask == (device(1),)


# --- what a lease starts from ---


def test_lease_waits_for_the_tensors_that_it_starts_from() -> None:
    entry = contribution(1)
    one = holding((T0,), [entry])
    assert one.job(set(), 0.0) is None
    assert one.leases == (T0,)
    stem = one.ledger.frontier(STEM)
    wanted = one.wanted(set(), 0.0)
    assert [want.digest for want in wanted] == [stem[0].tensors_digest, entry.tensors_digest]
    assert all(want.needed and want.holders == (device(1),) for want in wanted)
    plan = start(one, {want.digest for want in wanted}, 0.0)
    job = plan.shards[0]
    assert [parent.tensors_digest for parent in job.parents] == [entry.tensors_digest]
    assert job.samples == 10
    assert job.progress == 0.01
    assert job.generation == 2
    assert job.seen(device(0), 100) == ((device(0), 100), (device(1), 10))
    assert plan.stem == stem
    assert plan.stem_digest == states_digest(stem)
    assert plan.samples == 100


def test_stem_needs_no_stem() -> None:
    one = holding((STEM,))
    plan = start(one, set(), 0.0)
    assert plan.stem == ()
    assert plan.stem_digest == ""


def test_accusing_a_device_alone_leaves_its_branches_out_and_its_stem_in() -> None:
    """Or this device's branches would fit a stem that nobody else uses."""
    made = [mine(contribution(9)), mine(contribution(9, shard=T1, stem_digest="another"))]
    one = holding((T0,), made)
    stem = one.ledger.frontier(STEM)
    assert [entry.device for entry in stem] == [device(9)]
    for entry in made:
        one.judged(entry, Verdict(reason="far worse", gross=True))
    assert one.distrusts(device(9))
    plan = start(one, digests(one), 0.0)
    assert plan.shards[0].parents == ()
    assert plan.stem == stem


def test_a_stem_that_was_refused_is_not_built_on() -> None:
    one = holding((T0,))
    one.judged(one.ledger.frontier(STEM)[0], REFUSED)
    assert start(one, digests(one), 0.0).stem == ()


def test_lease_starts_from_what_came_before_when_nobody_has_the_newest() -> None:
    first = contribution(1)
    second = successor((first,), 2)
    one = holding((T0,), [first, second])
    held = digests(one) - {second.tensors_digest}
    assert one.job(held, 0.0) is None
    one.refused(second.tensors_digest, device(1), 0.0)
    plan = start(one, held, 0.1)
    assert [parent.tensors_digest for parent in plan.shards[0].parents] == [first.tensors_digest]
    # The lost work may come back: it is not declared contained.
    assert plan.shards[0].seen(device(0), 5) == ((device(0), 5), (device(1), 10))


def test_lease_starts_from_a_devices_previous_contribution_when_its_newest_is_lost() -> None:
    first = contribution(1)
    second = successor((first,), 1)
    one = holding((T0,), [first])
    one.receive([mine(second)], 0.0)
    one.refused(second.tensors_digest, device(1), 0.0)
    held = digests(one) - {second.tensors_digest} | {first.tensors_digest}
    plan = start(one, held, 0.1)
    assert [parent.tensors_digest for parent in plan.shards[0].parents] == [first.tensors_digest]


def test_lease_waits_no_longer_than_its_patience_for_a_maker_that_is_dead() -> None:
    lost = contribution(3)
    one = holding((T0,), [lost])
    held = digests(one) - {lost.tensors_digest}
    patience_s = SETTINGS.replication.patience_s
    for now in (0.0, patience_s / 2, patience_s):
        one.observe_board([Record(device=device(1), state="observer", beat=100 + int(now))], now)
        assert one.job(held, now) is None
    assert start(one, held, patience_s + 0.1).shards[0].parents == ()


def test_tensors_that_stay_lost_are_declared_contained() -> None:
    lost = contribution(3)
    one = holding((T0,), [lost])
    held = digests(one) - {lost.tensors_digest}
    assert one.job(held, 0.0) is None
    plan = start(one, held, SETTINGS.replication.write_off_s + 1)
    job = plan.shards[0]
    assert job.parents == ()
    assert dict(job.seen(device(0), 5)) == {device(0): 5, device(3): 10}
    entry = mine(contribution(0, {0: 5, 3: 10}, generation=job.generation))
    one.receive([entry], 70.0)
    assert one.ledger.frontier(T0) == (entry,)


def test_count_is_never_used_twice_even_if_own_tensors_are_lost() -> None:
    own = contribution(0)
    one = holding((T0,), [own])
    one.refused(own.tensors_digest, device(1), 0.0)
    job = start(one, digests(one) - {own.tensors_digest}, 0.0).shards[0]
    assert job.parents == ()
    assert job.seen(device(0), 5) == ((device(0), 15),)
    assert job.generation == 2


def test_shards_that_others_completed_meanwhile_are_released() -> None:
    one = holding((T0,))
    one.receive([mine(contribution(1, {1: SPEC.budget(T0)}))], 0.0)
    assert one.job(digests(one), 0.0) is None
    assert one.leases == ()


def test_lease_in_progress_is_needed_until_all_its_shards_are_complete() -> None:
    one = holding((T0, T1))
    start(one, digests(one), 0.0)
    one.receive([mine(contribution(1, {1: SPEC.budget(T0)}))], 1.0)
    assert one.still_needed()
    one.receive([mine(contribution(1, {1: SPEC.budget(T1)}, shard=T1))], 1.0)
    assert not one.still_needed()
    one.abandoned(1.0)
    assert one.leases == ()


def test_lease_on_the_stem_is_given_up_once_it_is_so_late_that_it_has_no_vote() -> None:
    """As when a slow device began the run, and a fast one has come: all would refuse what it makes."""
    one = holding((STEM,))
    start(one, digests(one), 0.0)
    for generation in range(1, 2 + VOTE_STALENESS_MAX):
        ahead = contribution(1, {1: generation}, shard=STEM, generation=generation)
        one.receive([mine(ahead)], 1.0)
        assert one.still_needed()
    ahead = contribution(1, {1: 9}, shard=STEM, generation=2 + VOTE_STALENESS_MAX)
    one.receive([mine(ahead)], 1.0)
    assert not one.still_needed()
    # What it does not build on overtakes nobody.
    one.judged(mine(ahead), REFUSED)
    assert one.still_needed()


def test_lease_on_a_branch_is_worth_having_however_late_it_is() -> None:
    one = holding((T0,))
    start(one, digests(one), 0.0)
    one.receive([mine(contribution(1, {1: 9}, generation=9))], 1.0)
    assert one.still_needed()


@pytest.mark.parametrize(
    ("stem_samples", "seen", "samples"),
    [(500, 0, 100), (500, 950, 50), (500, 955, 50), (500, 999, 10), (400, 300, 100)],
    ids=["whole lease", "rest", "rest rounded up", "at least a batch", "to the gate"],
)
def test_lease_is_as_long_as_the_shard_needs(stem_samples: int, seen: int, samples: int) -> None:
    one = coordinator(advert=Advert(speed=1.0, class_counts=(10,) * 4, tasks=frozenset({T0})))
    if stem_samples:
        one.receive([mine(contribution(9, {9: stem_samples}, shard=STEM))], 0.0)
    if seen:
        one.receive([mine(contribution(1, {1: seen}))], 0.0)
    stem_holder = Record(device=device(1), state="training", leases=("stem",), tasks=())
    one.observe_board([stem_holder], 0.0)
    claim = one.decide(0.0)
    assert claim is not None
    assert claim.shards == (T0,)
    one.confirm(0.0)
    assert start(one, digests(one), 0.0).samples == samples


def test_first_lease_does_not_step_over_the_gate() -> None:
    spec = small_spec(4, seal=0.095)
    one = coordinator(spec=spec, advert=Advert(speed=1.0, class_counts=(10,) * 4, tasks=frozenset({T0})))
    one.observe_board([Record(device=device(1), state="training", leases=("stem",), tasks=())], 0.0)
    claim = one.decide(0.0)
    assert claim is not None and claim.shards == (T0,)
    one.confirm(0.0)
    assert spec.budget(STEM) == 95
    assert start(one, digests(one), 0.0).samples == 90
