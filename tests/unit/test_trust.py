"""Whom a device distrusts, and whom all devices with equal ledgers leave out."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_examples import T0, contribution, device, history, successor

from p2pcollab.coordinator import Advert, Coordinator, CoordinatorSettings
from p2pcollab.ledger import Contribution, Ledger
from p2pcollab.models import default_model
from p2pcollab.run import STEM, InputSpec, RunSpec, Schedule, ShardId, TaskSpec
from p2pcollab.trust import (
    GROSS_MAX,
    SUSPECT_BASE,
    SUSPECT_BASE_EARLY,
    SUSPECT_MIN,
    Opinions,
    Verdict,
    chance_of,
    outvoted,
    stands_out,
    work,
)

REFUSED = Verdict(reason="worse", gross=False)
GROSS = Verdict(reason="far worse", gross=True)
SPEC = RunSpec(
    name="pets",
    classes=("cat", "dog"),
    tasks=(TaskSpec(id="t0", classes=(0,)), TaskSpec(id="t1", classes=(1,))),
    model=default_model("digits"),
    input=InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), augment="none"),
    schedule=Schedule(budget_samples=1000, lease_samples=100, batch_size=10, peak_lr=0.1),
    seed=7,
)


def coordinator(number: int) -> Coordinator:
    nothing = Advert(speed=1.0, class_counts=(5, 5), works=False)
    return Coordinator(SPEC, device(number), nothing, CoordinatorSettings(), random.Random(number))


def made(author: int, count: int, **changes: object) -> Contribution:
    """The `count`-th contribution of a device."""
    entry = contribution(author, {author: 10 * count}, generation=count)
    return replace(entry, run_id=SPEC.run_id, tensors_digest=f"{author}/{count}", **changes)  # type: ignore[arg-type]


def voters(numbers: range, liar: int) -> list[Contribution]:
    return [made(number, 1, distrusts=(device(liar),)) for number in numbers]


# What one device concludes


def test_a_device_is_distrusted_after_two_gross_leases() -> None:
    mine = Opinions()
    told = [mine.judge(made(1, count + 1), GROSS) for count in range(GROSS_MAX + 1)]
    assert told == [False, True, False]
    assert mine.distrusted == {device(1)}


def test_gross_branches_of_one_lease_count_once() -> None:
    """What spoiled the lease has spoiled its whole bundle."""
    mine = Opinions()
    for count in range(1, 5):
        assert not mine.judge(made(1, count, shard=f"t{count}", stem_digest="one"), GROSS)
    assert not mine.accused
    assert mine.judge(made(1, 5, shard="t1", stem_digest="two"), GROSS)
    assert mine.distrusted == {device(1)}


def test_refused_branches_of_one_lease_count_once() -> None:
    """A lease that went wrong spoils its whole bundle; that is no sign of a liar."""
    mine = Opinions()
    for author in range(1, 5):
        for count in range(1, 4):
            mine.judge(made(author, count, stem_digest=f"{author}/{count}"), None)
    for count in range(4, 8):
        mine.judge(made(5, count, shard=f"t{count}", stem_digest="one"), REFUSED)
    assert mine.accused == frozenset()
    mine.judge(made(5, 8, shard="t4", stem_digest="one"), REFUSED)
    assert mine.accused == {device(5)}, "a shard is trained once in a lease"


def test_leases_are_told_apart_by_when_their_work_comes_though_the_stem_is_the_same() -> None:
    """After the last lease on the stem all work names one state of it."""
    mine = Opinions()
    for author in range(1, 5):
        for count in range(1, 4):
            mine.judge(made(author, count, stem_digest=f"{author}/{count}"), None)
    bundle = [made(5, count, shard=ShardId(f"t{count}"), stem_digest="last") for count in range(1, 5)]
    for entry in bundle:
        mine.heard(entry, 10.0)
    for entry in bundle:
        mine.judge(entry, REFUSED)
    assert mine.accused == frozenset(), "what comes together may be of one lease"
    again = made(5, 9, shard=ShardId("t9"), stem_digest="last")
    mine.heard(again, 12.0)
    mine.judge(again, REFUSED)
    assert mine.accused == {device(5)}


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6), st.booleans()), max_size=40),
    st.lists(st.floats(0, 100, allow_nan=False), min_size=40, max_size=40),
)
def test_nobody_is_suspected_for_what_came_at_one_moment(
    entries: list[tuple[int, int, bool]], moments: list[float]
) -> None:
    """Whatever is refused of it, and in whichever order it is tried: a bundle is one lease.

    And hearing of the same work again, at another moment, makes no second one of it.
    """
    mine = Opinions()
    bundle = {
        (author, shard): made(author, shard + 1, shard=ShardId(f"t{shard}"), stem_digest="last")
        for author, shard, _ in entries
    }
    for entry in bundle.values():
        mine.heard(entry, 5.0)
    for moment, entry in zip(moments, bundle.values(), strict=False):
        mine.heard(entry, moment)
    for author, shard, refused in entries:
        mine.judge(bundle[author, shard], REFUSED if refused else None)
    assert mine.accused == frozenset()


def test_where_two_votes_outvote_only_gross_work_gives_one() -> None:
    mine = Opinions()
    for author in range(1, 4):
        for count in range(1, 4):
            mine.judge(made(author, count), None, at_home=True)
    for count in range(1, 9):
        mine.judge(made(4, count), REFUSED, at_home=True)
    assert mine.accused == frozenset()
    for count in range(9, 9 + GROSS_MAX):
        mine.judge(made(4, count), GROSS, at_home=True)
    assert mine.accused == {device(4)}


def test_one_contribution_counts_once_however_often_it_is_tried() -> None:
    mine = Opinions()
    for _ in range(5):
        mine.judge(made(1, 1), GROSS)
    assert mine.distrusted == frozenset()


def test_refusals_that_are_not_gross_make_nobody_distrusted_however_many() -> None:
    mine = Opinions()
    for count in range(1, 41):
        mine.judge(made(1, count), REFUSED)
    assert mine.distrusted == frozenset()
    assert len(mine.shunned) == 40


def test_a_device_whose_work_is_refused_much_more_than_the_others_is_voted_against() -> None:
    mine = Opinions()
    for author in (1, 2, 3):
        for count in (1, 2, 3):
            mine.judge(made(author, count), None)
    for count in (1, 2, 3):
        mine.judge(made(4, count), REFUSED)
    assert mine.accused == {device(4)}
    assert mine.distrusted == frozenset()


def test_a_judge_that_refuses_everybodys_work_votes_against_nobody() -> None:
    mine = Opinions()
    for count in range(1, 11):
        for author in (1, 2, 3):
            mine.judge(made(author, count), REFUSED if (author + count) % 3 else None)
    assert mine.accused == frozenset()


def test_liars_do_not_vouch_for_each_other() -> None:
    """That two liars' work is refused makes neither of them look like everybody else."""
    mine = Opinions()
    for author in range(1, 8):
        mine.judge(made(author, 1), None)
    for count in (1, 2, 3):
        mine.judge(made(8, count), REFUSED)
    for count, verdict in enumerate((None, REFUSED, REFUSED), start=1):
        mine.judge(made(9, count), verdict)
    assert mine.accused == {device(8), device(9)}


