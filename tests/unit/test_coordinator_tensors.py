"""The coordinator: what it believes, judges, fetches, keeps and assembles."""

from __future__ import annotations

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
from ledger_examples import T0, contribution, device, successor

from p2pcollab.coordinator import (
    Advert,
    BoardRecord,
    Coordinator,
    CoordinatorSettings,
)
from p2pcollab.holdings import OFFERS_MAX, REFERENCE_WAIT_S, STEMS_KEPT, ReplicationSettings
from p2pcollab.ledger import Contribution, states_digest
from p2pcollab.run import STEM, ShardId
from p2pcollab.trust import Verdict

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


def test_branch_is_tried_on_the_initial_stem_only_while_that_is_young() -> None:
    """What is good on that one only would pass, and spoil the others' branches."""
    one = coordinator()
    branch = mine(contribution(2, stem_digest=states_digest(())))
    stem = mine(contribution(1, shard=STEM))
    for now in range(STEMS_KEPT):
        one.receive([stem], float(now))
        tried_on = one.trial(branch, digests(one), float(now)).stem
        assert tried_on == (() if stem.generation < STEMS_KEPT else (stem,))
        stem = mine(successor((stem,), 1, shard=STEM))
    assert stem.generation > STEMS_KEPT


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
    first = mine(contribution(1))
    second = mine(successor((first,), 1))
    for one in crowd(3):
        one.receive([first], 0.0)
        one.receive([second], 10.0)
        soon = 10.0 + SETTINGS.replication.replicate_after_s / 2
        assert one.wanted({first.tensors_digest}, soon) == ()


def test_the_only_state_of_a_shard_is_replicated_at_once() -> None:
    """Its maker may come back after a long time with all that was ever trained of it, and die."""
    entry = mine(contribution(1))
    for one in crowd(3)[::2]:
        one.receive([entry], 0.0)
        assert [want.digest for want in one.wanted(set(), 0.0)] == [entry.tensors_digest]


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


def late_joiner() -> tuple[Coordinator, list[Contribution]]:
    """One that has heard only the newest of three states that a dead device has made of one shard."""
    one = coordinator()
    one.observe_board([Record(device=device(1)), Record(device=device(2))], 0.0)
    made: list[Contribution] = []
    for _ in range(3):
        made.append(mine(successor(tuple(made[-1:]), 9)))
    one.receive(made[-1:], 0.0)
    return one, made


def test_what_came_before_lost_tensors_is_heard_from_those_who_have_it() -> None:
    one, (first, second, newest) = late_joiner()
    knowing = coordinator(1)
    for now, entry in enumerate((first, second, newest)):
        knowing.receive([entry], float(now))
    held = {second.tensors_digest}
    assert one.authors(T0, newest.tensors_digest) == (device(9),)
    instead = knowing.newest_here(T0, device(9), held)
    assert instead == second
    assert one.offered(instead, frozenset(), 1.0)
    assert not one.offered(instead, frozenset(), 1.0), "no news"
    assert newest.tensors_digest in {want.digest for want in one.harvest(frozenset(), 1.0)}
    for author in (1, 2):
        one.refused(newest.tensors_digest, device(author), 1.0)
    assert second.tensors_digest in {want.digest for want in one.harvest(frozenset(), 1.0)}
    assert one.assembled_of(T0, held) == (second,)
    assert second.tensors_digest in one.keep(held)
    # It is one more state of that place, and forgotten when the device lives and makes another one.
    assert one.remembered()["replaced"] == 1
    one.receive([mine(successor((newest,), 9))], 2.0)
    assert one.remembered()["replaced"] == 1


def test_the_newest_that_can_be_had_is_believed_of_what_devices_offer() -> None:
    one, (first, second, newest) = late_joiner()
    assert one.offered(second, frozenset(), 1.0)
    # Others have less. It counts where nobody gives the newer one, however long ago that was offered.
    assert one.offered(first, frozenset(), 20.0)
    assert one.assembled_of(T0, {first.tensors_digest, second.tensors_digest}) == (second,)
    for author in (1, 2):
        one.refused(newest.tensors_digest, device(author), 20.0)
    assert wanted_of(one, 20.0) == {newest.tensors_digest: 0, second.tensors_digest: 2}
    for author in (1, 2):
        one.refused(second.tensors_digest, device(author), 20.0)
    assert wanted_of(one, 20.0) == {newest.tensors_digest: 0, first.tensors_digest: 2}
    assert one.assembled_of(T0, {first.tensors_digest}) == (first,)


def wanted_of(one: Coordinator, now: float) -> dict[str, int]:
    """What an assembly wants, and how many may have it; it was heard lately that the others live."""
    one.hear([Record(device=device(index), beat=round(now) + 2) for index in (1, 2)], now)
    return {want.digest: len(want.holders) for want in one.harvest(frozenset(), now)}


def test_offers_are_bounded_and_the_useless_ones_go_first() -> None:
    one = coordinator()
    one.observe_board([Record(device=device(1))], 0.0)
    made: list[Contribution] = []
    for _ in range(OFFERS_MAX + 3):
        made.append(mine(successor(tuple(made[-1:]), 9)))
    one.receive(made[-1:], 0.0)
    *offers, _ = made
    for entry in offers[: OFFERS_MAX - 1]:
        assert one.offered(entry, frozenset(), 0.0)
    gone, late, later = offers[OFFERS_MAX - 1 :]
    assert one.offered(gone, frozenset(), 0.0)
    one.refused(gone.tensors_digest, device(1), 0.0)
    assert one.offered(late, frozenset(), 0.0)
    assert one.authors(T0, gone.tensors_digest) == (), "nobody has it"
    assert one.authors(T0, offers[0].tensors_digest) == (device(9),)
    assert one.offered(later, frozenset(), 0.0)
    assert one.authors(T0, offers[0].tensors_digest) == (), "the oldest"
    assert not one.offered(offers[0], frozenset(), 0.0)
    assert one.remembered()["replaced"] == OFFERS_MAX


def test_only_what_came_before_is_believed_of_what_devices_offer() -> None:
    one, (first, second, newest) = late_joiner()
    later = mine(successor((newest,), 9))
    elsewhere = contribution(9)
    unknown = mine(contribution(8))
    for entry in (newest, later, elsewhere, unknown):
        assert not one.offered(entry, frozenset(), 1.0)
    assert one.offered(second, frozenset(), 1.0)
    one.judged(second, Verdict(reason="of the wrong shape", gross=True, malformed=True))
    assert one.authors(T0, second.tensors_digest) == ()
    assert first not in one.ledger.of_shard(T0)


def test_an_assembly_asks_again_who_refused_before() -> None:
    one, (*_, newest) = late_joiner()
    for author in (1, 2):
        one.refused(newest.tensors_digest, device(author), 0.0)
    assert one.harvest(frozenset(), 0.1)[0].holders == ()
    one.ask_again()
    assert set(one.harvest(frozenset(), 0.1)[0].holders) == {device(1), device(2)}


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
    assert one.assembled_of(T0, {older.tensors_digest, newer.tensors_digest}) == (newer,)
    one.refused(newer.tensors_digest, device(1), 0.0)
    assert one.assembled_of(T0, {older.tensors_digest}) == (older,)
