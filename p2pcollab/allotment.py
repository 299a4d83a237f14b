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
3. The stem comes first, and one of the fast devices trains it: all branches stand on it. Stem and branches
   go on side by side, the stem a lease or two ahead.
4. Of the shards that nobody holds, the one that lags most comes first, and goes to the idle device that has
   trained it least for the data that it has. One that somebody holds is given to others by rule 5 only: the
   mean of two leases from one start is worth about one of them, and counts as two. Holders that are far
   slower than the others, or overdue, keep their lease but do not keep others out; nor does, of the stem,
   one that a much faster device could replace.
5. No device runs ahead on a shard: one that has given more of the shard's samples than its share of all the
   work, by over half a lease, looks for another shard. It waits a moment for one that is held, so that two
   devices whose leases end one after the other change places; then it joins the holder rather than go on.
   Thus each shard is trained on everybody's data in turn, with no barrier.

Whoever is left over waits: its part of the computation is smaller.

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
#: Leases by which a device may be ahead of its share of a shard. At 0.5, eleven devices with a task each join
#: one another so often that a branch is trained through 21 leases in a row instead of 24 (simulated; at 1.5,
#: 24). Higher, and with four devices some branches hardly see the data of one of them; and what a device has
#: made of a shard in several leases in a row may die with it.
AHEAD_LEASES: Final = 0.5
#: A preferred task may get this many times the device's share.
PREFERENCE: Final = 3.0
#: The stem is trained by one device at a time, and by no device slower than this fraction of the fastest:
#: everybody waits for it. Lower: more devices' data are in it, and a run takes longer.
STEM_SPEED: Final = 0.5
#: Leases by which the stem must be ahead of a branch when that begins one, but for its first, and by which it
#: may be ahead of the branch that is in front. A branch learns more from features that are a little further
#: than itself: in one place, half a point more than on those that it began with
#: (docs/results/method-trials.md).
LEAD_MIN_LEASES: Final = 1.0
LEAD_MAX_LEASES: Final = 2.0


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
    #: Has not been idle for long: rather than go on with a shard that it is ahead on, or join the holder of
    #: another one, it waits until that one is free.
    waits: bool = False


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
    fraction of its own. After its first lease it begins none while the stem is not ahead of it, nor does the
    stem while it is far ahead of all branches: a branch that nobody can train holds nobody up.
    """
    seal, stem = spec.budget(STEM), samples.get(STEM, 0)
    sealed = stem >= seal
    front = max(samples.get(shard, 0) for shard in spec.shards if shard != STEM)
    lease = spec.schedule.lease_samples
    result = {}
    for shard in spec.shards:
        limit = spec.budget(shard) if sealed else min(seal, spec.budget(shard))
        seen = samples.get(shard, 0)
        need = max(0, limit - seen)
        if shard == STEM:
            waits = stem - front > LEAD_MAX_LEASES * lease
        else:
            waits = not sealed and seen > 0 and stem - seen < LEAD_MIN_LEASES * lease
        result[shard] = 0 if waits else need
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
        only: give nothing to other idle devices than this one. For a device that has waited for them in
            vain: it takes what they know less of, and rotation suffers.
    """
    hand = _Hand(spec, devices, shards, only)
    hand.give_preferred()
    hand.give_vacant(ahead=False)
    hand.change_places()
    hand.give_vacant(ahead=True)
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
        if STEM in self.eligible:
            self.eligible[STEM] = self._fast(self.eligible[STEM])
            if (len(self.holders[STEM]) + 1) * self.lease <= self.need[STEM]:
                # All branches would wait for one that took it when no faster one was there.
                self.holders[STEM] &= self.eligible[STEM]
        #: Those that are given nothing more for now, because another branch may soon be free.
        self.waiting: set[DeviceId] = set()
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
        return place

    def _fast(self, eligible: frozenset[DeviceId]) -> frozenset[DeviceId]:
        """Those that are fast enough for the stem, of those that are neither stragglers nor stuck, if any."""
        overdue = self.slack - self.stragglers
        usable = (eligible - self.slack) or (eligible - overdue) or eligible
        fastest = max((self.devices[device].speed for device in usable), default=0.0)
        return frozenset(device for device in usable if self.devices[device].speed >= STEM_SPEED * fastest)

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
            if self.holders[shard]:
                continue
            candidates = [
                view
                for view in self.idle
                if self._may(view, shard, ahead=ahead)
                and (not preferred or shard == STEM or shard in view.prefer)
            ]
            if candidates:
                self._assign(shard, min(candidates, key=lambda view: self._fitness(view, shard)))

    def change_places(self) -> None:
        """Held branches to devices that have nothing and could only go on with what they are ahead on.

        Where there are as many tasks as devices, this is how they come to another one: the holder finds the
        one that was left.
        """
        free = [shard for shard in self.need if shard != STEM and not self.holders[shard]]
        held = [shard for shard in self.need if shard != STEM and self.holders[shard]]
        for view in self.idle:
            if self.leases[view.device] or not any(self._may(view, shard, ahead=True) for shard in free):
                continue
            joinable = [
                shard
                for shard in held
                if (len(self.holders[shard]) + 1) * self.lease <= self.need[shard]
                and self._may(view, shard, ahead=False)
            ]
            if joinable and view.waits:
                self.waiting.add(view.device)
            elif joinable:
                self._assign(
                    min(joinable, key=lambda one: (len(self.holders[one]), self._urgency(one))), view
                )

    def _may(self, view: DeviceView, shard: ShardId, *, ahead: bool) -> bool:
        """Whether an idle device can take a shard on top of what it has been given."""
        device, given = view.device, self.leases[view.device]
        if device not in self.eligible[shard] or device in self.waiting:
            return False
        if shard in given or given == [STEM]:
            return False
        if len(given) >= (1 if shard == STEM else self.slots[device]):
            return False
        return ahead or self.excess[shard, device] <= AHEAD_LEASES

    def _assign(self, shard: ShardId, view: DeviceView) -> None:
        self.leases[view.device].append(shard)
        self.holders[shard].add(view.device)

    def _urgency(self, shard: ShardId) -> tuple[bool, float, float, bytes]:
        """Order of the shards: the stem, then what lags most, then what its best candidate knows least."""
        generation = self.shards[shard].generation
        return shard != STEM, self.place[shard], round(self.least_excess[shard], 3), _rank(shard, generation)

    def _fitness(self, view: DeviceView, shard: ShardId) -> tuple[bool, float, float, bytes]:
        """Order of the candidates for a shard, the best first."""
        device = view.device
        load = (1 + len(self.leases[device])) / self.slots[device]
        # The gate makes the stem the bottleneck: among equals the fastest trains it.
        last = 1.0 / view.speed if shard == STEM else load
        visits = self.shards[shard].visits.get(device, 0) / max(1, sum(view.class_counts))
        return shard not in view.prefer, visits, last, _rank(shard, self.shards[shard].generation, device)
