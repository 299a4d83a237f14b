"""A deterministic simulation of a run: real coordinators; fake clocks, network, board, disks and training.

Everything random comes from one seed: the same scenario and seed give the same events, which `Outcome.digest`
shows. A broken invariant raises `Broken` at the event that broke it, with its name, scenario, seed and time.

What a lease makes, and how long that takes, is the matter of a `Training`: pretended, with digests of
nothing, or real. Who holds which tensors is simulated. The devices do what the daemon does, in its order.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..allotment import needs
from ..coordinator import JobPlan
from ..ledger import Contribution, Ledger
from ..run import DeviceId, ShardId
from .checks import LOOK_S, Checks
from .devices import BAN_S, Device
from .healing import HealingWatch
from .network import Board, Links, Wire, may_call
from .outcome import Outcome, Takeover
from .scenarios import Scenario
from .training import PretendedTraining, Training


@dataclass(slots=True)
class _Orphan:
    """A shard whose holder died or hung in the middle of its lease."""

    holder: DeviceId
    since: float
    takeover: Takeover


class Simulation:
    """One run of one scenario with one seed."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        training: Training | None = None,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            training: what the devices do in their leases; pretended unless given.
            trace: told every event.
        """
        self.scenario = scenario
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.outcome = Outcome()
        self.training = training or PretendedTraining(scenario.spec, self.rng, len(scenario.devices))
        self.ids = list(self.training.devices)
        self.budget = {shard: scenario.spec.budget(shard) for shard in scenario.spec.shards}
        #: Bytes of tensors by their digest.
        self.sizes: dict[str, int] = {}
        self.devices = [Device(self, index) for index in range(len(scenario.devices))]
        self.by_id = {device.id: device for device in self.devices}
        self.links = Links(scenario, self.rng)
        self.links_changed_at = 0.0
        self.board = Board(self.links, len(self.devices))
        self.wire = Wire(scenario, self.rng, self.at)
        self.checks = Checks(self)
        #: Dead devices, and since when.
        self.dead: dict[DeviceId, float] = {}
        #: Until then, some node does not answer the board.
        self.silent_until = 0.0
        self.quiet_until = 0.0
        self.orphans: dict[ShardId, _Orphan] = {}
        self._stoppable = [device for device in self.devices if device.plan.stops]
        self._alarms: set[tuple[int, int]] = set()
        self._trace = trace
        self._log = hashlib.sha256()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._training: dict[DeviceId, JobPlan] = {}
        self._lull_since: float | None = None
        self._alive_since: dict[DeviceId, float] = {}
        self._awaited = len(self.devices)

    # --- events ---

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._queue, (time, next(self._order), action))

    def log(self, *event: object) -> None:
        """Note what happened."""
        line = f"{self.now!r} {event!r}\n"
        self._log.update(line.encode())
        if self._trace is not None:
            self._trace(line)

    def run(self) -> Outcome:
        """Run until every live device knows that the run is complete, and their ledgers are equal.

        Raises:
            Broken: an invariant does not hold.
        """
        for device in self.devices:
            self._plan(device)
        for time in self.links.changes():
            self.at(time, self._update_links)
        for cut in self.scenario.cuts:
            self.at(cut.end, self._healed)
        self.at(LOOK_S, self._look_around)
        self._run_until(self.complete, self.scenario.limit_s, "coverage-recovers", "the run is not complete")
        self._close()
        until = self.now + self.checks.spreading_s
        self._run_until(self.converged, until, "ledgers-converge", "the ledgers do not become equal")
        if self.scenario.compares_models:
            until = self.now + self.checks.forgetting_s
            self._run_until(self._see_each_other, until, "living-are-seen", "not all see who is there")
            self.checks.models_equal()
        self.outcome.digest = self._log.hexdigest()
        return self.outcome

    def _plan(self, device: Device) -> None:
        plan = device.plan
        self.at(plan.joins_at, lambda: self.join(device))
        if plan.killed_at is not None:
            self.at(plan.killed_at, device.kill)
        if plan.hangs_at is not None:
            self.at(plan.hangs_at, lambda: self._hung(device))
        for stop in plan.stops:
            self.at(stop.start, lambda stop=stop: device.stand_still(stop))  # type: ignore[misc]
        for time, clock_s in plan.clock_sets:
            self.at(time, lambda clock_s=clock_s: setattr(device, "clock_s", clock_s))  # type: ignore[misc]

    def _run_until(self, reached: Callable[[], bool], limit_s: float, invariant: str, otherwise: str) -> None:
        check_at = self.now
        while True:
            if self.now >= check_at:
                self._watch_lull()
                if reached():
                    return
                check_at = self.now + 0.5
            if self.now > limit_s or not self._queue:
                raise self.checks.broken(invariant, f"{otherwise}: {self._state()}")
            self.now, _, action = heapq.heappop(self._queue)
            action()

    def live(self) -> list[Device]:
        """Devices that are up."""
        return [device for device in self.devices if device.alive]

    def complete(self) -> bool:
        """Whether all devices have come, and all live ones know that the run is complete."""
        return (
            self._awaited == 0
            and all(self.now > cut.end for cut in self.scenario.cuts)
            and all(device.coordinator.complete and device.job is None for device in self.live())
        )

    def converged(self) -> bool:
        """Whether all live ledgers are equal."""
        return len({device.coordinator.ledger.digest() for device in self.live()}) == 1

    def _see_each_other(self) -> bool:
        """Whether everybody would ask all the others for tensors, and no dead device."""
        there = {device.id for device in self.live()}
        return all(there == set(device.coordinator.live(self.now)) for device in self.live())

    def known(self, devices: Iterable[Device]) -> Ledger:
        """What these devices know together."""
        ledger = Ledger()
        for device in devices:
            ledger = ledger.join(device.coordinator.ledger)
        return ledger

    def _state(self) -> str:
        best = self.known(self.live())
        shards = {shard: f"{best.samples(shard)}/{budget}" for shard, budget in self.budget.items()}
        leases = {
            device.index: (device.coordinator.state, device.coordinator.leases) for device in self.live()
        }
        return f"samples {shards}, leases {leases}"

    # --- network ---

    def _update_links(self) -> None:
        self.links.update(self.now)
        self.links_changed_at = self.now

    def send(self, sender: Device, receiver: Device, kind: str, content: Any) -> None:
        """Hand a message to the network."""
        self.outcome.messages[kind] += 1
        self.wire.carry(self.now, lambda: self._arrive(sender, receiver, kind, content))

    def _arrive(self, sender: Device, receiver: Device, kind: str, content: Any) -> None:
        if not self.links.open(sender.index, receiver.index):
            return
        if not receiver.alive or not may_call(sender.wall_s, receiver.wall_s):
            return
        self.log("message", kind, sender.index, receiver.index)
        receiver.after(0.0, receiver.deliver, sender.id, kind, content)

    def answers(self, asker: Device, device: Device) -> bool:
        """Whether a device would answer a call now."""
        return (
            device.alive
            and not device.still
            and self.links.open(asker.index, device.index)
            and self.links.open(device.index, asker.index)
        )

    def silent(self, device: Device, until: float) -> None:
        """A device does not answer until then."""
        self.log("still", device.index, until)
        self.outcome.stops += 1
        self.silent_until = max(self.silent_until, until)

    # --- lives ---

    def join(self, device: Device) -> None:
        """A device starts, for the first time or again, and looks for the others."""
        self._awaited -= 1
        self._alive_since[device.id] = self.now
        self.dead.pop(device.id, None)
        self.orphans = {shard: orphan for shard, orphan in self.orphans.items() if orphan.holder != device.id}
        self.links.set_found(device.index, False, self.now)
        # One that was here before remembers addresses, and tries them at once.
        discovery_s = self.scenario.discovery_s * self.rng.random()
        self.log("start", device.index, len(device.disk.entries), len(device.held))
        device.start()
        device.after(discovery_s, self._found, device)

    def _found(self, device: Device) -> None:
        self.links.set_found(device.index, True, self.now)
        self.links_changed_at = self.now

    def killed(self, device: Device) -> None:
        """A device was killed: its leases are to be taken over."""
        self.log("killed", device.index)
        self.outcome.kills += 1
        since = self._alive_since.pop(device.id)
        self.outcome.alive_s += self.now - since
        self.dead[device.id] = self.now
        if device.plan.power_cut:
            # A process that is killed has its connections closed by its system; they refuse at once.
            self.silent_until = max(self.silent_until, self.now + BAN_S)
        self.links.set_found(device.index, False, self.now)
        if device.plan.restarts_after_s is not None:
            self._awaited += 1
        if device.job is not None:
            plan = device.job
            self.stopped(device)
            self._orphan(device, plan, "hang" if device.hung else "kill")

    def _hung(self, device: Device) -> None:
        self.log("hung", device.index)
        if device.alive and device.job is not None:
            self._orphan(device, device.job, "hang")

    def _orphan(self, device: Device, plan: JobPlan, cause: str) -> None:
        held = {
            job.shard
            for other, running in self._training.items()
            if other != device.id and not self.by_id[other].hung
            for job in running.shards
        }
        for job in plan.shards:
            if job.shard not in held and job.shard not in self.orphans:
                self.orphans[job.shard] = _Orphan(device.id, self.now, Takeover(cause=cause))

    # --- what devices report ---

    def hands(self, device: Device) -> None:
        """A device has no lease and looks for one."""
        ledger = device.coordinator.believed
        open_to = needs(self.scenario.spec, {shard: ledger.samples(shard) for shard in self.budget})
        live = device.coordinator.live(self.now)
        for shard, orphan in list(self.orphans.items()):
            takeover = orphan.takeover
            if open_to[shard] == 0:
                # Complete by what others had made of it, or at the gate: nobody can take it over now.
                del self.orphans[shard]
            elif (
                takeover.noticed_s is None
                and device.may_train(shard)
                and (takeover.cause == "hang" or orphan.holder not in live)
            ):
                takeover.noticed_s = self.now - orphan.since

    def claimed(self, device: Device, shards: Iterable[ShardId]) -> None:
        """A device claims shards, by what it sees."""
        self.log("claim", device.index, shards)
        for other in self._falsely_dead(device, self.live()):
            if other.coordinator.state == "training" and not other.hung:
                self.outcome.false_takeovers += sum(shard in other.coordinator.leases for shard in shards)

    def observed(self, device: Device) -> None:
        """A device has read the board."""
        if self.dead:
            self.checks.leases_expire(device)
        alarms = {
            (device.index, other.index)
            for other in self._falsely_dead(device, self._stoppable)
            if other.alive
        }
        self.outcome.false_alarms += len(alarms - self._alarms)
        self._alarms = {pair for pair in self._alarms if pair[0] != device.index} | alarms

    def _falsely_dead(self, device: Device, others: Iterable[Device]) -> list[Device]:
        """Those of these devices that it takes for dead though they have not deserved it."""
        settled_at = self.now - self.checks.expiry_s
        if max(device.started_at, self.links_changed_at) > settled_at:
            return []  # it has not seen everybody yet
        live = {device.id, *device.coordinator.live(self.now)}
        return [
            other
            for other in others
            if other.id not in live
            and other.started_at <= settled_at
            and other.stop_s <= self.scenario.settings.lease_term_s
            and self.links.hidden_since(other.index, device.index) is None
        ]

    def leased(self, device: Device, shards: Iterable[ShardId]) -> None:
        """A device holds leases, and gets ready to train."""
        self.log("hold", device.index, shards)
        for shard in shards:
            orphan = self.orphans.pop(shard, None)
            # Where nobody had noticed, it is a second lease beside the first.
            if orphan is not None and orphan.takeover.noticed_s is not None:
                orphan.takeover.lease_s = self.now - orphan.since
                self.outcome.takeovers.append(orphan.takeover)

    def started(self, device: Device, plan: JobPlan) -> None:
        """A lease's training begins."""
        self.checks.may_start(device, plan)
        outcome = self.outcome
        outcome.leases += 1
        shards = [job.shard for job in plan.shards]
        self.log("lease", device.index, shards, plan.samples)
        trained = {job.shard for running in self._training.values() for job in running.shards}
        outcome.overlapping += plan.samples * sum(shard in trained for shard in shards)
        self._training[device.id] = plan

    def stopped(self, device: Device) -> None:
        """A device no longer trains."""
        self.outcome.training_s += self.now - device.job_since
        del self._training[device.id]

    def discarded(self, device: Device, plan: JobPlan) -> None:
        """A lease was stopped, because its shards are complete."""
        self.log("discarded", device.index)
        fraction = min(1.0, (self.now - device.job_since) / self.training.duration_s(device, plan))
        self.outcome.discarded += round(fraction * plan.samples)
        self.training.discard(device, plan, fraction)

    def trained_by(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        """What a lease has made."""
        contributions = self.training.train(device, plan)
        self.checks.made(device, plan, contributions)
        for made in contributions:
            self.outcome.samples += made.lease_samples
            self.sizes[made.tensors_digest] = made.tensors_bytes
        return contributions

    def stored(self, device: Device, contributions: Iterable[Contribution]) -> None:
        """What a lease has made is safe on the disk of its maker."""
        made = tuple(contributions)
        self.log("stored", device.index, [entry.tensors_digest for entry in made])
        self.checks.stored(made)

    def received(self, device: Device, before: Ledger, contributions: Iterable[Contribution]) -> None:
        """Contributions have come to a device."""
        self.checks.received(device, before, contributions)
        if device.coordinator.ledger is not before:
            self.log("heard", device.index, device.coordinator.ledger.digest().hex())

    # --- watching ---

    def _look_around(self) -> None:
        self.checks.living_are_seen()
        self.at(self.now + LOOK_S, self._look_around)

    def _watch_lull(self) -> None:
        """Note for how long nobody has trained although somebody could."""
        if any(not self.by_id[device].hung for device in self._training) or not any(
            device.could_train() for device in self.live()
        ):
            self._lull_since = None
        elif self._lull_since is None:
            self._lull_since = self.now
        else:
            self.outcome.longest_lull_s = max(self.outcome.longest_lull_s, self.now - self._lull_since)

    def _healed(self) -> None:
        """A cut has ended: what the devices know together must soon be known to each."""
        if self.now == max(cut.end for cut in self.scenario.cuts):
            self.quiet_until = self.now + self.scenario.quiet_s
        HealingWatch(self).begin()

    def _close(self) -> None:
        """The run is complete: the figures, and the promises about the whole."""
        outcome = self.outcome
        outcome.finished_at = self.now
        for since in self._alive_since.values():
            outcome.alive_s += self.now - since
        known = self.known(self.live())
        outcome.visits = {shard: dict(known.seen(shard)) for shard in self.budget}
        self.checks.closed(known)
