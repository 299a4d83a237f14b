"""A deterministic simulation of a run: real coordinators, fake clock, network, board, tensors and training.

Everything random comes from one seed; the same scenario and seed give the same events. A broken promise
raises `Broken` at the event that broke it, with scenario, seed and time.

What a lease makes, and how long that takes, is the matter of a `Training`: pretended, with digests of
nothing, or real. Who holds which tensors is simulated. The devices do what the daemon does, in its order.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..coordinator import JobPlan
from ..ledger import Contribution, Ledger
from ..run import STEM, DeviceId, ShardId
from .devices import BEAT_S, GOSSIP_S, Device, SimulatedRecord
from .scenarios import Scenario
from .training import PretendedTraining, Training

RECORD_TTL_S = 30.0


class Broken(AssertionError):
    """A promise that does not hold."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run did; all times in simulated seconds."""

    finished_at: float = 0.0
    #: Device-seconds alive and able to work until the run was complete, and those of them spent training.
    alive_s: float = 0.0
    training_s: float = 0.0
    #: Longest time in which nobody trained although somebody could.
    longest_lull_s: float = 0.0
    #: Samples trained, in sum over shards, and those of them that were thrown away.
    samples: int = 0
    discarded: int = 0
    #: Samples of leases that began while another device trained the same shard.
    overlapping: int = 0
    leases: int = 0
    yields: int = 0
    takeover_s: list[float] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    #: Samples by shard and device.
    visits: dict[ShardId, dict[DeviceId, int]] = field(default_factory=dict)
    device_seconds: float = 0.0

    @property
    def busy(self) -> float:
        """Fraction of the devices' time that was spent training."""
        return self.training_s / self.alive_s if self.alive_s else 0.0

    @property
    def messages_per_device_second(self) -> float:
        """Messages of every kind, over all simulated device-seconds."""
        return sum(self.messages.values()) / self.device_seconds


