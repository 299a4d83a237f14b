"""The coordinator: what one device decides, with no input or output of its own.

Time comes in as an argument, records and contributions come in as values, and what to do goes out as values.
The daemon reads the board, moves bytes and runs the trainer; it decides nothing. One coordinator belongs to
one device and one thread.

The life of a lease:

    IDLE --decide--> CLAIMED --confirm--> HELD --job--> TRAINING --finished--> IDLE
                        |                   |               |
                        +--- all yielded ---+-- abandoned --+--> IDLE

A claim is shown on the board before it counts: `confirm`, called after the board was read again, gives up
the shards that another device claimed at the same time and goes before. From then on nothing is given up.
If both have started all the same, the ledger merges what they make.

Nothing here waits for another device for long. A device that is given nothing because another idle one
should take it, which then does not, loses its patience and decides as if it were the only one that is free;
and after a few times that, as if the idle ones did not exist, though its data fit the task less than theirs.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

from . import allotment, limits
from .allotment import DeviceView, ShardView
from .belief import Belief
from .claims import Proof, Refusal
from .holdings import Holdings, Want
from .ledger import VOTE_STALENESS_MAX, Contribution, Ledger, states_digest
from .plans import Advert, Claim, CoordinatorSettings, JobPlan, RecordFields, ShardJob, Trial
from .presence import BoardRecord, LeaseTimes, Presence, Sighting
from .run import STEM, DeviceId, RunSpec, ShardId
from .trust import Verdict, can_tell, work

__all__ = [
    "Advert",
    "BoardRecord",
    "Claim",
    "Coordinator",
    "CoordinatorSettings",
    "JobPlan",
    "RecordFields",
    "Refusal",
    "ShardJob",
    "Sighting",
    "Trial",
    "Want",
]


#: Idle devices count for nothing after this many times the patience.
HOPELESS: Final = 4.0
#: Part of its longest lease for which a device waits for a branch that is held, rather than join its holder:
#: what two make of a branch from one start is worth little more than what one does. Ten devices with a branch
#: each wait for a tenth of a lease. Longer, and two devices of unlike speed wait for each other.
WAIT_LEASES: Final = 0.25


class _Phase(enum.Enum):
    IDLE = "idle"
    CLAIMED = "claimed"
    HELD = "held"
    TRAINING = "training"


class Coordinator:
    """One device's part in the run.

    Args:
        spec: of the run.
        device: this one.
        advert: what it offers; `advert` may be set again at any time.
        settings: the knobs.
        rng: for the choice of gossip partners and for patience; seed it.
        first_beat: where beats and lease numbers start. They must rise over restarts, or the others take
            the records of the new life for echoes of the old one: pass milliseconds of the wall clock, which
            nobody compares with another clock.
    """

    def __init__(
        self,
        spec: RunSpec,
        device: DeviceId,
        advert: Advert,
        settings: CoordinatorSettings,
        rng: random.Random,
        first_beat: int = 0,
    ) -> None:
        self.spec = spec
        self.device = device
        self.advert = advert
        self.settings = settings
        self._rng = rng
        self._shards = spec.shards
        self._run_id = spec.run_id
        self._presence = Presence(device, settings.silence_s)
        self._holdings = Holdings(device, settings.replication)
        self._belief = Belief(spec, device, self._holdings, settings.replication.write_off_s)
        self._beat = self._sequence = first_beat
        self._phase = _Phase.IDLE
        self._leases: tuple[ShardId, ...] = ()
        self._known_holders: dict[ShardId, frozenset[DeviceId]] = {}
        self._parents: frozenset[str] = frozenset()
        #: Of what the lease in progress on the stem will make; 0: it is on none.
        self._stem_generation = 0
        self._claimed_at = 0.0
        self._lease_times = LeaseTimes()
        self._idle_since: float | None = None
        self._patience_s = 0.0
        self._leaving = self._left = False
        self.foreign_beats = 0
        """Records under this device's id that it did not publish in this life. More than a few: two daemons
        run with one identity."""

    # --- the board ---

    def observe_board(self, records: Sequence[BoardRecord], now: float) -> None:
        """Take in one reading of the board, which began at `now`."""
        for record in records:
            if record.device == self.device and record.beat > self._beat:
                self.foreign_beats += 1
                self._beat = record.beat
                self._sequence = max(self._sequence, record.lease_sequence)
        self._presence.observe(records[: limits.DEVICES_MAX], now)
        self._belief.settle(frozenset(self.live(now)), now)

    def hear(self, records: Sequence[BoardRecord], now: float) -> None:
        """Take in records of other devices that came by another way than a reading of the board."""
        self._presence.hear(records[: limits.DEVICES_MAX], now)
        self._belief.settle(frozenset(self.live(now)), now)

    def live(self, now: float) -> tuple[DeviceId, ...]:
        """The devices that are alive, this one included, sorted."""
        return tuple(sorted({self.device, *self._presence.live(now)}))

    def has_listened(self, now: float) -> bool:
        """Whether it has read the board for so long that it knows who is there."""
        since = self._presence.observing_since
        return since is not None and now - since >= self.settings.silence_s

    def sightings(self, now: float) -> tuple[Sighting, ...]:
        """The other devices as they were last seen, for people."""
        return self._presence.sightings(now)

    def silent(self, longer_than_s: float, now: float) -> tuple[DeviceId, ...]:
        """Devices that count as alive although nothing was heard of them for so long."""
        return self._presence.silent(longer_than_s, now)

    def found_dead(self, device: DeviceId) -> None:
        """A device's own host says that its daemon is gone: its leases are free at once."""
        self._presence.found_dead(device)

    def record_fields(self) -> RecordFields:
        """What to publish now; each call is a new beat."""
        self._beat += 1
        return RecordFields(
            beat=self._beat,
            state=self.state,
            leases=self._leases,
            lease_sequence=self._sequence,
            progress=tuple(
                (shard, self._belief.counted.generation(shard), samples)
                for shard in self._shards
                if (samples := self._belief.counted.samples(shard)) > 0
            ),
        )

    @property
    def state(self) -> str:
        """This device's state as the board shows it (`records.DeviceState`)."""
        if self._left:
            return "left"
        if self._leaving:
            return "leaving"
        if self._phase in (_Phase.HELD, _Phase.TRAINING):
            return "training"
        if self.complete:
            return "complete"
        return "idle" if self.advert.works and any(self.advert.class_counts) else "observer"

    # --- the ledger ---

    @property
    def ledger(self) -> Ledger:
        """All contributions that this device has heard of: what gossip makes equal on all devices."""
        return self._belief.heard

    @property
    def believed(self) -> Ledger:
        """Those of them that count: leases start from them, and assemblies are made of them (`claims`)."""
        return self._belief.counted

    @property
    def complete(self) -> bool:
        """Whether every shard has seen its budget."""
        return self._belief.counted.complete(self.spec)

    def receive(self, contributions: Iterable[Contribution], now: float) -> tuple[Contribution, ...]:
        """Take in contributions: of peers (their signatures verified), own ones, or those of the store.

        Returns:
            Those that were new, to be stored and passed on.
        """
        return self._belief.receive(contributions, frozenset(self.live(now)), now)

    def judged(self, contribution: Contribution, verdict: Verdict | None) -> None:
        """A contribution's tensors were tried.

        What is malformed does not count any more; what is only refused is not built on here. It stays in
        the ledger, so that nobody brings it again.
        """
        record = self._presence.record(contribution.device)
        fair = can_tell(self.advert.class_counts, record.class_counts if record is not None else ())
        self._belief.judged(contribution, verdict, fair=fair)

    @property
    def accused(self) -> tuple[DeviceId, ...]:
        """Devices that this one has caught lying or suspects of it, to be named in its contributions."""
        return self._belief.accused

    @property
    def unvoiced(self) -> Contribution | None:
        """The newest contribution of this device, if it accuses somebody whom none of them names.

        Signed again with `accused`, it tells the others without waiting for a lease. At the end of a run
        there is none, and the last lie would stay.
        """
        return self._belief.unvoiced

    @property
    def opinions(self) -> dict[str, Any]:
        """What this device has refused and whom it distrusts, to be kept over a restart."""
        return self._belief.opinions

    def restore_opinions(self, kept: object) -> None:
        """Take back `opinions` of an earlier life."""
        self._belief.restore_opinions(kept)

    def refusals(self) -> tuple[Refusal, ...]:
        """Contributions that were found not to count since the last call, for people."""
        return self._belief.take_refusals()

    def convict(self, proof: Proof) -> bool:
        """Look at what is said to prove that a device lies; whether that is so, and news."""
        return self._belief.convict(proof)

    def distrusts(self, device: DeviceId) -> bool:
        """Whether this device does not rely on another one: it was caught, here or by several others."""
        return self._belief.distrusts(device)

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """What proves that devices equivocate: to be passed on to all, and kept."""
        return self._belief.proofs

    def named(self, shard: ShardId, digest: str) -> tuple[Contribution, ...]:
        """The contributions of others to a shard that are known to have these tensors."""
        found = self._holdings.named(self._belief.holding, shard, digest)
        return tuple(entry for entry in found if entry.device != self.device)

    def trial(self, contribution: Contribution, held: AbstractSet[str], now: float) -> Trial:
        """What to compare a contribution's tensors with, now that they are here.

        With what this device would go on from without it; a branch on the stem that it was trained on, if
        that is here. On another one, honest work may be much worse than guessing until a lease on that has
        been trained: half of the honest branches that were refused had been tried on another one.
        """
        shard = contribution.shard
        reference = self._holdings.without(self._belief.built_on, contribution, held, self._belief.shunned)
        stem: tuple[Contribution, ...] = ()
        if shard != STEM:
            own = self._holdings.stem(contribution.stem_digest, held, self._belief.shunned)
            stem = self._newest_stem(held, now) if own is None else own
        newest = max((entry.generation for entry in reference), default=0)
        record = self._presence.live(now).get(contribution.device)
        return Trial(
            contribution=contribution,
            reference=reference,
            stem=stem,
            behind=max(0, newest - contribution.generation),
            class_counts=tuple(record.class_counts) if record is not None else None,
        )

    def _newest_stem(self, held: AbstractSet[str], now: float) -> tuple[Contribution, ...]:
        start = self._start(STEM, held, frozenset(self.live(now)), now)
        return tuple(entry for entry in start if entry.tensors_digest in held)

    def forget(self, devices: Collection[DeviceId]) -> None:
        """Devices were shut out of the run: their leases are vacant, and their contributions leave the
        ledger.

        What others have built on a contribution stays, with its samples; one that nobody has built on yet is
        lost. So all devices drop the same, whatever each had heard before it heard of this.
        """
        self._presence.drop(devices)
        self._belief.forget(devices)

    # --- work ---

    @property
    def leases(self) -> tuple[ShardId, ...]:
        """The shards that this device has claimed or holds."""
        return self._leases

    def decide(self, now: float) -> Claim | None:
        """What this device should train next; None while it is busy or nothing is for it to do.

        Call it after every reading of the board while idle. The claim is to be published (`record_fields`)
        and then confirmed.
        """
        observing_since = self._presence.observing_since
        if self._leases or self._leaving or not self.advert.works or observing_since is None:
            return None
        if self._idle_since is None:
            self._idle_since = now
            self._patience_s = self.settings.silence_s / 2 * (1 + self._rng.random())
        views = self._views(now)
        if not self._vacant(views):
            # Nothing is free: who waits for the stem, or for its turn, has not waited in vain.
            self._idle_since = now
        waited_s = now - self._idle_since
        if waited_s > HOPELESS * self._patience_s:
            views = [view for view in views if view.leases or view.device == self.device]
        alone = self.device if waited_s > self._patience_s else None
        shards = allotment.allot(self.spec, views, self._shard_views(), only=alone).get(self.device, ())
        if now - observing_since < self.settings.silence_s / 2:
            # Devices with better data may be there already, and not be seen yet.
            shards = tuple(shard for shard in shards if allotment.suited(self.spec, shard, views[0]))
        if not shards:
            return None
        self._known_holders = {
            shard: frozenset(view.device for view in views if shard in view.leases) for shard in shards
        }
        self._phase = _Phase.CLAIMED
        self._leases = shards
        self._sequence += 1
        self._claimed_at = now
        return Claim(shards=shards, sequence=self._sequence, ask=self._promising((*shards, STEM), now))

    def _vacant(self, views: Sequence[DeviceView]) -> bool:
        """Whether something may be trained now that nobody holds, but for those who must be stuck.

        The device that should take that over may not find them so: what it goes by are its own leases.
        """
        held = {shard for view in views if not view.overdue for shard in view.leases}
        needs = allotment.needs(self.spec, self._samples())
        return any(need > 0 and shard not in held for shard, need in needs.items())

    def confirm(self, now: float) -> tuple[ShardId, ...]:
        """The shards of the claim that are kept, after it was published and the board was read again.

        Empty: all were yielded; decide again.
        """
        assert self._phase is _Phase.CLAIMED
        views = self._views(now)
        mine = next(view for view in views if view.device == self.device)
        yielded = allotment.contested(mine, views, self._known_holders)
        self._narrow([shard for shard in self._leases if shard not in yielded])
        if self._leases:
            self._phase = _Phase.HELD
        return self._leases

    def job(self, held: AbstractSet[str], now: float) -> JobPlan | None:
        """What to train, as soon as what it starts from is here.

        Call it after `confirm`, and again whenever wanted tensors have arrived or a second has gone by.

        Args:
            held: digests of the tensors on this device.

        Returns:
            None while tensors are missing (fetch what `wanted` names), or when nothing is left to train on
            the leased shards; they are then released, and `leases` is empty.
        """
        assert self._phase is _Phase.HELD
        needs = allotment.needs(self.spec, self._samples())
        self._narrow([shard for shard in self._leases if needs[shard] > 0])
        live = frozenset(self.live(now))
        starts = {shard: self._start(shard, held, live, now) for shard in self._required()}
        if not self._leases or any(
            entry.tensors_digest not in held for start in starts.values() for entry in start
        ):
            return None
        self._phase = _Phase.TRAINING
        self._parents = frozenset(entry.tensors_digest for start in starts.values() for entry in start)
        stem = () if self._leases == (STEM,) else starts[STEM]
        jobs = tuple(self._shard_job(shard, starts[shard], held, now) for shard in self._leases)
        self._stem_generation = jobs[0].generation if self._leases == (STEM,) else 0
        return JobPlan(
            shards=jobs,
            samples=self._lease_samples(min(needs[shard] for shard in self._leases)),
            stem=stem,
            stem_digest="" if self._leases == (STEM,) else states_digest(stem),
        )

    def still_needed(self) -> bool:
        """Whether the lease in progress still serves: some shard of it is not complete, and it has not been
        overtaken.

        When it no longer does, stop the trainer and call `abandoned`.
        """
        return not self._overtaken() and any(
            self._belief.counted.samples(shard) < self.spec.budget(shard) for shard in self._leases
        )

    def _overtaken(self) -> bool:
        """Whether the stem has moved on so far that this device's lease on it will have no vote.

        As when it began the run, and a faster device has come. On branches late work is worth having, because
        of the data that are in it; the stem is not its device's to train once a faster one does.
        """
        if not self._stem_generation:
            return False
        shunned = self._belief.shunned
        built_on = [entry for entry in self._belief.built_on.frontier(STEM) if work(entry) not in shunned]
        newest = max((entry.generation for entry in built_on), default=0)
        return newest - self._stem_generation > VOTE_STALENESS_MAX

    def finished(self, now: float) -> None:
        """The lease is trained, and its contributions were received: release it."""
        assert self._phase is _Phase.TRAINING
        self._lease_times.add(self._leases, now - self._claimed_at)
        self._narrow([])

    def abandoned(self, now: float) -> None:
        """The lease came to nothing (trainer died, nothing left to train, stopped): release it."""
        del now
        self._narrow([])

    def leave(self) -> None:
        """Take nothing new; the lease in progress may be finished."""
        self._leaving = True

    def left(self) -> None:
        """Release everything and tell the others not to wait."""
        self._leaving = self._left = True
        self._narrow([])

    def _narrow(self, kept: Sequence[ShardId]) -> None:
        self._leases = tuple(kept)
        if not self._leases:
            self._phase = _Phase.IDLE
            self._parents = frozenset()
            self._stem_generation = 0
            self._idle_since = None

    def _required(self) -> tuple[ShardId, ...]:
        """Shards whose state a lease starts from: its own, and the stem."""
        return self._leases if STEM in self._leases or not self._leases else (STEM, *self._leases)

    def _start(
        self, shard: ShardId, held: AbstractSet[str], live: AbstractSet[DeviceId], now: float
    ) -> tuple[Contribution, ...]:
        return self._holdings.start(self._belief.built_on, shard, held, live, now, self._belief.shunned)

    def _shard_job(
        self, shard: ShardId, parents: tuple[Contribution, ...], held: AbstractSet[str], now: float
    ) -> ShardJob:
        written_off = list(self._holdings.written_off(self._belief.counted, shard, held, now))
        own = self._belief.counted.get(shard, self.device)
        if own is not None and own.tensors_digest not in held and own not in written_off:
            # This device has lost its own work, say to a damaged disk. Its count must rise all the same:
            # to use a count for two different contributions is equivocation.
            written_off.append(own)
        samples = self._belief.counted.samples(shard)
        return ShardJob(
            shard=shard,
            parents=parents,
            written_off=tuple(written_off),
            samples=samples,
            progress=min(1.0, samples / self.spec.budget(shard)),
        )

    def _lease_samples(self, need: int) -> int:
        """Samples of a lease: whole batches, rounded down before the gate and up before the end."""
        batch = self.spec.schedule.batch_size
        samples = min(self.spec.schedule.lease_samples, need)
        gated = STEM not in self._leases and self._belief.counted.samples(STEM) < self.spec.budget(STEM)
        if gated and samples >= batch:
            return samples // batch * batch
        return -(-samples // batch) * batch

    def _samples(self) -> Mapping[ShardId, int]:
        return {shard: self._belief.counted.samples(shard) for shard in self._shards}

    def _shard_views(self) -> list[ShardView]:
        return [
            ShardView(
                shard=shard,
                samples=self._belief.counted.samples(shard),
                generation=self._belief.counted.generation(shard),
                visits=self._belief.counted.seen(shard),
            )
            for shard in self._shards
        ]

    def _views(self, now: float) -> list[DeviceView]:
        """The live devices, this one first."""
        idle_s = 0.0 if self._idle_since is None else now - self._idle_since
        own = DeviceView(
            device=self.device,
            speed=self.advert.speed,
            tasks=self.advert.tasks,
            prefer=self.advert.prefer,
            class_counts=self.advert.class_counts,
            leases=self._leases,
            lease_since=self._sequence,
            started=self._phase in (_Phase.HELD, _Phase.TRAINING),
            works=self.advert.works,
            waits=idle_s < WAIT_LEASES * self._lease_times.branches_s,
        )
        return [
            own,
            *(
                self._view(record, now)
                for record in self._presence.live(now).values()
                if not self.distrusts(DeviceId(record.device))
            ),
        ]

    def _view(self, record: BoardRecord, now: float) -> DeviceView:
        device = DeviceId(record.device)
        speed = max(record.speed, 1e-9)
        expected_s = self._lease_times.expected_s(record.leases) * max(1.0, self.advert.speed / speed)
        return DeviceView(
            device=device,
            speed=speed,
            tasks=None if record.tasks is None else frozenset(ShardId(task) for task in record.tasks),
            prefer=frozenset(ShardId(task) for task in record.prefer),
            class_counts=record.class_counts,
            leases=tuple(ShardId(shard) for shard in record.leases),
            lease_since=record.lease_sequence,
            started=record.state != "idle",
            overdue=self._presence.overdue(device, expected_s, now),
            # One that takes the run for complete knows more than this device, which will hear of it.
            works=record.state in ("idle", "training", "complete"),
        )

    # --- gossip ---

    def partners(self, now: float) -> tuple[DeviceId, ...]:
        """Devices to exchange ledgers with in this round: one that promises news, the rest at random."""
        others = [device for device in self.live(now) if device != self.device]
        chosen = self._promising(self._shards, now)[:1]
        rest = [device for device in others if device not in chosen]
        count = min(self.settings.gossip_fanout - len(chosen), len(rest))
        return (*chosen, *self._rng.sample(rest, max(0, count)))

    def hints(self, now: float) -> tuple[DeviceId, ...]:
        """Devices to push a new contribution to at once: most others hear of it within a round or two."""
        others = [device for device in self.live(now) if device != self.device]
        return tuple(self._rng.sample(others, min(len(others), len(others).bit_length() + 1)))

    def _promising(self, shards: Iterable[ShardId], now: float) -> tuple[DeviceId, ...]:
        """Devices whose records show more samples of some of these shards than the ledger, in random order.

        A record can promise what its device does not have: it decides whom to ask, and nothing else.
        """
        behind = {shard: self._belief.heard.samples(shard) for shard in shards}
        ahead = []
        for device, record in self._presence.live(now).items():
            for shard, _, samples in record.progress:
                if samples > behind.get(ShardId(shard), samples):
                    ahead.append(device)
                    break
        ahead.sort()
        self._rng.shuffle(ahead)
        return tuple(ahead)

    def wanted(self, held: AbstractSet[str], now: float) -> tuple[Want, ...]:
        """Tensors to fetch: what the lease in preparation starts from first, then this device's replicas, and
        what devices make that it doubts: it has refused work of theirs, and means to know whether by chance.
        """
        live = frozenset(self.live(now))
        wants: list[Want] = []
        if self._phase in (_Phase.CLAIMED, _Phase.HELD):
            for shard in self._required():
                start = self._start(shard, held, live, now)
                # First what it is to be judged by: tensors are tried as they come.
                first = self._references(start, held, live, now)
                wants += self._holdings.want(first or start, held, live, now, needed=True)
        named = {want.digest for want in wants}
        quota = self._holdings.quota(self._belief.counted, self._shards, held, live, now)
        quota = list(dict.fromkeys((*quota, *self._evidence(held, live, now))))
        replicas = self._holdings.want(quota, held, live, now, needed=False)
        return (*wants, *(want for want in replicas if want.digest not in named))

    def _evidence(
        self, held: AbstractSet[str], live: AbstractSet[DeviceId], now: float
    ) -> Iterator[Contribution]:
        """What a device that can judge fetches to judge by, and to be judged."""
        if not any(self.advert.class_counts):
            return
        yield from self._belief.counted.frontier(STEM)
        doubted = self._belief.doubted
        for shard in self._shards:
            for entry in self._belief.counted.frontier(shard):
                if entry.device in doubted:
                    yield from self._references((entry,), held, live, now) or (entry,)

    def _references(
        self, start: Sequence[Contribution], held: AbstractSet[str], live: AbstractSet[DeviceId], now: float
    ) -> tuple[Contribution, ...]:
        """What is to be fetched before a lease's start, to judge that by."""
        if not any(self.advert.class_counts):
            return ()
        shunned = self._belief.shunned
        return self._holdings.references(self._belief.built_on, start, held, live, now, shunned)

    def harvest(self, held: AbstractSet[str], now: float) -> tuple[Want, ...]:
        """Tensors to fetch before the global model can be put together: every frontier, and what takes its
        place where that is lost.
        """
        live = frozenset(self.live(now))
        entries: list[Contribution] = []
        for shard in self._shards:
            frontier = self._belief.counted.frontier(shard)
            instead = self._holdings.sought(self._belief.counted, shard, held, live, now)
            entries += dict.fromkeys((*frontier, *instead))
        return tuple(self._holdings.want(entries, held, live, now, needed=True))

    def assembled_of(self, shard: ShardId, held: AbstractSet[str]) -> tuple[Contribution, ...]:
        """What a shard is assembled of here: its frontier, or what came before where that is not here.

        What this device does not build on is part of it, or devices would assemble different models.
        """
        return self._holdings.here(self._belief.counted, shard, held)

    def authors(self, shard: ShardId, digest: str) -> tuple[DeviceId, ...]:
        """The devices that are known to have made these tensors."""
        return tuple(entry.device for entry in self._holdings.named(self._belief.holding, shard, digest))

    def newest_here(self, shard: ShardId, device: DeviceId, held: AbstractSet[str]) -> Contribution | None:
        """The newest of a device's contributions to a shard whose tensors are here: for those to whom this
        device could not give what came after it.
        """
        return self._holdings.newest_here(self._belief.holding, (shard, device), held)

    def offered(self, contribution: Contribution, held: AbstractSet[str], now: float) -> bool:
        """Another device has these tensors, of an author of whom it lacks newer ones; whether that is news.

        The contribution is verified. It counts where what came after it is lost.
        """
        if contribution.run_id != self._run_id:
            return False
        return self._holdings.offer(self._belief.holding, contribution, held, frozenset(self.live(now)), now)

    def ask_again(self) -> None:
        """What devices lacked a while ago they may have now: believe no earlier refusal."""
        self._holdings.ask_again()

    def refused(self, digest: str, device: DeviceId, now: float) -> None:
        """A device answered that it does not hold a digest. When all have, a lease goes on without it."""
        self._holdings.refuse(digest, device, now)

    def remembered(self) -> Mapping[str, int]:
        """How much of each kind is kept in memory: all of it is bounded by devices times shards."""
        replaced, digests = self._holdings.remembered()
        return {
            "entries": len(self._belief.heard),
            "replaced": replaced,
            "digests": digests,
            "devices": len(self._presence),
        }

    def keep(self, held: AbstractSet[str]) -> frozenset[str]:
        """Digests that must not be thrown away: frontiers, what came before them, the newest of what is held,
        and the lease's parents.
        """
        return self._parents | self._holdings.keep(self._belief.counted, self._shards, held)
