"""One simulated device: does what its coordinator decides, as the daemon does and in the same order."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..allotment import needs
from ..coordinator import Advert, Coordinator, CoordinatorSettings, JobPlan
from ..ledger import Contribution, Ledger
from ..run import STEM, DeviceId, ShardId

if TYPE_CHECKING:
    from .simulator import Simulation

BEAT_S = 2.0
GOSSIP_S = 2.0
#: Between publishing a claim and reading the board again.
SETTLE_S = 0.5
FETCH_S = 0.5
FETCH_TIMEOUT_S = 2.0
SETTINGS = CoordinatorSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRecord:
    """`presence.BoardRecord`, without a parser."""

    device: DeviceId
    beat: int
    state: str
    speed: float
    tasks: tuple[ShardId, ...] | None
    prefer: tuple[ShardId, ...]
    class_counts: tuple[int, ...]
    leases: tuple[ShardId, ...]
    lease_sequence: int
    progress: tuple[tuple[ShardId, int, int], ...]


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
        #: What survives SIGKILL.
        self.held: set[str] = set()
        self.stored = Ledger()
        self.job: JobPlan | None = None
        self.job_since = 0.0
        self.coordinator: Coordinator
        self.asked: dict[str, tuple[float, int]] = {}
        self.fetching = self.preparing = False
        #: Tensors given to other devices.
        self.sent_bytes = 0

    # --- life ---

    def start(self) -> None:
        """Come alive, for the first time or again."""
        simulation = self.simulation
        self.alive = True
        self.life += 1
        self.job = None
        self.asked.clear()
        self.fetching = self.preparing = False
        self.coordinator = Coordinator(
            simulation.scenario.spec,
            self.id,
            Advert(
                speed=self.plan.speed,
                class_counts=self.plan.class_counts,
                tasks=self.plan.tasks,
                prefer=self.plan.prefer,
            ),
            SETTINGS,
            random.Random(simulation.rng.random()),
            first_beat=int(simulation.now * 1000),
        )
        self.coordinator.receive(self.stored.entries.values(), simulation.now)
        self.after(simulation.rng.random() * 0.5, self.beat)
        self.after(simulation.rng.random() * GOSSIP_S, self.gossip)

    def kill(self) -> None:
        """SIGKILL: the disk keeps this device's own work, and most of what it has heard."""
        rng = self.simulation.rng
        self.stored = Ledger(
            entry
            for entry in self.coordinator.ledger.entries.values()
            if entry.device == self.id or rng.random() < 0.8
        )
        self.alive = False
        self.life += 1
        self.simulation.killed(self)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something later, if this life lasts."""
        life = self.life

        def act() -> None:
            if self.life == life and self.alive:
                action(*arguments)

        self.simulation.at(self.simulation.now + delay_s, act)

    # --- the board ---

    def publish(self) -> None:
        """Show this device's record."""
        fields = self.coordinator.record_fields()
        plan = self.plan
        self.simulation.board.publish(
            self.index,
            SimulatedRecord(
                device=self.id,
                beat=fields.beat,
                state=fields.state,
                speed=plan.speed,
                tasks=None if plan.tasks is None else tuple(sorted(plan.tasks)),
                prefer=tuple(sorted(plan.prefer)),
                class_counts=plan.class_counts,
                leases=fields.leases,
                lease_sequence=fields.lease_sequence,
                progress=fields.progress,
            ),
        )

    def observe(self) -> None:
        """Read the board."""
        self.coordinator.observe_board(self.simulation.board.read(self.index), self.simulation.now)

    def beat(self) -> None:
        """Publish, read, look for work, drop tensors that are no longer of use."""
        self.publish()
        self.observe()
        if self.job is not None and not self.coordinator.still_needed():
            self.simulation.discarded(self, self.job)
            self.stop_training()
            self.coordinator.abandoned(self.simulation.now)
        self.look_for_work()
        if self.simulation.rng.random() < 0.1:
            self.held &= self.coordinator.keep()
        self.fetch()
        self.after(BEAT_S, self.beat)

    # --- work ---

    def look_for_work(self) -> None:
        """Claim what the coordinator decides."""
        claim = self.coordinator.decide(self.simulation.now)
        if claim is None:
            return
        self.publish()
        for device in claim.ask[:2]:
            self.exchange_with(device)
        self.after(SETTLE_S, self.confirm, claim.shards)

    def confirm(self, claimed: tuple[ShardId, ...]) -> None:
        """Keep what is not contested."""
        self.observe()
        kept = self.coordinator.confirm(self.simulation.now)
        self.simulation.outcome.yields += len(claimed) - len(kept)
        self.publish()
        if kept:
            self.prepare()

    def prepare(self) -> None:
        """Start to train as soon as the tensors are here."""
        if self.coordinator.state != "training" or self.job is not None:
            return
        plan = self.coordinator.job(self.held, self.simulation.now)
        if plan is not None:
            self.train(plan)
        elif self.coordinator.leases:
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
        self.simulation.started(self, plan)
        self.job = plan
        self.job_since = self.simulation.now
        duration_s = self.simulation.training.duration_s(self, plan)
        if self.plan.hangs_at is None or self.simulation.now + duration_s < self.plan.hangs_at:
            self.after(duration_s, self.finish, plan)

    @property
    def hung(self) -> bool:
        """Whether its trainer stands still for ever."""
        return self.plan.hangs_at is not None and self.simulation.now >= self.plan.hangs_at

    def could_train(self) -> bool:
        """Whether something is open that this device may train, by what it knows."""
        spec, ledger = self.simulation.scenario.spec, self.coordinator.believed
        open_to = needs(spec, {shard: ledger.samples(shard) for shard in spec.shards})
        return not self.hung and any(
            need and (shard == STEM or self.plan.tasks is None or shard in self.plan.tasks)
            for shard, need in open_to.items()
        )

    def stop_training(self) -> None:
        """The trainer stands still."""
        self.simulation.stopped(self)
        self.job = None

    def finish(self, plan: JobPlan) -> None:
        """Publish what the lease made, and look for the next."""
        if self.job is not plan:
            return
        self.stop_training()
        contributions = self.simulation.trained_by(self, plan)
        self.held.update(entry.tensors_digest for entry in contributions)
        self.receive(contributions)
        self.coordinator.finished(self.simulation.now)
        for device in self.coordinator.hints(self.simulation.now):
            self.send(
                device, "push", [*(entry for job in plan.shards for entry in job.parents), *contributions]
            )
        self.publish()
        self.observe()
        self.look_for_work()

    # --- gossip ---

    def receive(self, contributions: Sequence[Contribution]) -> None:
        """Take in contributions."""
        before = self.coordinator.ledger
        self.coordinator.receive(contributions, self.simulation.now)
        self.simulation.received(self, before, contributions)

    def gossip(self) -> None:
        """One round of anti-entropy."""
        for device in self.coordinator.partners(self.simulation.now):
            self.exchange_with(device)
        self.after(GOSSIP_S, self.gossip)

    def exchange_with(self, device: DeviceId) -> None:
        """Compare ledgers with another device."""
        ledger = self.coordinator.ledger
        self.send(device, "exchange", (ledger.digest(), ledger.summary()))

    def fetch(self) -> None:
        """Ask for wanted tensors, one holder at a time each."""
        now = self.simulation.now
        wants = self.coordinator.wanted(self.held, now)
        for want in wants:
            asked_at, attempt = self.asked.get(want.digest, (-math.inf, 0))
            if now - asked_at >= FETCH_TIMEOUT_S and want.holders:
                self.asked[want.digest] = (now, attempt + 1)
                self.send(want.holders[attempt % len(want.holders)], "fetch", want.digest)
        if wants and not self.fetching:
            self.fetching = True
            self.after(FETCH_S, self.fetch_again)

    def fetch_again(self) -> None:
        """Look after outstanding fetches."""
        self.fetching = False
        self.fetch()

    def send(self, device: DeviceId, kind: str, content: Any) -> None:
        """Hand a message to the network."""
        self.simulation.send(self, self.simulation.by_id[device], kind, content)

    def deliver(self, sender: DeviceId, kind: str, content: Any) -> None:
        """A message has arrived."""
        if kind == "exchange":
            root, summary = content
            ledger = self.coordinator.ledger
            if root != ledger.digest():
                self.send(sender, "entries", (ledger.newer_than(summary), ledger.older_than(summary)))
        elif kind == "entries":
            entries, asked = content
            self.receive(entries)
            mine = [entry for key in asked if (entry := self.coordinator.ledger.get(*key)) is not None]
            if mine:
                self.send(sender, "push", mine)
        elif kind == "push":
            self.receive(content)
        elif kind == "fetch":
            if content in self.held:
                self.sent_bytes += self.simulation.sizes.get(content, 0)
            self.send(sender, "tensors" if content in self.held else "refusal", content)
        elif kind == "tensors":
            self.asked.pop(content, None)
            self.keep_tensors(content)
            self.look_again()
        elif kind == "refusal":
            self.coordinator.refused(content, sender, self.simulation.now)
            asked_at, attempt = self.asked.get(content, (0.0, 0))
            self.asked[content] = (asked_at - FETCH_TIMEOUT_S, attempt)
            self.fetch()
            self.look_again()

    def keep_tensors(self, digest: str) -> None:
        """Tensors have come: keep them, unless they are refused."""
        now = self.simulation.now
        entries = [
            entry
            for entry in self.coordinator.believed.entries.values()
            if entry.tensors_digest == digest and entry.device != self.id
        ]
        trials = [self.coordinator.trial(entry, self.held, now) for entry in entries]
        reasons = [self.simulation.training.check(self, trial) for trial in trials]
        for entry, reason in zip(entries, reasons, strict=True):
            if reason is not None:
                self.coordinator.refuse(entry)
        if not any(reasons):
            self.held.add(digest)

    def look_again(self) -> None:
        """The tensors that a lease waits for may be complete."""
        self.prepare()