class Board:
    """A notice board with expiry, stale readings, and two halves when the network is parted."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._published: dict[int, list[tuple[float, SimulatedRecord]]] = {}

    def publish(self, index: int, record: SimulatedRecord) -> None:
        """Show a record; earlier ones may still be read for a while."""
        history = self._published.setdefault(index, [])
        history.append((self._simulation.now, record))
        if len(history) > 8:
            del history[0]

    def read(self, reader: int) -> list[SimulatedRecord]:
        """The records of all devices as `reader` finds them, its own included."""
        simulation = self._simulation
        now = simulation.now
        seen_until = now - simulation.rng.random() * simulation.scenario.staleness_s
        parted_at = simulation.parted_at()
        records = []
        for index, history in self._published.items():
            limit = seen_until if simulation.connected(reader, index) else min(seen_until, parted_at)
            for published_at, record in reversed(history):
                if published_at <= limit:
                    if now - published_at < RECORD_TTL_S:
                        records.append(record)
                    break
        return records


class Simulation:
    """One run of one scenario with one seed."""

    def __init__(self, scenario: Scenario, seed: int, training: Training | None = None) -> None:
        """
        Args:
            training: what the devices do in their leases; pretended unless given.
        """
        self.scenario = scenario
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.outcome = Outcome()
        self.board = Board(self)
        self.training = training or PretendedTraining(scenario.spec, self.rng, len(scenario.devices))
        self.ids = list(self.training.devices)
        #: Bytes of tensors by their digest.
        self.sizes: dict[str, int] = {}
        self.devices = [Device(self, index) for index in range(len(scenario.devices))]
        self.by_id = {device.id: device for device in self.devices}
        #: What each device has truly trained and published.
        self.trained: Counter[tuple[ShardId, DeviceId]] = Counter()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._training: dict[DeviceId, JobPlan] = {}
        self._lull_since: float | None = None
        self._alive_since: dict[DeviceId, float] = {}
        self._orphaned: dict[ShardId, float] = {}
        self._budget = {shard: scenario.spec.budget(shard) for shard in scenario.spec.shards}

    # --- events ---

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._queue, (time, next(self._order), action))

    def run(self) -> Outcome:
        """Run until every live device knows that the run is complete, and their ledgers are equal.

        Raises:
            Broken: a promise does not hold.
        """
        for device in self.devices:
            plan = device.plan
            self.at(plan.joins_at, lambda device=device: self._join(device))  # type: ignore[misc]
            if plan.killed_at is not None:
                self.at(plan.killed_at, device.kill)
            if plan.restarts_at is not None:
                self.at(plan.restarts_at, lambda device=device: self._join(device))  # type: ignore[misc]
        if self.scenario.partition is not None:
            self.at(self.scenario.partition.end, self._check_healing)
        self._run_until(self.complete, self.scenario.limit_s, "the run is not complete")
        self._close()
        self._run_until(self.converged, self.now + self.rounds_s, "the ledgers do not converge")
        return self.outcome

    def _run_until(self, reached: Callable[[], bool], limit_s: float, otherwise: str) -> None:
        check_at = self.now
        while True:
            if self.now >= check_at:
                self._watch_lull()
                if reached():
                    return
                check_at = self.now + 0.5
            if self.now > limit_s or not self._queue:
                raise self.broken(f"{otherwise}: {self._state()}")
            self.now, _, action = heapq.heappop(self._queue)
            action()

    @property
    def rounds_s(self) -> float:
        """Time that news may take to reach everybody: ceil(log2 n) + 4 rounds."""
        return GOSSIP_S * (math.ceil(math.log2(max(2, len(self.devices)))) + 4)

    def live(self) -> list[Device]:
        """Devices that are up."""
        return [device for device in self.devices if device.alive]

    def complete(self) -> bool:
        """Whether all devices have come, and all live ones know that the run is complete."""
        last = max(max(plan.joins_at, plan.restarts_at or 0.0) for plan in self.scenario.devices)
        partition = self.scenario.partition
        return (
            self.now > last
            and (partition is None or self.now > partition.end)
            and all(device.coordinator.complete and device.job is None for device in self.live())
        )

    def converged(self) -> bool:
        """Whether all live ledgers are equal."""
        return len({device.coordinator.ledger.digest() for device in self.live()}) == 1

    def broken(self, what: str) -> Broken:
        """The error for a promise that does not hold."""
        return Broken(f"{what} [scenario {self.scenario.name!r}, seed {self.seed}, t={self.now:.2f} s]")

    def _state(self) -> str:
        best = Ledger()
        for device in self.live():
            best = best.join(device.coordinator.ledger)
        shards = {shard: f"{best.samples(shard)}/{budget}" for shard, budget in self._budget.items()}
        leases = {
            device.index: (device.coordinator.state, device.coordinator.leases) for device in self.live()
        }
        return f"samples {shards}, leases {leases}"

    # --- network ---

    def connected(self, one: int, other: int) -> bool:
        """Whether two devices reach each other now."""
        partition = self.scenario.partition
        if partition is None or not partition.start <= self.now < partition.end:
            return True
        return (one in partition.side) == (other in partition.side)

    def parted_at(self) -> float:
        """What was published after this has not crossed the partition that is on."""
        return self.scenario.partition.start if self.scenario.partition else math.inf

    def send(self, sender: Device, receiver: Device, kind: str, content: Any) -> None:
        """Lose, delay, duplicate or deliver a message."""
        self.outcome.messages[kind] += 1
        rng, scenario = self.rng, self.scenario
        for _ in range(2 if rng.random() < scenario.duplication else 1):
            if rng.random() >= scenario.loss:
                low, high = scenario.latency_s
                self.at(
                    self.now + low + (high - low) * rng.random(),
                    lambda: self._arrive(sender, receiver, kind, content),
                )

    def _arrive(self, sender: Device, receiver: Device, kind: str, content: Any) -> None:
        if receiver.alive and self.connected(sender.index, receiver.index):
            receiver.deliver(sender.id, kind, content)

    # --- what devices report, and the promises ---

    def _join(self, device: Device) -> None:
        self._alive_since[device.id] = self.now
        device.start()

    def killed(self, device: Device) -> None:
        """A device was killed: its leases are to be taken over."""
        since = self._alive_since.pop(device.id)
        self.outcome.alive_s += self.now - since
        self.outcome.device_seconds += self.now - since
        if device.job is not None:
            self.stopped(device)
            for job in device.job.shards:
                if not any(job.shard in self._shards_of(plan) for plan in self._training.values()):
                    self._orphaned[job.shard] = self.now

    @staticmethod
    def _shards_of(plan: JobPlan) -> Iterable[ShardId]:
        return (job.shard for job in plan.shards)

    def started(self, device: Device, plan: JobPlan) -> None:
        """A lease begins."""
        outcome = self.outcome
        outcome.leases += 1
        sealed = device.coordinator.believed.samples(STEM) >= self._budget[STEM]
        missing = {entry.tensors_digest for job in plan.shards for entry in job.parents} - device.held
        if missing or not {entry.tensors_digest for entry in plan.stem} <= device.held:
            raise self.broken(f"device {device.index} starts without tensors {missing}")
        for job in plan.shards:
            shard = job.shard
            if shard != STEM and device.plan.tasks is not None and shard not in device.plan.tasks:
                raise self.broken(f"device {device.index} trains {shard} against its wish")
            if shard != STEM and not sealed and job.samples + plan.samples > self._budget[STEM]:
                raise self.broken(f"{shard} passes the gate with {job.samples}+{plan.samples} samples")
            if any(shard in self._shards_of(other) for other in self._training.values()):
                outcome.overlapping += plan.samples
            orphaned_at = self._orphaned.pop(shard, None)
            if orphaned_at is not None:
                outcome.takeover_s.append(self.now - orphaned_at)
        self._training[device.id] = plan

    def stopped(self, device: Device) -> None:
        """A device no longer trains."""
        self.outcome.training_s += self.now - device.job_since
        del self._training[device.id]

    def _watch_lull(self) -> None:
        """Note for how long nobody has trained although somebody could."""
        if any(not device.hung and device.job is not None for device in self.devices) or not any(
            device.could_train() for device in self.live()
        ):
            self._lull_since = None
        elif self._lull_since is None:
            self._lull_since = self.now
        else:
            self.outcome.longest_lull_s = max(self.outcome.longest_lull_s, self.now - self._lull_since)

    def discarded(self, device: Device, plan: JobPlan) -> None:
        """A lease was stopped, because its shards are complete."""
        fraction = min(1.0, (self.now - device.job_since) / self.training.duration_s(device, plan))
        self.outcome.discarded += round(fraction * plan.samples)
        self.training.discard(device, plan, fraction)

    def trained_by(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        """What a lease has made."""
        contributions = self.training.train(device, plan)
        for job, made in zip(plan.shards, contributions, strict=True):
            samples = made.lease_samples
            self.trained[job.shard, device.id] += samples
            self.outcome.samples += samples
            self.sizes[made.tensors_digest] = made.tensors_bytes
            for other, count in made.seen:
                if count > self.trained[job.shard, other]:
                    raise self.broken(
                        f"{job.shard} counts {count} of {self.trained[job.shard, other]} samples of {other}"
                    )
            if dict(made.seen)[device.id] != self.trained[job.shard, device.id]:
                raise self.broken(f"{job.shard} does not count all samples of its maker")
        return contributions

    def received(self, device: Device, before: Ledger, contributions: Iterable[Contribution]) -> None:
        """Contributions have entered a ledger."""
        after = device.coordinator.ledger
        for entry in contributions:
            held = after.get(*entry.key)
            older = before.get(*entry.key)
            if held is None or held.version < entry.version or (older and held.version < older.version):
                raise self.broken(f"device {device.index} replaced newer by older at {entry.key}")

    def _check_healing(self) -> None:
        before = [(device, device.life, device.coordinator.ledger) for device in self.live()]

        def check() -> None:
            survivors = [(device, ledger) for device, life, ledger in before if device.life == life]
            known = Ledger()
            for _, ledger in survivors:
                known = known.join(ledger)
            for device, _ in survivors:
                ledger = device.coordinator.ledger
                if ledger.join(known) is not ledger:
                    raise self.broken(
                        f"device {device.index} has not heard all {self.rounds_s} s after healing"
                    )

        # The devices must first see one another on the board again.
        self.at(self.now + self.rounds_s + BEAT_S + self.scenario.staleness_s, check)

    def _close(self) -> None:
        """The run is complete: the figures, and the promises about the whole."""
        outcome = self.outcome
        outcome.finished_at = self.now
        for since in self._alive_since.values():
            outcome.alive_s += self.now - since
            outcome.device_seconds += self.now - since
        known = Ledger()
        for device in self.live():
            known = known.join(device.coordinator.ledger)
        outcome.visits = {shard: dict(known.seen(shard)) for shard in self._budget}
        for shard, visits in outcome.visits.items():
            for other, count in visits.items():
                if count > self.trained[shard, other]:
                    raise self.broken(f"{shard} counts {count} samples of {other}, which trained fewer")
