"""The checks of the invariants, each at the events that could break it; see `invariants.INVARIANTS`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ..coordinator import JobPlan
from ..holdings import STEMS_KEPT
from ..ledger import Contribution, Ledger
from ..run import STEM, DeviceId, ShardId
from .devices import BEAT_S, CALL_S, GOSSIP_S, Device
from .harvest import differing
from .invariants import Broken
from .network import BOARD_RPC_S, KEEPALIVE_S

if TYPE_CHECKING:
    from .simulator import Simulation

#: A device's readings and beats come with up to a tenth more than `BEAT_S` in between.
_PERIOD_S: Final = 1.1 * BEAT_S
#: A record may be this late on the board.
_PUBLISHING_S: Final = 0.3 + BOARD_RPC_S
#: How often every device is looked for in the eyes of every other one, and how often in a row it may be
#: missed: a beat that comes late through a slow board may cost a moment.
LOOK_S: Final = 10.0
_MISSED_MAX: Final = 3


class Checks:
    """What one run is held to."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        scenario = simulation.scenario
        #: What each device has truly trained and stored.
        self.trained: Counter[tuple[ShardId, DeviceId]] = Counter()
        self._generations: dict[tuple[ShardId, DeviceId, int], str] = {}
        self._missed: Counter[tuple[int, int]] = Counter()
        reading_s = scenario.staleness_s + BOARD_RPC_S
        #: For how long a dead device may count as alive: its last record comes late, is read late, and then
        #: the silence has to be noticed.
        self.expiry_s = scenario.settings.silence_s + _PUBLISHING_S + 2 * (_PERIOD_S + reading_s)
        #: Rounds in which news reaches everybody: ceil(log2 n) + 4.
        self.rounds = math.ceil(math.log2(max(2, len(scenario.devices)))) + 4

    def broken(self, invariant: str, what: str) -> Broken:
        """The error for an invariant that does not hold."""
        simulation = self._simulation
        where = f"scenario {simulation.scenario.name!r}, seed {simulation.seed}, t={simulation.now:.2f} s"
        return Broken(invariant, f"{what} [{where}]")

    # --- leases ---

    def may_start(self, device: Device, plan: JobPlan) -> None:
        """A lease begins."""
        budget = self._simulation.budget
        sealed = device.coordinator.believed.samples(STEM) >= budget[STEM]
        parents = {entry.tensors_digest for job in plan.shards for entry in job.parents}
        missing = (parents | {entry.tensors_digest for entry in plan.stem}) - device.held
        if missing:
            raise self.broken("tensors-at-hand", f"device {device.index} starts without tensors {missing}")
        for job in plan.shards:
            if not device.may_train(job.shard):
                raise self.broken("wishes-hold", f"device {device.index} trains {job.shard} against its wish")
            if job.shard != STEM and not sealed and job.samples + plan.samples > budget[STEM]:
                raise self.broken(
                    "gate-holds", f"{job.shard} passes the gate with {job.samples}+{plan.samples} samples"
                )

    def made(self, device: Device, plan: JobPlan, contributions: Iterable[Contribution]) -> None:
        """A lease has made these, and they are not stored yet."""
        for job, made in zip(plan.shards, contributions, strict=True):
            for other, count in made.seen:
                true = self.trained[job.shard, other]
                if other == device.id:
                    true += made.lease_samples
                    if count < true:
                        raise self.broken(
                            "counted-once", f"{job.shard} counts {count} of {true} samples of its maker"
                        )
                if count > true:
                    raise self.broken(
                        "counted-once", f"{job.shard} counts {count} of {true} samples of {other}"
                    )

    def stored(self, contributions: Iterable[Contribution]) -> None:
        """Contributions are on their maker's disk: from now on they count."""
        for entry in contributions:
            self.trained[entry.key] += entry.lease_samples
            name = (*entry.key, entry.generation)
            if self._generations.setdefault(name, entry.tensors_digest) != entry.tensors_digest:
                raise self.broken("told-apart", f"two contributions are {name}")

    # --- the ledger ---

    def received(self, device: Device, before: Ledger, contributions: Iterable[Contribution]) -> None:
        """Contributions have entered a ledger."""
        after = device.coordinator.ledger
        for entry in contributions:
            held = after.get(*entry.key)
            older = before.get(*entry.key)
            if held is None or held.version < entry.version or (older and held.version < older.version):
                raise self.broken(
                    "newer-stays", f"device {device.index} replaced newer by older at {entry.key}"
                )

    def heard_all(self, devices: Iterable[Device], known: Ledger, since: float) -> None:
        """These devices should have heard all of this by now."""
        for device in devices:
            ledger = device.coordinator.ledger
            if ledger.join(known) is not ledger:
                waited_s = self._simulation.now - since
                raise self.broken(
                    "ledgers-converge",
                    f"device {device.index} has not heard all {waited_s:.1f} s after healing",
                )

    @property
    def healing_s(self) -> float:
        """How long it may take after a cut until everybody has heard everything.

        The board's parts find each other, devices see one another there, and then come the rounds, in one of
        which a partner may not answer.
        """
        scenario = self._simulation.scenario
        seen_s = KEEPALIVE_S + _PUBLISHING_S + 2 * _PERIOD_S + scenario.staleness_s + BOARD_RPC_S
        return seen_s + self.spreading_s

    @property
    def spreading_s(self) -> float:
        """How long news may take to reach everybody."""
        return 1.25 * GOSSIP_S * self.rounds + CALL_S

    # --- who is alive ---

    def leases_expire(self, device: Device) -> None:
        """A device has read the board."""
        simulation = self._simulation
        live: tuple[DeviceId, ...] | None = None
        for dead, died_at in simulation.dead.items():
            since = max(died_at, device.started_at, device.stopped_until, simulation.links_changed_at)
            if simulation.scenario.straggling:
                since = max(since, min(simulation.now, died_at + simulation.scenario.straggle_s))
            if simulation.now - since <= self.expiry_s:
                continue
            if live is None:
                live = device.coordinator.live(simulation.now)
            if dead in live:
                raise self.broken(
                    "leases-expire",
                    f"device {device.index} counts {simulation.by_id[dead].index}, which died at "
                    f"{died_at:.2f} s, as alive",
                )

    def living_are_seen(self) -> None:
        """Look for every device in the eyes of every other one."""
        simulation = self._simulation
        links = simulation.links
        settled = [
            device
            for device in simulation.live()
            if not device.still and simulation.now - max(device.started_at, device.stopped_until) > LOOK_S
        ]
        missed: Counter[tuple[int, int]] = Counter()
        for device in settled:
            live = device.coordinator.live(simulation.now)
            for other in settled:
                if other.id not in live and links.hidden_since(other.index, device.index) is None:
                    pair = device.index, other.index
                    missed[pair] = self._missed[pair] + 1
                    if missed[pair] >= _MISSED_MAX:
                        raise self.broken(
                            "living-are-seen", f"device {device.index} takes {other.index} for dead"
                        )
        self._missed = missed

    # --- bounds and storage ---

    def memory_bounded(self, device: Device) -> None:
        """A device has collected its garbage."""
        simulation = self._simulation
        places = len(simulation.budget) * len(simulation.devices)
        # Besides those, the last states of the stem, to try branches on.
        tensors = 2 * places + STEMS_KEPT * len(simulation.devices)
        bounds = {"entries": places, "devices": len(simulation.devices), "tensors": tensors}
        kept = device.coordinator.remembered()
        # Of each place the newest contribution is known and the one before it; nothing else has a digest.
        bounds["digests"] = kept["entries"] + kept["replaced"]
        found = {
            **kept,
            "digests": max(kept["digests"], len(device.asked)),
            "tensors": len(device.held),
        }
        for name, bound in bounds.items():
            if found[name] > bound:
                raise self.broken(
                    "memory-bounded",
                    f"device {device.index} keeps {found[name]} {name}, at most {bound} are right",
                )

    def stored_before_named(self, device: Device) -> None:
        """A device has collected its garbage, or is about to start again on its disk."""
        disk = device.disk
        ledger = Ledger(disk.entries.values())
        for shard in self._simulation.budget:
            for entry in ledger.frontier(shard):
                if entry.device == device.id and entry.tensors_digest not in disk.shards | disk.lost:
                    raise self.broken(
                        "stored-before-named",
                        f"device {device.index} has lost its own newest tensors of {shard}",
                    )

    # --- the end ---

    def closed(self, known: Ledger) -> None:
        """The run is complete; `known` is what the live devices know together."""
        simulation = self._simulation
        live = {device.id: device for device in simulation.live()}
        for shard in simulation.budget:
            seen = known.seen(shard)
            for maker in simulation.ids:
                count, true = seen.get(maker, 0), self.trained[shard, maker]
                if count > true:
                    raise self.broken("counted-once", f"{shard} counts {count} of {true} samples of {maker}")
                if count < true and maker in live:
                    raise self.broken("nothing-lost", f"{shard} has {count} of {true} samples of {maker}")
            if not any(self._can_start(device, shard) for device in live.values()):
                raise self.broken("coverage-recovers", f"no live device has tensors of {shard} to go on from")

    @property
    def forgetting_s(self) -> float:
        """How long a dead device may count as alive, from now on: what shows it may be late, too."""
        scenario = self._simulation.scenario
        return self.expiry_s + (scenario.straggle_s if scenario.straggling else 0.0) + LOOK_S

    def models_equal(self) -> None:
        """The ledgers are equal, and nobody takes a dead device for alive."""
        for shard, states in differing(self._simulation).items():
            told = {self._simulation.by_id[device].index: names for device, names in states.items()}
            raise self.broken("models-equal", f"devices assemble {shard} of different tensors: {told}")

    def _can_start(self, device: Device, shard: ShardId) -> bool:
        """Whether a device will have a state of a shard once it has given up what nobody gives it.

        What has rotted on its disk counts for nothing, though it has not looked yet.
        """
        held = device.held - device.disk.rotten
        return bool(device.coordinator.assembled_of(shard, held))
