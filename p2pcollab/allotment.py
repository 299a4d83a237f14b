"""The allotment: who trains what. A pure function of what the board and the ledger show.

Nobody is in charge. Every device computes the same function over what it sees, takes from the result only
its own part, and claims that on the board. Views differ for moments, so two devices may take one shard: each
sees the other's claim and `contested` lets exactly one of them yield; if both have started already, their
contributions merge and nothing is lost.

The rules, in the order in which they decide:

1. A device that holds a lease keeps it. Only idle devices are given anything.
2. A task belongs to devices that have examples of its classes *and* of others. If no live device has both,
   everyone with data may train it: rotating over them restores the mixture that no one has alone. `tasks`
   excludes, for class tasks only.
3. A shard that nobody holds comes before one that somebody holds; among those the one that lags most.
   Holders that are far slower than the others, or overdue, keep their lease but do not keep others out.
4. No device runs ahead on a shard: one that has given more of the shard's samples than its share of all the
   work, by over half a lease, looks for another shard, and joins one that is held rather than go on. Thus
   each shard is trained on everybody's data in turn, with no barrier.
5. Whoever would be idle helps where the fewest work, as long as the shard needs that many leases.

A device gets several tasks at a time, by its speed, so that stem features are computed once for all of them;
a quarter of the open tasks stays free, so that there is something to move on to.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from .run import STEM, DeviceId, RunSpec, ShardId

Allotment = Mapping[DeviceId, tuple[ShardId, ...]]

#: Share of the open tasks that is held at a time. More: larger bundles, fewer stem passes. Less: leases
#: rotate with fewer overlaps.
HELD_SHARE: Final = 0.75
#: A device slower than this fraction of the median keeps nobody out of the shards that it holds: higher, and
#: ordinary devices train one shard at a time; lower, and a shard lags for as long as its slow holder needs.
STRAGGLER_SPEED: Final = 0.25
#: Leases by which a device may be ahead of its share of a shard. Below 0.5, two devices never train the same
#: shard twice in a row and overlap more often.
AHEAD_LEASES: Final = 0.5
#: A preferred task may get this many times the device's share.
PREFERENCE: Final = 3.0
#: The stem runs ahead of the branches, in the end by this many leases: they train on a better stem, and its
#: last lease is over when they come to the gate.
STEM_LEAD_LEASES: Final = 3.0
#: One more device trains the stem for each such number of leases that this lead lacks. Fewer: less waiting at
#: the gate. More: fewer overlaps, in which the same samples teach less.
STEM_LAG_LEASES: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """One live device as the board shows it."""

    device: DeviceId
    #: Dense-equivalent training MAC/s times the budget share, > 0.
    speed: float
    #: Trains only these class tasks; None: all.
    tasks: frozenset[ShardId] | None = None
    prefer: frozenset[ShardId] = frozenset()
    #: Training examples per class of the run.
    class_counts: tuple[int, ...]
    #: Empty: idle.
    leases: tuple[ShardId, ...] = ()
    #: Number of the claim that the leases come from.
    lease_since: int = 0
    #: Training has begun: the leases are no longer given up.
    started: bool = False
    #: Has held its leases for so long that it must be stuck.
    overdue: bool = False
    #: False: observer, leaving or paused; it takes nothing new.
    works: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardView:
    """How far one shard is."""

    shard: ShardId
    #: Samples seen.
    samples: int
    generation: int = 0
    #: Samples seen by device.
    visits: Mapping[DeviceId, int] = field(default_factory=dict)


def needs(spec: RunSpec, samples: Mapping[ShardId, int]) -> dict[ShardId, int]:
    """Samples that may be trained now, per shard; 0 for what is complete or gated.

    Until the stem is sealed, a branch may not see more samples than the stem's budget, which is the same
    fraction of its own.
    """
    seal = spec.budget(STEM)
    sealed = samples.get(STEM, 0) >= seal
    result = {}
    for shard in spec.shards:
        limit = spec.budget(shard) if sealed else min(seal, spec.budget(shard))
        seen = samples.get(shard, 0)
        need = max(0, limit - seen)
        # Less than a batch short of the gate, a lease would step over it.
        at_gate = shard != STEM and not sealed and seen > 0 and need < spec.schedule.batch_size
        result[shard] = 0 if at_gate else need
    return result


def allot(
    spec: RunSpec,
    devices: Sequence[DeviceView],
    shards: Sequence[ShardView],
    *,
    only: DeviceId | None = None,
) -> Allotment:
    """Leases of every device that works or holds something; independent of the order of the arguments.

    Args:
        devices: the live ones, this device included.
        shards: of the run; those left out count as untrained.
        only: give nothing to other idle devices than this one.
    """
    hand = _Hand(spec, devices, shards, only)
    hand.give_preferred()
    hand.give_vacant(ahead=False)
    hand.help_held(ahead=False)
    hand.give_vacant(ahead=True)
    hand.help_held(ahead=True)
    return {device: tuple(leases) for device, leases in hand.leases.items()}


def contested(
    claimant: DeviceView, others: Iterable[DeviceView], known: Mapping[ShardId, frozenset[DeviceId]]
) -> tuple[ShardId, ...]:
    """Shards of a claim that the claimant yields because a claim it did not know of goes before.

    A holder that trains already goes first; between two claims the smaller hash of (shard, device, number of
    the claim) does. Both sides read that from the same two records, so exactly one of them yields.

    Args:
        claimant: the device that asks, with its claim as leases.
        others: the other live devices.
        known: the holders of each shard that the claim was made in spite of.
    """
    yielded = []
    for shard in claimant.leases:
        mine = _rank(shard, claimant.device, claimant.lease_since)
        for other in others:
            if shard not in other.leases or other.device == claimant.device:
                continue
            if other.device in known.get(shard, frozenset()):
                continue
            if other.started or _rank(shard, other.device, other.lease_since) < mine:
                yielded.append(shard)
                break
    return tuple(yielded)


def suited(spec: RunSpec, shard: ShardId, view: DeviceView) -> bool:
    """Whether a device has examples of a task's classes and of others; for the stem, of two classes."""
    if shard == STEM:
        return sum(count > 0 for count in view.class_counts) >= 2
    classes = spec.task(shard).classes
    total = sum(view.class_counts)
    own = sum(view.class_counts[index] for index in classes if index < len(view.class_counts))
    # A task of all classes has no others.
    return own > 0 and (own < total or len(classes) == len(spec.classes))