def test_one_refused_stem_makes_nobody_suspected() -> None:
    """Honest ones go wrong as branches do, and all judges refuse them alike."""
    mine = Opinions()
    for author in (1, 2, 3):
        mine.judge(made(author, 1), None)
    mine.judge(made(4, 1), REFUSED)
    mine.judge(made(5, 1, shard=STEM), REFUSED)
    assert mine.accused == frozenset()


@pytest.mark.parametrize("shard", [ShardId("t1"), STEM])
def test_what_is_excused_is_held_against_nobody_and_not_built_on(shard: ShardId) -> None:
    late = replace(REFUSED, excused=True)
    mine = Opinions()
    for author in (1, 2, 3):
        mine.judge(made(author, 1), None)
    entries = [made(4, count, shard=shard) for count in range(1, 8)]
    for entry in entries:
        assert not mine.judge(entry, late)
    assert mine.accused == mine.doubted == frozenset()
    assert mine.shunned == {work(entry) for entry in entries}


def test_a_judge_that_knows_nobody_elses_work_votes_against_nobody_for_one_stem() -> None:
    mine = Opinions()
    mine.judge(made(1, 1, shard=STEM), GROSS)
    assert mine.accused == frozenset()


def test_who_was_refused_is_doubted_until_enough_of_its_work_is_good_or_bad() -> None:
    mine = Opinions()
    for author in (1, 2, 3):
        mine.judge(made(author, 1), None)
    mine.judge(made(4, 1), REFUSED)
    assert mine.doubted == {device(4)}
    for count in range(2, 9):
        mine.judge(made(4, count), None)
    assert mine.doubted == frozenset()
    for count in (1, 2, 3):
        mine.judge(made(5, count), REFUSED)
    # It is voted against: nobody need look any more.
    assert mine.accused == {device(5)} and mine.doubted == frozenset()


