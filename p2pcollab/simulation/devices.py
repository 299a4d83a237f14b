"""One simulated device: does what its coordinator decides, as the daemon does and in the same order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..allotment import needs
from ..coordinator import Advert, Coordinator, CoordinatorSettings, JobPlan
from ..ledger import Contribution, Ledger
from ..presence import next_beat
from ..run import STEM, DeviceId, ShardId
from .disk import Disk
from .network import BOARD_RPC_S, SimulatedRecord
from .scenarios import Stop

if TYPE_CHECKING:
    from .simulator import Simulation

SETTINGS: Final = CoordinatorSettings()
BEAT_S: Final = SETTINGS.beat_s
GOSSIP_S: Final = 2.0
#: A call that is not answered is given up (`daemon.calls`).
CALL_S: Final = 8.0
#: Until a device that does not answer is left alone by the board (`daemon.board._BAN_S`).
BAN_S: Final = 5.0
#: Between the time at which a claim is shown and the reading that confirms it.
SETTLE_S: Final = 0.3
#: An idle device looks again (`daemon.work`).
LOOK_AGAIN_S: Final = 1.0
FETCH_TIMEOUT_S: Final = 2.0
#: How often a device looks for tensors to fetch (`daemon.gossip`).
FETCH_LOOK_S: Final = 0.5
#: A lease whose tensors do not come is given up, and the device pauses (`daemon.work`).
PREPARE_S: Final = 20.0
AFTER_FAILURE_S: Final = 2.0
#: Clocks start here, in unix seconds.
EPOCH_S: Final = 1_700_000_000.0


class Device:
    """The daemon of one device: does what its coordinator decides."""

    def __init__(self, simulation: Simulation, index: int) -> None:
        self.simulation = simulation
        self.index = index
        self.plan = simulation.scenario.devices[index]
        self.id = simulation.ids[index]
        self.alive = False
        #: Events of an earlier life are void.
        self.life = 0
        self.started_at = 0.0
        #: What survives the daemon.
        self.disk = Disk()
        self.writes = 0
        self.job: JobPlan | None = None
        self.job_since = 0.0
        #: Digests of what the lease has made, while it is being stored.
        self.storing: frozenset[str] = frozenset()
        self.coordinator: Coordinator
        self.asked: dict[str, tuple[float, int]] = {}
        self.preparing = False
        self.fetching_later = False
        self.claimed_at = 0.0
        self.beat_count = 0
        #: It stands still until then, after so long, and its trainer is behind by so much.
        self.stopped_until = 0.0
        self.stop_s = 0.0
        self.trainer_behind_s = 0.0
        self.clock_s = self.plan.clock_s
        #: Tensors given to other devices.
        self.sent_bytes = 0

    # --- life ---

    @property
    def held(self) -> set[str]:
        """Digests of the tensors on this device, as its store believes."""
        return self.disk.shards

    @property
    def wall_s(self) -> float:
        """What its clock shows."""
        return EPOCH_S + self.simulation.now + self.clock_s

    @property
    def still(self) -> bool:
        """Whether it stands still now."""
        return self.simulation.now < self.stopped_until

    def start(self) -> None:
        """Come alive, for the first time or again."""
        simulation, plan, rng = self.simulation, self.plan, self.simulation.rng
        self.alive = True
        self.life += 1
        self.started_at = simulation.now
        self.job = None
        self.storing = frozenset()
        self.asked.clear()
        self.preparing = False
        self.fetching_later = False
        self.beat_count = 0
        self.coordinator = Coordinator(
            simulation.scenario.spec,
            self.id,
            Advert(speed=plan.speed, class_counts=plan.class_counts, tasks=plan.tasks, prefer=plan.prefer),
            simulation.scenario.settings,
            random.Random(rng.random()),
            first_beat=round(self.wall_s * 1000),
        )
        self.coordinator.receive(self.disk.entries.values(), simulation.now)
        self.after(rng.random() * 0.5, self.beat)
        self.after(rng.random() * 0.5, self.watch)
        self.after(rng.random() * GOSSIP_S, self.gossip)

    def come_back(self) -> None:
        """Start again on what the disk holds."""
        self.simulation.checks.stored_before_named(self)
        if self.plan.decay:
            self.disk.decay(self.simulation.rng, self.id, self.plan.decay)
        self.simulation.join(self)

    def kill(self) -> None:
        """SIGKILL or a power cut: the disk keeps what its guarantees say."""
        if not self.alive:
            return
        simulation = self.simulation
        simulation.stored(self, self.disk.crash(simulation.rng, power_cut=self.plan.power_cut))
        self.alive = False
        self.life += 1
        self.stopped_until = 0.0
        simulation.killed(self)
        if self.plan.restarts_after_s is not None:
            simulation.at(simulation.now + self.plan.restarts_after_s, self.come_back)

    def stand_still(self, stop: Stop) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        if not self.alive:
            return
        self.stopped_until = self.simulation.now + stop.length_s
        self.stop_s = stop.length_s
        if stop.trainer and self.job is not None:
            self.trainer_behind_s += stop.length_s
        self.simulation.silent(self, self.stopped_until)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something later, if this life lasts; a device that stands still does it when it goes on."""
        life = self.life

        def act() -> None:
            if self.life != life or not self.alive:
                return
            if self.simulation.now < self.stopped_until:
                self.simulation.at(self.stopped_until, act)
            else:
                action(*arguments)

        self.simulation.at(self.simulation.now + delay_s, act)

    # --- the board ---

    def record(self) -> SimulatedRecord:
        """This device's next record."""
        fields = self.coordinator.record_fields()
        plan = self.plan
        self.beat_count = next_beat(self.beat_count, self.wall_s)
        return SimulatedRecord(
            device=self.id,
            beat=self.beat_count,
            state=fields.state,
            speed=plan.speed,
            tasks=None if plan.tasks is None else tuple(sorted(plan.tasks)),
            prefer=tuple(sorted(plan.prefer)),
            class_counts=plan.class_counts,
            leases=fields.leases,
            lease_sequence=fields.lease_sequence,
            progress=fields.progress,
        )

    def publish(self) -> float:
        """Show this device's record; how long it takes until the board shows it."""
        simulation = self.simulation
        record = self.record()
        delay_s = 0.3 * simulation.rng.random() + self.board_wait_s()
        simulation.board.publish(self.index, record, simulation.now + delay_s)
        simulation.log("publish", self.index, record.beat, record.state, record.leases)
        return delay_s

    def board_wait_s(self) -> float:
        """Time that a node which does not answer takes from whatever is asked of the board."""
        simulation = self.simulation
        if simulation.now < simulation.silent_until and simulation.rng.random() < 0.5:
            return BOARD_RPC_S
        return 0.0

    def observe(self, not_before: float = -math.inf) -> None:
        """Read the board. The reading began a while ago, and shows what was there then."""
        simulation = self.simulation
        age_s = simulation.rng.random() * simulation.scenario.staleness_s + self.board_wait_s()
        began = max(simulation.now - age_s, not_before, self.started_at)
        records = simulation.board.read(self.index, began, self.wall_s)
        for record in records:
            if record.device == self.id:
                self.beat_count = max(self.beat_count, record.beat)
                records.remove(record)
                break
        self.coordinator.observe_board(records, began)
        simulation.observed(self)

    def beat(self) -> None:
        """Publish in time."""
        self.publish()
        self.after(BEAT_S * (0.9 + 0.2 * self.simulation.rng.random()), self.beat)

    def watch(self) -> None:
        """Read the board, look for work, drop tensors that are no longer of use."""
        self.observe()
        if self.job is not None and not self.storing and not self.coordinator.still_needed():
            self.discard(self.job)
        self.look_for_work()
        if self.simulation.rng.random() < 0.1:
            self.disk.remove_shards(self.kept())
            self.simulation.checks.memory_bounded(self)
            self.simulation.checks.stored_before_named(self)
        self.fetch()
        again_s = BEAT_S * (0.9 + 0.2 * self.simulation.rng.random())
        self.after(LOOK_AGAIN_S if self.idle else again_s, self.watch)

    def kept(self) -> frozenset[str]:
        """Digests of what is no garbage; what is being stored is named by no contribution yet."""
        return self.coordinator.keep(self.held) | self.storing

    # --- work ---

    @property
    def idle(self) -> bool:
        """Whether it has no lease though something is open that it may train."""
        return not self.coordinator.leases and not self.coordinator.complete

    def look_for_work(self) -> None:
        """Claim what the coordinator decides."""
        now = self.simulation.now
        if self.simulation.orphans and not self.coordinator.leases:
            self.simulation.hands(self)
        claim = self.coordinator.decide(now)
        if claim is None:
            return
        self.simulation.claimed(self, claim.shards)
        self.claimed_at = now
        shown_s = self.publish()
        for device in claim.ask[:2]:
            self.exchange_with(device)
        self.after(shown_s + SETTLE_S, self.confirm, claim.shards, now + shown_s)

    def confirm(self, claimed: tuple[ShardId, ...], shown_at: float) -> None:
        """Keep what is not contested."""
        self.observe(not_before=shown_at)
        kept = self.coordinator.confirm(self.simulation.now)
        self.simulation.outcome.yields += len(claimed) - len(kept)
        self.publish()
        if kept:
            self.simulation.leased(self, kept)
            self.prepare()

    def prepare(self) -> None:
        """Start to train as soon as the tensors are here."""
        if self.coordinator.state != "training" or self.job is not None:
            return
        plan = self.coordinator.job(self.held, self.simulation.now)
        if plan is not None:
            self.train(plan)
        elif self.coordinator.leases:
            if self.simulation.now > self.claimed_at + PREPARE_S:
                self.coordinator.abandoned(self.simulation.now)
                return
            self.fetch()
            if not self.preparing:
                self.preparing = True
                self.after(1.0, self.prepare_again)

    def prepare_again(self) -> None:
        """Look after a lease that waits for tensors."""
        self.preparing = False
        self.prepare()

    def train(self, plan: JobPlan) -> None:
        """Train one lease."""
        parents = [entry.tensors_digest for job in plan.shards for entry in job.parents]
        parents += [entry.tensors_digest for entry in plan.stem]
        if self.disk.rotten and self.disk.lacks(parents):
            # What the disk has lost is fetched again, for the next lease.
            self.coordinator.abandoned(self.simulation.now)
            return
        self.simulation.started(self, plan)
        self.job = plan
        self.job_since = self.simulation.now
        self.trainer_behind_s = 0.0
        self.after(self.simulation.training.duration_s(self, plan), self.finish, plan)

    @property
    def hung(self) -> bool:
        """Whether its trainer stands still for ever."""
        return self.plan.hangs_at is not None and self.simulation.now >= self.plan.hangs_at

    def may_train(self, shard: ShardId) -> bool:
        """Whether it was told to, and has anything to train on."""
        return any(self.plan.class_counts) and (
            shard == STEM or self.plan.tasks is None or shard in self.plan.tasks
        )

    def could_train(self) -> bool:
        """Whether something is open that this device may train, by what it knows."""
        if self.hung or self.still:
            return False
        spec, ledger = self.simulation.scenario.spec, self.coordinator.believed
        open_to = needs(spec, {shard: ledger.samples(shard) for shard in self.simulation.budget})
        return any(need and self.may_train(shard) for shard, need in open_to.items())

    def stop_training(self) -> None:
        """The trainer stands still."""
        self.simulation.stopped(self)
        self.job = None

    def discard(self, plan: JobPlan) -> None:
        """A lease has become useless: others have completed its shards."""
        self.simulation.discarded(self, plan)
        self.stop_training()
        self.coordinator.abandoned(self.simulation.now)

    def finish(self, plan: JobPlan) -> None:
        """Store what the lease made."""
        if self.job is not plan or self.hung:
            return
        late_s = max(self.trainer_behind_s, self.simulation.quiet_until - self.simulation.now)
        if late_s > 0.0:
            self.trainer_behind_s = 0.0
            self.after(late_s, self.finish, plan)
        elif self.coordinator.still_needed():
            made = self.simulation.trained_by(self, plan)
            self.storing = frozenset(entry.tensors_digest for entry in made)
            self.store(made, 0)
        else:
            self.discard(plan)
            self.observe()
            self.look_for_work()

    def store(self, made: tuple[Contribution, ...], index: int) -> None:
        """The shards one after the other, then what names them."""
        if index < len(made):
            self.disk.begin_shard(made[index].tensors_digest)
            self.write(self.shard_stored, made, index)
        else:
            self.disk.begin_entries(made)
            self.write(self.entries_stored, made)

    def write(self, then: Callable[..., None], *arguments: Any) -> None:
        """A durable write takes its time, and may be the last thing that this daemon does."""
        simulation = self.simulation
        self.writes += 1
        delay_s = simulation.scenario.write_s * simulation.rng.random()
        if self.writes == self.plan.killed_in_write:
            simulation.at(simulation.now + delay_s / 2, self.kill)
        if delay_s:
            self.after(delay_s, then, *arguments)
        else:
            then(*arguments)

    def shard_stored(self, made: tuple[Contribution, ...], index: int) -> None:
        """One of the shards is safe."""
        self.disk.end_shard(made[index].tensors_digest)
        self.store(made, index + 1)

    def entries_stored(self, made: tuple[Contribution, ...]) -> None:
        """The lease's work is safe: tell the others, and look for the next."""
        self.disk.end_entries()
        self.simulation.stored(self, made)
        self.storing = frozenset()
        parents = [] if self.job is None else [entry for job in self.job.shards for entry in job.parents]
        self.stop_training()
        self.receive(made)
        self.coordinator.finished(self.simulation.now)
        self.publish()
        content = (*parents, *made), self.record()
        for device in self.coordinator.hints(self.simulation.now):
            self.send(device, "push", content)
        self.observe()
        self.look_for_work()

    # --- gossip ---

    def receive(self, contributions: Sequence[Contribution]) -> None:
        """Take in contributions: first on the disk, then in the ledger."""
        before = self.coordinator.ledger
        new = self.coordinator.receive(contributions, self.simulation.now)
        if new:
            self.disk.put_entries(new)
            self.fetch_soon()
        self.simulation.received(self, before, contributions)

    def fetch_soon(self) -> None:
        """Look at once for tensors of what was heard, and when it is time to replicate it."""
        self.fetch()
        if not self.fetching_later:
            self.fetching_later = True
            self.after(
                SETTINGS.replication.replicate_after_s + FETCH_LOOK_S * self.simulation.rng.random(),
                self.fetch_later,
            )

    def fetch_later(self) -> None:
        """What was heard a while ago, and not superseded, is replicated."""
        self.fetching_later = False
        self.fetch()

    def gossip(self) -> None:
        """One round of anti-entropy. The next one begins when all have answered, or do not."""
        slow = False
        for device in self.coordinator.partners(self.simulation.now):
            slow = slow or not self.simulation.answers(self, self.simulation.by_id[device])
            self.exchange_with(device)
        pause_s = GOSSIP_S * (0.75 + 0.5 * self.simulation.rng.random())
        self.after(pause_s + (CALL_S if slow else 0.0), self.gossip)

    def exchange_with(self, device: DeviceId) -> None:
        """Compare ledgers with another device."""
        ledger = self.coordinator.ledger
        self.send(device, "exchange", (ledger.digest(), ledger.summary()))

    def fetch(self) -> None:
        """Ask for wanted tensors, one holder at a time each."""
        now = self.simulation.now
        wants = self.coordinator.wanted(self.held, now)
        if len(self.asked) > len(wants):
            wanted = {want.digest for want in wants}
            self.asked = {digest: asked for digest, asked in self.asked.items() if digest in wanted}
        for want in wants:
            asked_at, attempt = self.asked.get(want.digest, (-math.inf, 0))
            if now - asked_at >= FETCH_TIMEOUT_S and want.holders:
                self.asked[want.digest] = (now, attempt + 1)
                authors = self.coordinator.authors(want.shard, want.digest)
                holder = want.holders[attempt % len(want.holders)]
                self.send(holder, "fetch", (want.digest, want.shard, authors))

    def send(self, device: DeviceId, kind: str, content: Any) -> None:
        """Hand a message to the network."""
        self.simulation.send(self, self.simulation.by_id[device], kind, content)

    def deliver(self, sender: DeviceId, kind: str, content: Any) -> None:
        """A message has arrived."""
        if kind == "exchange":
            root, summary = content
            ledger: Ledger = self.coordinator.ledger
            if root != ledger.digest():
                self.send(sender, "entries", (ledger.newer_than(summary), ledger.older_than(summary)))
        elif kind == "entries":
            entries, asked = content
            self.receive(entries)
            mine = [entry for key in asked if (entry := self.coordinator.ledger.get(*key)) is not None]
            if mine:
                self.send(sender, "push", (tuple(mine), None))
        elif kind == "push":
            entries, record = content
            if record is not None:
                self.coordinator.hear([record], self.simulation.now)
            self.receive(entries)
        elif kind == "fetch":
            digest, shard, authors = content
            instead = self.give(digest, shard, authors)
            if instead is None:
                self.send(sender, "tensors", digest)
            else:
                self.send(sender, "refusal", (digest, instead))
        elif kind == "tensors":
            self.asked.pop(content, None)
            self.keep_tensors(content)
            self.look_again()
        elif kind == "refusal":
            digest, instead = content
            self.take_refusal(digest, sender, instead)
            asked_at, attempt = self.asked.get(digest, (0.0, 0))
            self.asked[digest] = (asked_at - FETCH_TIMEOUT_S, attempt)
            self.fetch()
            self.look_again()

    def give(
        self, digest: str, shard: ShardId, authors: Sequence[DeviceId]
    ) -> tuple[Contribution, ...] | None:
        """Give tensors (None), or say what is here of their authors instead."""
        if digest in self.held and self.disk.read_shard(digest):
            self.sent_bytes += self.simulation.sizes.get(digest, 0)
            return None
        held = self.held - self.disk.rotten
        instead = (self.coordinator.newest_here(shard, author, held) for author in authors)
        return tuple(entry for entry in instead if entry is not None)

    def take_refusal(self, digest: str, sender: DeviceId, instead: Sequence[Contribution]) -> None:
        """A device does not hold tensors, but perhaps what came before them."""
        for entry in instead:
            self.coordinator.offered(entry, self.held, self.simulation.now)
        self.coordinator.refused(digest, sender, self.simulation.now)

    def keep_tensors(self, digest: str) -> None:
        """Tensors have come: keep them, unless they do not count."""
        now = self.simulation.now
        entries = [
            entry for shard in self.simulation.budget for entry in self.coordinator.named(shard, digest)
        ]
        trials = [self.coordinator.trial(entry, self.held, now) for entry in entries]
        verdicts = [self.simulation.training.check(self, trial) for trial in trials]
        for entry, verdict in zip(entries, verdicts, strict=True):
            self.coordinator.judged(entry, verdict)
        if not verdicts or any(verdict is None or not verdict.malformed for verdict in verdicts):
            self.disk.put_shard(digest)
        self.vote()

    def vote(self) -> None:
        """Tell the others whom this device accuses since its last contribution."""
        unvoiced = self.coordinator.unvoiced
        if unvoiced is None:
            return
        again = self.simulation.training.sign_again(self, unvoiced)
        self.receive([again])
        for device in self.coordinator.hints(self.simulation.now):
            self.send(device, "push", ([again], None))

    def look_again(self) -> None:
        """The tensors that a lease waits for may be complete."""
        self.prepare()
