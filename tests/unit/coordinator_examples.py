"""Coordinators, records and contributions for the tests of the coordinator."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ledger_examples import contribution, device, small_spec

from p2pcollab.coordinator import (
    Advert,
    Coordinator,
    CoordinatorSettings,
    JobPlan,
)
from p2pcollab.ledger import Contribution
from p2pcollab.run import STEM, RunSpec, ShardId

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