def test_a_judge_that_cannot_be_fair_refuses_and_holds_it_against_nobody() -> None:
    mine = Opinions()
    for count in range(1, 20):
        mine.judge(made(1, count), GROSS, fair=False)
    assert mine.accused == mine.doubted == frozenset()
    assert len(mine.shunned) == 19
    # What is malformed is so for everybody.
    for count in (20, 21):
        mine.judge(made(1, count), replace(GROSS, malformed=True), fair=False)
    assert mine.distrusted == {device(1)}


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 300), st.integers(0, 300))
def test_nobody_stands_out_who_is_refused_no_more_than_the_others(
    accepted: int, refused: int, others_accepted: int, others_refused: int
) -> None:
    tried, others = accepted + refused, others_accepted + others_refused
    if stands_out(refused, tried, others_refused, others):
        assert refused >= SUSPECT_MIN
        assert refused > SUSPECT_BASE * tried
        assert refused * (others + 2) > (others_refused + 1) * tried
        # One more refusal, or one less of the others' work refused, acquits nobody.
        assert stands_out(refused + 1, tried + 1, others_refused, others)
        assert stands_out(refused, tried, max(0, others_refused - 1), others)


def test_opinions_outlive_a_restart_and_damage_in_them_harms_nobody() -> None:
    mine = Opinions()
    for count in (1, 2):
        mine.judge(made(1, count), GROSS)
    mine.judge(made(2, 1), REFUSED)
    mine.judge(made(3, 1, shard=STEM), GROSS)
    again = Opinions()
    again.restore(json.loads(json.dumps(mine.to_json())))
    assert (again.accused, again.distrusted, again.shunned) == (mine.accused, mine.distrusted, mine.shunned)
    assert again.to_json() == mine.to_json()
    for kept in (
        None,
        7,
        [],
        {"shunned": 7},
        {"shunned": [["a"], 3, [1, 2]], "distrusted": [None]},
        {"suspected": [7, None], "tried": [["a"], ["a", 2, 1], ["a", -1, 1], [1, 1, 1], ["a", True, "b"]]},
    ):
        nothing = Opinions()
        nothing.restore(kept)
        assert nothing.to_json() == Opinions().to_json()


def test_a_very_long_run_overflows_nothing() -> None:
    assert stands_out(3000, 5000, 10, 10_000)
    assert not stands_out(300, 5000, 1000, 10_000)
    assert stands_out(3000, 5000, 10, 10_000, early=2000)
    assert not stands_out(300, 5000, 10, 10_000, early=2000)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 50), st.integers(0, 50))
def test_what_is_early_in_a_branchs_training_may_go_wrong_more_often(
    early: int, late: int, refused: int, others: int, others_refused: int
) -> None:
    others_refused, refused = min(others, others_refused), min(refused, early + late)
    base = (others_refused + 1) / (others + 2)

    def exactly(count: int, tried: int, least: float) -> float:
        part = max(least, base)
        return math.comb(tried, count) * part**count * (1 - part) ** (tried - count)

    expected = sum(
        exactly(soon, early, SUSPECT_BASE_EARLY) * exactly(later, late, SUSPECT_BASE)
        for soon in range(early + 1)
        for later in range(late + 1)
        if soon + later >= refused
    )
    assert chance_of(refused, early + late, others_refused, others, early=early) == pytest.approx(expected)


def test_two_bad_leases_early_make_nobody_suspected_and_two_later_ones_do() -> None:
    for progress, accused in ((0.2, frozenset()), (0.5, frozenset({device(4)}))):
        mine = Opinions()
        for author in (1, 2, 3):
            for count in range(1, 8):
                mine.judge(made(author, count), None, progress=progress)
        for count, verdict in enumerate((None, None, REFUSED, REFUSED), start=1):
            mine.judge(made(4, count), verdict, progress=progress)
        assert mine.accused == accused


# What all conclude


@pytest.mark.parametrize(
    ("contributors", "against", "out"),
    [(2, 1, False), (3, 1, False), (3, 2, True), (10, 2, False), (10, 3, True), (13, 3, False)],
)
def test_whom_more_than_a_quarter_of_the_others_name_is_out(
    contributors: int, against: int, out: bool
) -> None:
    entries = [made(number, 1) for number in range(contributors)]
    entries[1 : 1 + against] = voters(range(1, 1 + against), liar=0)
    assert outvoted(Ledger(entries)) == ({device(0)} if out else set())