def eligible(spec: RunSpec, shard: ShardId, devices: Iterable[DeviceView]) -> frozenset[DeviceId]:
    """Devices that a shard belongs to: rule 2."""
    willing = [
        view
        for view in devices
        if any(view.class_counts) and (shard == STEM or view.tasks is None or shard in view.tasks)
    ]
    best = [view for view in willing if suited(spec, shard, view)]
    return frozenset(view.device for view in best or willing)


def slots(devices: Sequence[DeviceView], open_tasks: int) -> dict[DeviceId, int]:
    """How many tasks each device trains at a time: `HELD_SHARE` of the open ones, by speed, at least one.

    Largest remainders, so that the counts add up to the share unless there are more devices than that.
    """
    total_speed = sum(view.speed for view in devices)
    seats = int(HELD_SHARE * open_tasks + 0.5)
    quota = {view.device: seats * view.speed / total_speed for view in devices}
    count = {device: min(max(1, int(share)), max(1, open_tasks)) for device, share in quota.items()}
    spare = seats - sum(count.values())
    for device in sorted(quota, key=lambda device: (int(quota[device]) - quota[device], device)):
        if spare > 0 and quota[device] > count[device] and count[device] < open_tasks:
            count[device] += 1
            spare -= 1
    return count


def _rank(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()


class _Hand:
    """One computation of the allotment: the leases given so far, and the figures that decide."""

    def __init__(
        self,
        spec: RunSpec,
        devices: Sequence[DeviceView],
        shards: Sequence[ShardView],
        only: DeviceId | None,
    ) -> None:
        self.lease = spec.schedule.lease_samples
        views = {view.shard: view for view in shards}
        self.shards = {shard: views.get(shard) or ShardView(shard=shard, samples=0) for shard in spec.shards}
        samples = {shard: view.samples for shard, view in self.shards.items()}
        self.need = {shard: need for shard, need in needs(spec, samples).items() if need > 0}
        self.devices = {view.device: view for view in sorted(devices, key=lambda view: view.device)}
        workers = [view for view in self.devices.values() if view.works]
        self.idle = [view for view in workers if not view.leases and only in (None, view.device)]
        self.leases: dict[DeviceId, list[ShardId]] = {
            view.device: list(view.leases) for view in self.devices.values() if view.works or view.leases
        }
        self.slots = slots(workers, sum(shard != STEM for shard in self.need)) if workers else {}
        slow = STRAGGLER_SPEED * statistics.median(view.speed for view in workers) if workers else 0.0
        self.stragglers = frozenset(view.device for view in workers if view.speed < slow)
        #: Those for which nobody waits.
        self.slack = self.stragglers | {view.device for view in workers if view.overdue}
        self.eligible = {shard: eligible(spec, shard, workers) for shard in self.need}
        self.holders = {
            shard: {
                view.device
                for view in self.devices.values()
                if shard in view.leases and not view.overdue and view.device not in self.stragglers
            }
            for shard in self.need
        }
        self.stem_leases = spec.budget(STEM) / self.lease
        self.place = self._places(spec)
        self.excess = self._excesses()
        self.least_excess = {
            shard: min((self.excess[shard, view.device] for view in self.idle), default=0.0)
            for shard in self.need
        }

    def _places(self, spec: RunSpec) -> dict[ShardId, float]:
        """How far each open shard is on the way to what it may reach now."""
        sealed = STEM not in self.need
        place = {}
        for shard in self.need:
            goal = spec.budget(shard) if sealed else spec.budget(STEM)
            # In whole leases, so that shards which differ by part of one are chosen by visits instead.
            place[shard] = self.shards[shard].samples // self.lease * self.lease / goal
        if not sealed:
            place[STEM] *= self.stem_leases / (self.stem_leases + STEM_LEAD_LEASES)
        return place

    def _excesses(self) -> dict[tuple[ShardId, DeviceId], float]:
        """Leases that each idle device has given to each shard beyond its share of all the work.

        The share is what independence would expect, row by column: the shard's samples times the device's
        part of all samples. Stragglers count among themselves only: waiting for them would be a barrier.
        """
        if not self.idle:
            return {}
        given = dict.fromkeys(self.devices, 0)
        for shard_view in self.shards.values():
            for device, count in shard_view.visits.items():
                if device in given:
                    given[device] += count
        excess: dict[tuple[ShardId, DeviceId], float] = {}
        for shard in self.need:
            visits = self.shards[shard].visits
            regular = self.eligible[shard] - self.stragglers
            for view in self.idle:
                device = view.device
                peers = regular if device in regular else self.eligible[shard]
                everything = sum(given[peer] for peer in peers)
                share = given[device] / everything if everything else 0.0
                if shard in view.prefer:
                    share *= PREFERENCE
                fair = sum(visits.get(peer, 0) for peer in peers) * share
                excess[shard, device] = (visits.get(device, 0) - fair) / self.lease
        return excess

    def give_preferred(self) -> None:
        """Vacant shards to idle devices that prefer them; but the stem in its turn, or nobody would train it
        where everyone prefers something.
        """
        if any(view.prefer for view in self.idle):
            self._give(ahead=False, preferred=True)

    def give_vacant(self, *, ahead: bool) -> None:
        """Shards that lack a holder, the one that lags most first."""
        self._give(ahead=ahead, preferred=False)

    def _give(self, *, ahead: bool, preferred: bool) -> None:
        for shard in sorted(self.need, key=self._urgency):
            while len(self.holders[shard]) < self._wanted(shard):
                candidates = [
                    view
                    for view in self.idle
                    if self._may(view, shard, ahead=ahead)
                    and (not preferred or shard == STEM or shard in view.prefer)
                ]
                if not candidates:
                    break
                self._assign(shard, min(candidates, key=lambda view: self._fitness(view, shard)))

    def help_held(self, *, ahead: bool) -> None:
        """Held shards to devices that have nothing, as long as each holder has a whole lease to train."""
        helping = {view.device for view in self.idle if not self.leases[view.device]}
        while helping and self._help(helping, ahead=ahead):
            pass

    def _help(self, helping: set[DeviceId], *, ahead: bool) -> bool:
        """Give one shard to one of the helping devices, if any can be given."""
        for shard in sorted(self.need, key=lambda shard: (len(self.holders[shard]), self._urgency(shard))):
            if (len(self.holders[shard]) + 1) * self.lease > self.need[shard]:
                continue
            candidates = [
                view for view in self.idle if view.device in helping and self._may(view, shard, ahead=ahead)
            ]
            if candidates:
                self._assign(shard, min(candidates, key=lambda view: self._fitness(view, shard)))
                return True
        return False

    def _wanted(self, shard: ShardId) -> int:
        """Holders that a shard should have before others get a second one."""
        if shard != STEM:
            return 1
        branches = [place for other, place in self.place.items() if other != STEM]
        if not branches:
            return 1
        lag = (statistics.fmean(branches) - self.place[STEM]) * self.stem_leases
        more = int(lag / STEM_LAG_LEASES)
        return max(1, min(1 + more, self.need[STEM] // self.lease, len(self.devices) // 2))

    def _may(self, view: DeviceView, shard: ShardId, *, ahead: bool) -> bool:
        """Whether an idle device can take a shard on top of what it has been given."""
        device, given = view.device, self.leases[view.device]
        if device not in self.eligible[shard] or shard in given or given == [STEM]:
            return False
        if shard == STEM:
            # The gate waits for the stem: a slow device trains it only where no other works.
            if given or (device in self.stragglers and self.eligible[STEM] - self.slack):
                return False
        elif len(given) >= self.slots[device]:
            return False
        return ahead or self.excess[shard, device] <= AHEAD_LEASES

    def _assign(self, shard: ShardId, view: DeviceView) -> None:
        self.leases[view.device].append(shard)
        self.holders[shard].add(view.device)

    def _urgency(self, shard: ShardId) -> tuple[float, bool, float, bytes]:
        """Order of the shards: what lags most, then the stem, then what its best candidate knows least."""
        generation = self.shards[shard].generation
        return self.place[shard], shard != STEM, round(self.least_excess[shard], 3), _rank(shard, generation)

    def _fitness(self, view: DeviceView, shard: ShardId) -> tuple[bool, float, float, bytes]:
        """Order of the candidates for a shard, the best first."""
        device = view.device
        load = (1 + len(self.leases[device])) / self.slots[device]
        # The gate makes the stem the bottleneck: among equals the fastest trains it.
        last = 1.0 / view.speed if shard == STEM else load
        visits = self.shards[shard].visits.get(device, 0) / max(1, sum(view.class_counts))
        return shard not in view.prefer, visits, last, _rank(shard, self.shards[shard].generation, device)
