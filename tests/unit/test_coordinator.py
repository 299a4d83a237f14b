"""One device's decisions: liveness, claims, what a lease starts from, what is fetched and kept."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_examples import T0, contribution, device, small_spec, successor

from p2pcollab.coordinator import (
    HOPELESS,
    Advert,
    BoardRecord,
    Coordinator,
    CoordinatorSettings,
    JobPlan,
)
from p2pcollab.holdings import REFERENCE_WAIT_S, STEMS_KEPT, ReplicationSettings
from p2pcollab.ledger import Contribution, states_digest
from p2pcollab.presence import FORGET_SILENCES, OVERDUE_FACTOR, OVERDUE_UNKNOWN_S
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.trust import Verdict

SPEC = small_spec(4)
SETTINGS = CoordinatorSettings()
SILENCE = SETTINGS.silence_s
T1 = ShardId("t1")


@dataclass(frozen=True, kw_only=True)
class Record:
    device: str
    beat: int = 1
    state: str = "idle"
    speed: float = 1.0
    tasks: tuple[str, ...] | None = None
    prefer: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = (10, 10, 10, 10)
    leases: tuple[str, ...] = ()
    lease_sequence: int = 0
    progress: tuple[tuple[str, int, int], ...] = ()


def coordinator(
    index: int = 0,
    *,
    spec: RunSpec = SPEC,
    settings: CoordinatorSettings = SETTINGS,
    seed: int = 0,
    advert: Advert | None = None,
) -> Coordinator:
    offered = advert or Advert(speed=1.0, class_counts=(10,) * len(spec.classes))
    return Coordinator(spec, device(index), offered, settings, random.Random(seed))


def record_of(one: Coordinator) -> Record:
    """What a coordinator shows of itself now."""
    fields = one.record_fields()
    return Record(
        device=one.device,
        beat=fields.beat,
        state=fields.state,
        leases=fields.leases,
        lease_sequence=fields.lease_sequence,
        progress=fields.progress,
        class_counts=one.advert.class_counts,
    )


def mine(entry: Contribution, spec: RunSpec = SPEC) -> Contribution:
    """The contribution, of this run."""
    return replace(entry, run_id=spec.run_id)


def holding(
    shards: tuple[ShardId, ...], entries: Iterable[Contribution] = (), *, now: float = 0.0
) -> Coordinator:
    """A coordinator that holds leases on these shards, next to a live device 1 that trains nothing."""
    tasks = frozenset(shard for shard in shards if shard != STEM)
    counts = (10, 10, 10, 10)
    one = coordinator(advert=Advert(speed=1.0, class_counts=counts, tasks=tasks))
    sealed = () if STEM in shards else (mine(contribution(9, {9: SPEC.budget(STEM)}, shard=STEM)),)
    one.receive([*sealed, *map(mine, entries)], now)
    one.observe_board([Record(device=device(1), state="observer", beat=int(now * 10) + 1)], now)
    claim = one.decide(now)
    assert claim is not None
    assert set(claim.shards) == set(shards)
    one.confirm(now)
    return one


def digests(one: Coordinator) -> set[str]:
    return {entry.tensors_digest for entry in one.ledger.entries.values()}


def start(one: Coordinator, held: set[str], now: float) -> JobPlan:
    plan = one.job(held, now)
    assert plan is not None
    return plan


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


@pytest.mark.parametrize(
    ("stem_samples", "seen", "samples"),
    [(500, 0, 100), (500, 950, 50), (500, 955, 50), (500, 999, 10), (400, 400, 100), (400, 455, 40)],
    ids=["whole lease", "rest", "rest rounded up", "at least a batch", "to the gate", "not over the gate"],
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


# --- the ledger ---


def test_contributions_of_other_runs_and_shards_are_ignored() -> None:
    one = coordinator()
    strangers = [contribution(1), mine(contribution(1, shard=ShardId("t99")))]
    assert one.receive(strangers, 0.0) == ()
    assert len(one.ledger) == 0


def test_only_what_is_new_is_passed_on() -> None:
    one = coordinator()
    first = mine(contribution(1))
    second = mine(successor((first,), 1))
    assert one.receive([first, second, first], 0.0) == (second,)
    assert one.receive([second, first], 0.0) == ()


def test_refused_contribution_leaves_and_does_not_come_back() -> None:
    one = coordinator()
    honest = mine(contribution(1))
    poison = mine(successor((honest,), 1))
    one.receive([honest], 0.0)
    one.receive([poison], 1.0)
    one.judged(poison, Verdict(reason="of the wrong shape", gross=True, malformed=True))
    assert one.believed.frontier(T0) == (honest,)
    assert one.receive([poison], 2.0) == ()
    assert one.believed.frontier(T0) == (honest,)


REFUSED = Verdict(reason="worse", gross=False)


def test_branch_is_tried_on_the_stem_that_it_was_trained_on_where_that_is_here() -> None:
    one = coordinator()
    first = mine(contribution(1, shard=STEM))
    second = mine(successor((first,), 1, shard=STEM))
    one.receive([first], 0.0)
    one.receive([second], 1.0)
    held = digests(one) | {first.tensors_digest}
    branch = mine(contribution(2, stem_digest=states_digest((first,))))
    assert one.trial(branch, held, 1.0).stem == (first,)
    assert first.tensors_digest in one.keep(held)
    assert one.trial(mine(contribution(2)), held, 1.0).stem == ()
    # One that is not here, is not known, or was refused: the newest that is left.
    assert one.trial(branch, {second.tensors_digest}, 1.0).stem == (second,)
    assert one.trial(mine(contribution(2, stem_digest="?")), held, 1.0).stem == (second,)
    one.judged(first, REFUSED)
    assert one.trial(branch, held, 1.0).stem == (second,)


def test_few_stems_are_kept() -> None:
    one = coordinator()
    stems = [mine(contribution(1, shard=STEM))]
    for now in range(20):
        one.receive(stems[-1:], float(now))
        stems.append(mine(successor(stems[-1:], 1, shard=STEM)))
    held = {entry.tensors_digest for entry in stems}
    assert len(one.keep(held)) == STEMS_KEPT


def test_what_a_doubted_device_makes_is_fetched_and_tried() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(index)) for index in range(1, 9)], 0.0)
    doubtful = mine(contribution(1, shard=T1))
    one.receive([doubtful, mine(contribution(2))], 0.0)
    assert one.wanted(set(), 0.0) == ()
    one.judged(mine(contribution(2)), None)
    one.judged(mine(contribution(1, shard=ShardId("t2"))), REFUSED)
    assert [want.digest for want in one.wanted(set(), 0.0)] == [doubtful.tensors_digest]


@pytest.mark.parametrize("examples", [10, 0])
def test_every_device_that_can_judge_fetches_every_stem(examples: int) -> None:
    """Branches that were trained on it will come, and be tried on it."""
    one = coordinator(advert=Advert(speed=1.0, class_counts=(examples,) * 4))
    one.observe_board([Record(device=device(index)) for index in range(1, 9)], 0.0)
    stem = mine(contribution(1, shard=STEM))
    one.receive([stem], 0.0)
    assert [want.digest for want in one.wanted(set(), 0.0)] == [stem.tensors_digest][: bool(examples)]


@pytest.mark.parametrize(
    ("mine_of_four", "theirs", "votes"),
    [(4, 4, True), (3, 4, True), (2, 4, False), (2, 2, True), (0, 4, False)],
)
def test_a_device_without_most_of_anothers_classes_does_not_vote_against_it(
    mine_of_four: int, theirs: int, votes: bool
) -> None:
    counts = {number: (10,) * number + (0,) * (4 - number) for number in range(5)}
    one = coordinator(advert=Advert(speed=1.0, class_counts=counts[mine_of_four]))
    one.observe_board([Record(device=device(1), class_counts=counts[theirs])], 0.0)
    for generation in range(1, 20):
        one.judged(mine(contribution(1, generation=generation)), REFUSED)
    assert one.accused == (), "in a small run, two votes are enough"
    one.receive([mine(contribution(author)) for author in range(1, 10)], 0.0)
    one.judged(mine(contribution(1, generation=20)), REFUSED)
    assert one.accused == ((device(1),) if votes else ())


def test_a_contribution_is_not_compared_with_what_was_built_on_it() -> None:
    earlier = mine(contribution(1))
    middle = mine(successor((earlier,), 2))
    latest = mine(successor((middle,), 3))
    one = coordinator()
    one.receive([earlier, middle, latest], 0.0)
    assert one.trial(middle, digests(one), 0.0).reference == (earlier,)
    assert one.trial(latest, digests(one), 0.0).reference == (middle,)


def test_what_a_lease_is_to_be_judged_by_is_fetched_before_what_it_starts_from() -> None:
    earlier = mine(contribution(1))
    latest = mine(successor((earlier,), 2))
    one = holding((T0,), [earlier, latest])
    stem = {contribution(9, {9: SPEC.budget(STEM)}, shard=STEM).tensors_digest}
    assert [want.digest for want in one.wanted(stem, 0.0) if want.needed] == [earlier.tensors_digest]
    held = stem | {earlier.tensors_digest}
    assert [want.digest for want in one.wanted(held, 0.0) if want.needed] == [latest.tensors_digest]
    # Nobody waits for it for long.
    late = REFERENCE_WAIT_S
    assert [want.digest for want in one.wanted(stem, late) if want.needed] == [latest.tensors_digest]


def test_what_was_only_missing_to_judge_by_is_not_written_off_for_that() -> None:
    earlier = mine(contribution(1))
    latest = mine(successor((earlier,), 2))
    one = holding((T0,), [earlier, latest])
    one.wanted({latest.tensors_digest}, 0.0)
    one.wanted(set(), 0.0)
    one.judged(latest, Verdict(reason="of the wrong shape", gross=True, malformed=True))
    late = SETTINGS.replication.write_off_s + 1.0
    one.hear([Record(device=device(1), state="observer", beat=999)], late)
    stem = contribution(9, {9: SPEC.budget(STEM)}, shard=STEM).tensors_digest
    # It is the start of the lease now, and was not missing for that until now.
    assert one.job({stem}, late) is None
    assert earlier.tensors_digest in [want.digest for want in one.wanted({stem}, late)]


def test_nobody_waits_for_a_reference_that_nobody_has() -> None:
    earlier = mine(contribution(1))
    latest = mine(successor((earlier,), 2))
    one = holding((T0,), [earlier, latest])
    one.refused(earlier.tensors_digest, device(1), 0.0)
    assert latest.tensors_digest in [want.digest for want in one.wanted(set(), 0.0) if want.needed]


def test_states_of_a_device() -> None:
    one = holding((T0,))
    assert one.state == "training"
    start(one, digests(one), 0.0)
    one.finished(1.0)
    assert one.state == "idle"
    one.receive([mine(contribution(9, {9: 1000}, shard=shard, generation=9)) for shard in SPEC.shards], 1.0)
    assert one.complete
    assert one.state == "complete"
    one.leave()
    assert one.state == "leaving"
    one.left()
    assert one.state == "left"
    assert coordinator(advert=Advert(speed=1.0, class_counts=(0,) * 4)).state == "observer"


# --- gossip and replicas ---


def test_partners_are_live_and_include_one_that_promises_news() -> None:
    one = coordinator()
    records: list[BoardRecord] = [Record(device=device(index)) for index in range(1, 9)]
    records.append(Record(device=device(9), progress=(("t0", 1, 100),)))
    one.observe_board(records, 0.0)
    for _ in range(20):
        partners = one.partners(0.0)
        assert len(set(partners)) == SETTINGS.gossip_fanout
        assert device(9) in partners
        assert device(0) not in partners
    for now in (3.0, 6.0, SILENCE + 1):
        one.observe_board(records, now)
    assert one.partners(SILENCE + 1) == ()


def test_lone_device_has_no_partners() -> None:
    one = coordinator()
    one.observe_board([record_of(one)], 0.0)
    assert one.partners(0.0) == one.hints(0.0) == ()


def crowd(count: int, settings: CoordinatorSettings = SETTINGS) -> list[Coordinator]:
    """Coordinators that all see one another."""
    ones = [coordinator(index, settings=settings) for index in range(count)]
    records = [record_of(one) for one in ones]
    for one in ones:
        one.observe_board(records, 0.0)
    return ones


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_contribution_lives_on_three_devices_its_maker_included(count: int) -> None:
    # Every device takes every stem.
    shards = [shard for shard in SPEC.shards if shard != STEM]
    entries = [mine(contribution(author, shard=shard)) for author in range(count) for shard in shards]
    copies = dict.fromkeys((entry.tensors_digest for entry in entries), 1)
    for one in crowd(count):
        one.receive(entries, 0.0)
        held = {entry.tensors_digest for entry in entries if entry.device == one.device}
        for want in one.wanted(held, 5.0):
            assert not want.needed
            assert one.device not in want.holders
            copies[want.digest] += 1
    assert set(copies.values()) == {min(count, SETTINGS.replication.replicas)}


def test_contributions_of_the_dead_are_replicated_by_the_living() -> None:
    entry = mine(contribution(99))
    ones = crowd(8)
    for one in ones:
        one.receive([entry], 0.0)
    wanting = [one for one in ones if one.wanted(set(), 5.0)]
    assert len(wanting) == SETTINGS.replication.replicas


def test_replicate_all_wants_everything() -> None:
    keen = CoordinatorSettings(replication=ReplicationSettings(replicate_all=True))
    entries = [mine(contribution(author)) for author in range(6)]
    for one in crowd(6, keen):
        one.receive(entries, 0.0)
        assert len(one.wanted(set(), 5.0)) == 6


def test_contribution_that_is_superseded_at_once_is_not_replicated() -> None:
    for one in crowd(3):
        one.receive([mine(contribution(1))], 0.0)
        assert one.wanted(set(), SETTINGS.replication.replicate_after_s / 2) == ()


def test_device_that_refused_is_not_asked_again_at_once() -> None:
    entry = contribution(1)
    one = holding((T0,), [entry])
    one.observe_board([Record(device=device(1), beat=99), Record(device=device(2))], 0.0)
    held = digests(one) - {entry.tensors_digest}
    assert one.wanted(held, 0.0)[0].holders[0] == device(1)
    one.refused(entry.tensors_digest, device(1), 0.0)
    assert one.wanted(held, 0.1)[0].holders == (device(2),)


def test_frontier_and_what_came_before_it_are_kept() -> None:
    one = coordinator()
    made: list[Contribution] = []
    for author in (1, 2, 3, 3, 1):
        entry = mine(successor(tuple(made[-1:]), author))
        one.receive([entry], 0.0)
        made.append(entry)
    assert one.keep(frozenset()) == {entry.tensors_digest for entry in made[-2:]}


def test_newest_that_is_held_is_kept_until_what_came_after_it_is_here() -> None:
    """The makers of later work may die before anybody has fetched it."""
    one = coordinator()
    own = mine(successor((), 0))
    made = [own]
    for author in (1, 1):
        made.append(mine(successor((made[-1],), author)))
    for entry in made:
        one.receive([entry], 0.0)
    assert own.tensors_digest in one.keep({own.tensors_digest})
    assert own.tensors_digest not in one.keep({entry.tensors_digest for entry in made})


def test_newest_that_is_held_is_kept_however_much_was_heard_of_since() -> None:
    one = coordinator()
    own = mine(successor((), 0))
    one.receive([own], 0.0)
    later = own
    for now in range(1, 5):
        later = mine(successor((later,), 1))
        one.receive([later], float(now))
        assert own.tensors_digest in one.keep({own.tensors_digest})
    assert own.tensors_digest not in one.keep({own.tensors_digest, later.tensors_digest})


def test_what_was_fetched_is_kept_however_much_is_heard_of_before_garbage_is_collected() -> None:
    one = coordinator()
    fetched = mine(successor((), 1))
    one.receive([fetched], 0.0)
    one.judged(fetched, None)
    later = fetched
    for now in range(1, 4):
        later = mine(successor((later,), 1))
        one.receive([later], float(now))
    assert fetched.tensors_digest in one.keep({fetched.tensors_digest})


def test_parents_of_the_lease_in_progress_are_kept() -> None:
    entry = contribution(1)
    one = holding((T0,), [entry])
    start(one, digests(one), 0.0)
    later = entry
    for author in (2, 3, 1, 2):
        later = successor((later,), author)
        one.receive([mine(later)], 1.0)
    assert entry.tensors_digest in one.keep(frozenset())


def test_harvest_wants_what_came_before_lost_tensors() -> None:
    """A late joiner holds nothing of the past, and the newest died with its maker."""
    one = coordinator()
    one.observe_board([Record(device=device(1)), Record(device=device(2))], 0.0)
    older = mine(successor((), 1))
    newer = mine(successor((older,), 2))
    one.receive([older, newer], 0.0)
    assert [want.digest for want in one.harvest(frozenset(), 0.0)] == [newer.tensors_digest]
    for author in (1, 2):
        one.refused(newer.tensors_digest, device(author), 0.0)
    wanted = {want.digest: want.holders for want in one.harvest(frozenset(), 0.1)}
    assert wanted == {newer.tensors_digest: (), older.tensors_digest: (device(1), device(2))}


def test_harvest_wants_every_frontier() -> None:
    one = coordinator()
    entries = [mine(contribution(author, shard=shard)) for author in (1, 2) for shard in (STEM, T0)]
    one.receive(entries, 0.0)
    wanted = one.harvest({entries[0].tensors_digest}, 0.0)
    assert {want.digest for want in wanted} == {entry.tensors_digest for entry in entries[1:]}


def test_assembly_falls_back_on_what_came_before_when_the_newest_died_with_its_maker() -> None:
    older = mine(contribution(1))
    newer = mine(successor((older,), 2))
    one = coordinator()
    one.receive([older, newer], 0.0)
    one.observe_board([Record(device=device(1))], 0.0)
    assert one.obtainable(T0, {older.tensors_digest, newer.tensors_digest}, 0.0) == (newer,)
    one.refused(newer.tensors_digest, device(1), 0.0)
    assert one.obtainable(T0, {older.tensors_digest}, 0.1) == (older,)