def test_nobody_votes_twice_or_against_itself() -> None:
    one = made(1, 1, distrusts=(device(0), device(1)))
    entries = [one, replace(one, shard=ShardId("t1")), made(0, 1), made(2, 1)]
    assert outvoted(Ledger(entries)) == frozenset()


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_equal_ledgers_count_the_same_whatever_was_refused_and_in_whatever_order_it_came(
    seed: int, order: int
) -> None:
    """What each device thinks, however bad, is its own affair."""
    rng = random.Random(order)
    entries = [replace(entry, run_id=SPEC.run_id) for entry in history(seed)]
    accusers = [made(number, 1, distrusts=(device(0),)) for number in (8, 9, 10)]
    everything = entries + accusers
    devices = [coordinator(20), coordinator(21)]
    for one in devices:
        rng.shuffle(everything)
        for entry in everything:
            one.receive([entry], 0.0)
            if rng.random() < 0.3:
                one.judged(entry, rng.choice([None, REFUSED, GROSS]))
    first, second = devices
    assert first.ledger == second.ledger
    assert first.believed == second.believed


def test_what_is_refused_is_assembled_and_is_not_built_on() -> None:
    one = coordinator(5)
    good = made(1, 1)
    bad = replace(successor((good,), 2), run_id=SPEC.run_id, tensors_digest="bad")
    one.receive([good, bad], 0.0)
    one.judged(bad, REFUSED)
    held = {good.tensors_digest, bad.tensors_digest}
    assert one.assembled_of(T0, held) == (bad,)
    assert one.believed.samples(T0) == 20
    later = replace(successor((bad,), 3), run_id=SPEC.run_id, tensors_digest="later")
    assert one.trial(later, held, 0.0).reference == (good,)


def test_an_accusation_needs_no_other_lease() -> None:
    """At the end of a run there is none: then the last lie would stay."""
    one, other = coordinator(1), coordinator(9)
    first, second = made(1, 1), made(1, 2, shard=ShardId("t1"))
    lies = [made(8, count) for count in (1, 2, 3)]
    one.receive([first, second], 0.0)
    one.receive([*voters(range(2, 5), liar=7), lies[-1]], 0.0)
    assert one.unvoiced is None
    for lie in lies:
        one.judged(lie, GROSS)
    assert one.unvoiced == second, "the newest"
    again = replace(second, distrusts=one.accused)
    one.receive([again], 1.0)
    assert one.unvoiced is None
    other.receive([second, lies[-1]], 0.0)
    other.receive([again], 1.0)
    assert other.ledger.get(again.shard, device(1)) == again and other.proofs == ()
    other.receive([second], 2.0)
    assert other.ledger.get(again.shard, device(1)) == again


def test_work_that_was_signed_again_is_not_what_it_is_compared_with() -> None:
    """Or it would be as good as itself."""
    one = coordinator(9)
    before, lie = made(1, 1), made(1, 2)
    one.receive([before], 0.0)
    one.receive([lie], 1.0)
    one.judged(lie, None)
    again = replace(lie, distrusts=(device(5),))
    one.receive([again], 2.0)
    held = {before.tensors_digest, lie.tensors_digest}
    assert one.trial(again, held, 2.0).reference == one.trial(lie, held, 2.0).reference == (before,)


def test_what_a_distrusted_device_makes_counts_until_it_is_outvoted_but_is_not_built_on() -> None:
    one = coordinator(5)
    lie = made(1, 1)
    built = replace(successor((lie,), 2), run_id=SPEC.run_id, tensors_digest="built")
    one.receive([lie, built], 0.0)
    for count in (1, 2):
        one.judged(made(1, count, shard=ShardId("t1")), GROSS)
    assert one.accused == (device(1),)
    assert one.distrusts(device(1))
    assert one.believed.frontier(T0) == (built,)
    later = made(1, 3)
    one.receive([later], 1.0)
    assert set(one.believed.frontier(T0)) == {built, later}
    held = {built.tensors_digest, later.tensors_digest}
    assert one.trial(made(4, 1), held, 1.0).reference == (built,)
    one.receive(voters(range(6, 9), liar=1), 2.0)
    # What others have built on it stays.
    assert built in one.believed.frontier(T0) and later not in one.believed.frontier(T0)
    assert any("far worse" in told.reason for told in one.refusals())


def test_a_device_counts_its_own_work_whatever_others_say() -> None:
    one = coordinator(0)
    one.receive([made(0, 1), *voters(range(1, 4), liar=0)], 0.0)
    assert one.believed.get(T0, device(0)) is not None
    other = coordinator(9)
    other.receive([made(0, 1), *voters(range(1, 4), liar=0)], 0.0)
    assert other.believed.get(T0, device(0)) is None
