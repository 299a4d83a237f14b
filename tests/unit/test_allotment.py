"""The allotment is deterministic, covers every shard, keeps what is held, and rotates."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ledger_examples import device, small_spec

from p2pcollab.allotment import (
    HELD_SHARE,
    STEM_SPEED,
    STRAGGLER_SPEED,
    DeviceView,
    ShardView,
    allot,
    contested,
    eligible,
    needs,
    slots,
)
from p2pcollab.run import STEM, DeviceId, RunSpec, ShardId

SPEC = small_spec(10, budget=10_000, lease=500, batch=100, seal=0.7)
TASKS = SPEC.shards[1:]
EVERY = (100,) * 10


def view(index: int, **changes: object) -> DeviceView:
    return replace(DeviceView(device=device(index), speed=1.0, class_counts=EVERY), **changes)  # type: ignore[arg-type]


def situation(seed: int) -> tuple[list[DeviceView], list[ShardView]]:
    """A random moment of a run: some devices busy, some with wishes or odd data, shards at random places."""
    rng = random.Random(seed)
    devices = [
        view(
            index,
            speed=rng.choice([0.05, 0.5, 1.0, 1.0, 4.0]),
            tasks=frozenset(rng.sample(TASKS, 3)) if rng.random() < 0.2 else None,
            prefer=frozenset(rng.sample(TASKS, 2)) if rng.random() < 0.2 else frozenset(),
            class_counts=tuple(rng.choice([0, 50]) for _ in range(10)) if rng.random() < 0.3 else EVERY,
            works=rng.random() < 0.9,
        )
        for index in range(rng.randrange(1, 12))
    ]
    busy = [
        replace(each, leases=(STEM,) if rng.random() < 0.2 else tuple(rng.sample(TASKS, rng.randrange(1, 4))))
        if rng.random() < 0.4
        else each
        for each in devices
    ]
    shards = []
    for shard in SPEC.shards:
        visits = {each.device: rng.randrange(0, 1200) for each in devices if rng.random() < 0.8}
        shards.append(ShardView(shard=shard, samples=sum(visits.values()), visits=visits))
    return busy, shards


situations = st.integers(0, 10**6).map(situation)
Situation = tuple[list[DeviceView], list[ShardView]]


@given(situations, st.integers(0, 100))
def test_allotment_does_not_depend_on_the_order_of_what_is_seen(moment: Situation, seed: int) -> None:
    devices, shards = moment
    expected = allot(SPEC, devices, shards)
    rng = random.Random(seed)
    assert allot(SPEC, rng.sample(devices, len(devices)), rng.sample(shards, len(shards))) == expected


@given(situations)
def test_busy_devices_keep_their_leases_and_nobody_gets_a_shard_twice(moment: Situation) -> None:
    devices, shards = moment
    allotment = allot(SPEC, devices, shards)
    for each in devices:
        leases = allotment.get(each.device, ())
        if each.leases:
            assert leases == each.leases
        if not each.works and not each.leases:
            assert leases == ()
        assert len(set(leases)) == len(leases)
        assert STEM not in leases or leases == (STEM,)


@given(situations)
def test_given_shards_are_open_wished_for_and_fit_the_data(moment: Situation) -> None:
    devices, shards = moment
    need = needs(SPEC, {each.shard: each.samples for each in shards})
    workers = [each for each in devices if each.works]
    allotment = allot(SPEC, devices, shards)
    for each in devices:
        for shard in allotment.get(each.device, ()):
            if not each.leases:
                assert need[shard] > 0
                assert each.device in eligible(SPEC, shard, workers)
                assert shard == STEM or each.tasks is None or shard in each.tasks


@given(situations)
def test_nobody_is_idle_next_to_a_free_shard_that_is_for_it(moment: Situation) -> None:
    devices, shards = moment
    need = needs(SPEC, {each.shard: each.samples for each in shards})
    workers = [each for each in devices if each.works]
    allotment = allot(SPEC, devices, shards)
    held = {shard for leases in allotment.values() for shard in leases}
    for each in workers:
        if not allotment[each.device]:
            for shard in SPEC.shards:
                slow = shard == STEM and each.speed < STEM_SPEED * max(other.speed for other in workers)
                if need[shard] > 0 and each.device in eligible(SPEC, shard, workers) and not slow:
                    assert shard in held, (each, shard)


@given(situations)
@example(situation(87934))
def test_second_holders_only_where_a_whole_lease_is_left_for_each(moment: Situation) -> None:
    devices, shards = moment
    need = needs(SPEC, {each.shard: each.samples for each in shards})
    allotment = allot(SPEC, devices, shards)
    given_to_idle = {each.device for each in devices if not each.leases}
    # Stragglers' leases do not keep others out.
    workers = [each for each in devices if each.works]
    slow = STRAGGLER_SPEED * statistics.median([each.speed for each in workers] or [0.0])
    regular = [each for each in devices if each.speed >= slow]
    holders = Counter(shard for each in regular for shard in allotment.get(each.device, ()))
    for each in regular:
        for shard in allotment.get(each.device, ()):
            if each.device in given_to_idle and holders[shard] > 1:
                before = Counter(shard for other in devices for shard in other.leases)[shard]
                assert holders[shard] * SPEC.schedule.lease_samples <= need[shard] or before >= holders[shard]


@given(situations, st.integers(0, 11))
def test_device_that_comes_or_goes_moves_nobodys_lease(moment: Situation, index: int) -> None:
    devices, shards = moment
    allotment = allot(SPEC, devices, shards)
    settled = [replace(each, leases=allotment.get(each.device, ())) for each in devices]
    without = [each for each in settled if each.device != device(index)]
    after = allot(SPEC, without, shards)
    for each in without:
        if each.leases:
            assert after[each.device] == each.leases


@pytest.mark.parametrize("count", range(11, 33))
def test_many_devices_cover_every_shard_and_nobody_trains_beside_another(count: int) -> None:
    allotment = allot(SPEC, [view(index) for index in range(count)], [])
    held = Counter(shard for leases in allotment.values() for shard in leases)
    assert held == dict.fromkeys(SPEC.shards, 1)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=20), st.integers(1, 128))
def test_slots_are_proportional_to_speed(speeds: list[float], open_tasks: int) -> None:
    devices = [view(index, speed=speed) for index, speed in enumerate(speeds)]
    count = slots(devices, open_tasks)
    share = HELD_SHARE * open_tasks / sum(speeds)
    for each in devices:
        assert 1 <= count[each.device] <= open_tasks
        assert count[each.device] <= max(1.0, each.speed * share + 1.5)
        assert count[each.device] >= min(open_tasks, int(each.speed * share - 0.5))


def test_lone_device_gets_everything_in_turns() -> None:
    samples = dict.fromkeys(SPEC.shards, 0)
    turns = []
    while any(needs(SPEC, samples).values()):
        shards = [
            ShardView(shard=shard, samples=count, visits={device(0): count})
            for shard, count in samples.items()
        ]
        leases = allot(SPEC, [view(0)], shards)[device(0)]
        assert leases
        turns.append(leases)
        for shard in leases:
            samples[shard] += SPEC.schedule.lease_samples
    assert all(samples[shard] >= SPEC.budget(shard) for shard in SPEC.shards)
    early = {shard for leases in turns[: len(turns) // 4] for shard in leases}
    assert early == set(SPEC.shards)


def test_branch_waits_at_the_gate_until_the_stem_is_sealed() -> None:
    seal, lease = SPEC.budget(STEM), SPEC.schedule.lease_samples
    t0 = ShardId("t0")
    samples = {**dict.fromkeys(SPEC.shards, 0), STEM: seal - 1, t0: seal - lease}
    assert needs(SPEC, samples)[t0] == 0
    samples[STEM] = seal
    assert needs(SPEC, samples)[t0] == SPEC.schedule.budget_samples - seal + lease
    assert needs(SPEC, samples)[STEM] == 0


def test_stem_goes_one_to_two_leases_ahead_of_the_branches() -> None:
    lease = SPEC.schedule.lease_samples
    t0, t1 = TASKS[:2]
    samples = dict.fromkeys(SPEC.shards, 0)
    assert all(needs(SPEC, samples).values()), "all begin at once"
    samples |= {STEM: 3 * lease, t0: 2 * lease, t1: 2 * lease + 1}
    assert needs(SPEC, samples)[t0] > 0
    assert needs(SPEC, samples)[t1] == 0
    # One branch behind it is enough for the stem: nobody may be able to train the others.
    samples[STEM] = samples[t1] + 2 * lease
    assert needs(SPEC, samples)[STEM] > 0
    samples[STEM] += 1
    assert needs(SPEC, samples)[STEM] == 0


@given(st.lists(st.integers(0, 20), min_size=len(SPEC.shards), max_size=len(SPEC.shards)))
def test_something_can_be_trained_until_all_is(leases: list[int]) -> None:
    spec = SPEC
    samples = {
        shard: min(count * spec.schedule.lease_samples, spec.budget(shard))
        for shard, count in zip(spec.shards, leases, strict=True)
    }
    assert any(needs(spec, samples).values()) == any(samples[one] < spec.budget(one) for one in spec.shards)


def test_one_device_trains_the_stem_however_many_wait_for_it() -> None:
    seal = SPEC.budget(STEM)
    shards = [ShardView(shard=shard, samples=0 if shard == STEM else seal) for shard in SPEC.shards]
    allotment = allot(SPEC, [view(index) for index in range(5)], shards)
    assert sorted(allotment.values()) == [(), (), (), (), (STEM,)]


def test_fast_device_trains_the_stem_although_others_have_never() -> None:
    begun = [ShardView(shard=shard, samples=1000) for shard in TASKS]
    shards = [ShardView(shard=STEM, samples=1000, visits={device(0): 1000}), *begun]
    crowd = [view(index, speed=0.4) for index in range(1, 8)]
    assert allot(SPEC, [view(0), *crowd], shards)[device(0)] == (STEM,)
    busy = view(0, leases=(TASKS[0],))
    assert (STEM,) not in allot(SPEC, [busy, *crowd], shards).values()
    # Among equals it goes round.
    assert allot(SPEC, [view(0), view(8), *crowd], shards)[device(8)] == (STEM,)


def test_stem_is_never_refused_for_the_sake_of_chosen_tasks() -> None:
    choosy = view(0, tasks=frozenset({TASKS[0]}))
    shards = [ShardView(shard=TASKS[0], samples=SPEC.budget(STEM))]
    assert allot(SPEC, [choosy], shards)[device(0)] == (STEM,)


def test_task_goes_to_who_has_its_class_and_others_and_to_anybody_if_there_is_nobody() -> None:
    only_zero = view(0, class_counts=(100,) + (0,) * 9)
    no_zero = view(1, class_counts=(0,) + (100,) * 9)
    both = view(2)
    nothing = view(3, class_counts=(0,) * 10)
    t0 = TASKS[0]
    assert eligible(SPEC, t0, [only_zero, no_zero, both, nothing]) == {device(2)}
    assert eligible(SPEC, t0, [only_zero, no_zero, nothing]) == {device(0), device(1)}
    assert eligible(SPEC, STEM, [only_zero, no_zero, nothing]) == {device(1)}


def test_preferred_task_is_given_first() -> None:
    shards = [ShardView(shard=STEM, samples=SPEC.budget(STEM))]
    allotment = allot(SPEC, [view(0, prefer=frozenset({TASKS[7]})), *(view(i) for i in range(1, 10))], shards)
    assert allotment[device(0)] == (TASKS[7],)


#: Two devices that have trained one branch each: the first is idle, the second trains on.
TWO = small_spec(2, budget=10_000, lease=500)
TWO_SHARDS = [
    ShardView(shard=STEM, samples=TWO.budget(STEM)),
    *(
        ShardView(shard=shard, samples=2000, visits={device(index): 2000})
        for index, shard in enumerate(TWO.shards[1:])
    ),
]
IDLE, HOLDER = (
    DeviceView(device=device(index), speed=1.0, class_counts=(9, 9), leases=leases)
    for index, leases in enumerate(((), TWO.shards[2:]))
)


def test_device_ahead_of_its_share_joins_another_shard_rather_than_go_on() -> None:
    t1 = TWO.shards[2]
    assert allot(TWO, [IDLE, HOLDER], TWO_SHARDS)[device(0)] == (t1,)


def test_device_that_may_wait_changes_places_with_the_next_one_whose_lease_ends() -> None:
    t0, t1 = TWO.shards[1:]
    waiting = replace(IDLE, waits=True)
    assert allot(TWO, [waiting, HOLDER], TWO_SHARDS)[device(0)] == ()
    both_idle = [waiting, replace(HOLDER, leases=())]
    assert allot(TWO, both_idle, TWO_SHARDS) == {device(0): (t1,), device(1): (t0,)}
    # Nobody has anything that would be worth the wait.
    assert allot(TWO, [waiting], TWO_SHARDS)[device(0)]


def test_much_faster_device_does_not_wait_for_who_took_the_stem_first() -> None:
    begun = [ShardView(shard=shard, samples=0) for shard in SPEC.shards]
    crowd = [view(index) for index in range(2, 6)]
    slow = view(1, leases=(STEM,))
    assert allot(SPEC, [view(0, speed=1 / STEM_SPEED + 0.1), slow, *crowd], begun)[device(0)] == (STEM,)
    assert STEM not in allot(SPEC, [view(0, speed=1 / STEM_SPEED - 0.1), slow, *crowd], begun)[device(0)]
    nearly = [ShardView(shard=STEM, samples=SPEC.budget(STEM) - 600), *begun[1:]]
    assert STEM not in allot(SPEC, [view(0, speed=3.9), slow, *crowd], nearly)[device(0)]


@pytest.mark.parametrize("reason", [{"speed": 0.05}, {"overdue": True}])
def test_slow_or_stuck_holder_keeps_nobody_out(reason: dict[str, object]) -> None:
    sealed = [ShardView(shard=shard, samples=SPEC.budget(STEM)) for shard in SPEC.shards]
    last = [
        replace(each, samples=9800 if each.shard == TASKS[0] else 10_000)
        for each in sealed
        if each.shard != STEM
    ]
    shards = [sealed[0], *last]
    holder = view(0, leases=(TASKS[0],))
    helpers = [view(1), view(2)]
    assert allot(SPEC, [holder, *helpers], shards)[device(1)] == ()
    allotment = allot(SPEC, [replace(holder, **reason), *helpers], shards)  # type: ignore[arg-type]
    assert sorted(allotment[each.device] for each in helpers) == [(), (TASKS[0],)]


def test_straggler_trains_the_stem_only_if_nobody_else_can() -> None:
    gate = [ShardView(shard=shard, samples=SPEC.budget(STEM)) for shard in TASKS]
    fast = [view(1, leases=(TASKS[0],)), view(2, leases=(TASKS[1],))]
    assert allot(SPEC, [view(0, speed=0.05), *fast], gate)[device(0)] == ()
    assert allot(SPEC, [view(0, speed=0.05)], gate)[device(0)] == (STEM,)
    stuck = [replace(each, overdue=True) for each in fast]
    assert allot(SPEC, [view(0, speed=0.05), *stuck], gate)[device(0)] == (STEM,), "it would wait for ever"


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_of_concurrent_claims_to_a_shard_exactly_one_is_kept(seed: int, count: int) -> None:
    rng = random.Random(seed)
    claims = [view(index, leases=(TASKS[0],), lease_since=rng.randrange(100)) for index in range(count)]
    kept = [
        each for each in claims if not contested(each, [other for other in claims if other is not each], {})
    ]
    assert len(kept) == 1


def test_claim_gives_way_to_a_holder_that_has_started_unless_it_knew_of_it() -> None:
    claimant = view(0, leases=(TASKS[0], TASKS[1]), lease_since=1)
    holder = view(1, leases=(TASKS[0],), lease_since=1, started=True)
    assert contested(claimant, [holder], {}) == (TASKS[0],)
    known = {TASKS[0]: frozenset({DeviceId(device(1))})}
    assert contested(claimant, [holder], known) == ()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(2, 8))
@example(0, 3, 2)
# If nobody left a shard to an idle device with less of it, one device would get 0.28 and 0.05 of its part.
@example(1105, 6, 2)
@example(211, 7, 2)
def test_every_shard_visits_every_device_within_a_bounded_number_of_leases(
    seed: int, devices: int, tasks: int
) -> None:
    visits = _rotate(
        seed, devices, small_spec(tasks, budget=10**6, lease=500, seal=0.001), leases=40 * devices
    )
    for shard, by_device in visits.items():
        counts = [by_device[device(index)] for index in range(devices)]
        total = sum(counts)
        assert total >= 500 * devices, shard
        assert min(counts) >= 0.3 * total / devices, (shard, counts)


def _rotate(seed: int, devices: int, spec: RunSpec, leases: int) -> dict[ShardId, Counter[DeviceId]]:
    """Leases of random length end one after the other, and their devices ask again.

    As in the coordinator, a device takes its part of an allotment to all that are idle: it leaves a shard to
    another one that knows less of it, which asks soon.
    """
    rng = random.Random(seed)
    visits: dict[ShardId, Counter[DeviceId]] = {shard: Counter() for shard in spec.shards[1:]}
    held: dict[int, tuple[float, tuple[ShardId, ...]]] = dict.fromkeys(range(devices), (0.0, ()))
    while leases:
        index = min(held, key=lambda index: (held[index][0], index))
        now, finished = held[index]
        for shard in finished:
            visits[shard][device(index)] += spec.schedule.lease_samples
        views = [
            DeviceView(
                device=device(other),
                speed=1.0,
                class_counts=(9,) * len(spec.classes),
                leases=() if other == index else held[other][1],
            )
            for other in held
        ]
        shards = [ShardView(shard=STEM, samples=spec.budget(STEM))]
        shards += [ShardView(shard=shard, samples=sum(v.values()), visits=v) for shard, v in visits.items()]
        allotment = allot(spec, views, shards)
        given_leases = allotment[device(index)]
        # A device gets nothing only where others have all tasks, or are to take them; then it asks again.
        assert given_leases or {shard for leases in allotment.values() for shard in leases} == set(visits)
        lasts = len(given_leases) * rng.uniform(0.9, 1.1) or 0.1
        leases -= bool(given_leases)
        held[index] = (now + lasts, given_leases)
    return visits
