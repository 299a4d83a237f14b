"""A run rehearsed in one process: simulated clock, network and board, and everything else as on the devices.

Coordinators decide, workshops train on each device's own data, contributions are signed, shards are encoded
as they travel, merged and assembled: what comes out is what a LAN would give, without its hours or its
devices. Time is simulated: a lease takes its MACs over the device's speed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from .. import cost
from ..coordinator import JobPlan
from ..data.partition import Share
from ..keys import Identity
from ..ledger import Contribution
from ..plans import Trial
from ..run import STEM, RunSpec, ShardId
from ..simulation import Device, DevicePlan, Scenario, Simulation, harvest
from ..trust import Verdict
from ..wire import encode_contribution, sign_again, sign_contribution
from .trainer import trial_fields
from .workshop import Workshop

#: Leases after which tensors that no device holds any more are thrown away.
_PRUNE_EVERY: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedDevice:
    """One device: how fast it is, and which part of the data it has."""

    #: Training MAC/s.
    speed: float
    #: `I/N`; None: everything.
    share: Share | None
    prefer: frozenset[ShardId] = frozenset()
    tasks: frozenset[ShardId] | None = None


@dataclass(slots=True, kw_only=True)
class DeviceTally:
    """What one device has spent."""

    macs: int = 0
    #: Samples offered to each shard.
    samples: dict[ShardId, int] = field(default_factory=dict)
    sent_bytes: int = 0
    #: Leases trained.
    leases: int = 0
    #: Contributions of others that it has tried, those that it refused, and the part of `macs` for it.
    tried: int = 0
    refused: int = 0
    tried_macs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A complete run."""

    #: The assembled model's file.
    model: bytes
    devices: tuple[DeviceTally, ...]
    #: Simulated seconds.
    seconds: float
    #: Samples of leases that came to nothing, in sum over shards.
    discarded: int


class Rehearsal:
    """Runs a spec on devices that are simulated but for their training; the simulation's `Training`."""

    def __init__(
        self,
        spec: RunSpec,
        devices: Sequence[RehearsedDevice],
        *,
        source: str,
        root: Path | None = None,
        limit: int | None = None,
        threads: int = 1,
        seed: int = 0,
        on_lease: Callable[[float], None] | None = None,
    ) -> None:
        """
        Args:
            source: of the data, as `--data` takes it.
            on_lease: told after each lease which part of the run is trained, 0..1.

        Raises:
            DataError: the data cannot be used.
        """
        self.spec = spec
        self._identities = [_identity(seed, index) for index in range(len(devices))]
        self.devices = tuple(identity.device for identity in self._identities)
        self._workshops: list[Workshop] = []
        plans = []
        for index, device in enumerate(devices):
            workshop = self._workshop(index)
            told = workshop.configure(
                {
                    "spec": spec.encode(),
                    "source": source,
                    "root": str(root) if root else None,
                    "share": str(device.share) if device.share else None,
                    "limit": limit,
                    "download": False,
                    "folder": ".",
                    "threads": threads,
                    "niceness": os.nice(0),
                    "duty": 1.0,
                    "judge_seed": seed * 1000 + index,
                }
            )
            self._workshops.append(workshop)
            plans.append(
                DevicePlan(
                    speed=device.speed,
                    class_counts=tuple(told["class_counts"]),
                    prefer=device.prefer,
                    tasks=device.tasks,
                )
            )
        self._spent = [DeviceTally() for _ in devices]
        self._blobs: dict[str, bytes] = {}
        self._seed = seed
        self._on_lease = on_lease
        self._budget = sum(spec.budget(shard) for shard in spec.shards)
        scenario = Scenario(
            name="rehearsal", devices=tuple(plans), spec=spec, limit_s=float("inf"), compares_models=False
        )
        self._simulation = self._simulate(scenario, seed)

    def _workshop(self, index: int) -> Workshop:
        """Where a device trains."""
        del index
        return Workshop()

    def _simulate(self, scenario: Scenario, seed: int) -> Simulation:
        """All but the training."""
        return Simulation(scenario, seed, self)

    def run(self) -> Rehearsed:
        """The run from its beginning to its end, and the model that its devices assemble.

        Raises:
            Broken: a promise of the protocol does not hold.
        """
        outcome = self._simulation.run()
        device = self._simulation.devices[0]
        model = self._workshops[0].assemble({"frontiers": _encoded(harvest(device))}, self._blobs)
        return Rehearsed(
            model=model["data"],
            devices=tuple(
                replace(spent, sent_bytes=device.sent_bytes)
                for spent, device in zip(self._spent, self._simulation.devices, strict=True)
            ),
            seconds=outcome.finished_at,
            discarded=outcome.discarded,
        )

    # The simulation's port

    def duration_s(self, device: Device, plan: JobPlan) -> float:
        """See `simulation.Training`."""
        return self._macs(device, plan) / device.plan.speed

    def train(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        """See `simulation.Training`."""
        spent = self._spent[device.index]
        if sum(one.leases for one in self._spent) % _PRUNE_EVERY == 0:
            self._prune(plan)
        frontiers: dict[ShardId, Sequence[Contribution]] = {job.shard: job.parents for job in plan.shards}
        frontiers.setdefault(STEM, plan.stem)
        fields = {
            "shards": [job.shard for job in plan.shards],
            "frontiers": _encoded(frontiers),
            "samples": plan.samples,
            "progress": {job.shard: job.progress for job in plan.shards},
            "seed": (self._seed * 1000 + device.index) * 100_000 + spent.leases,
        }
        outcome = self._workshops[device.index].train(fields, self._blobs, lambda _samples, _losses: True)
        spent.macs += outcome["macs"]
        spent.leases += 1
        made = []
        for job in plan.shards:
            spent.samples[job.shard] = spent.samples.get(job.shard, 0) + outcome["samples"]
            made.append(self._contribution(device, plan, job.shard, outcome))
        if self._on_lease is not None:
            done = sum(sum(one.samples.values()) for one in self._spent)
            self._on_lease(min(1.0, done / self._budget))
        return tuple(made)

    def check(self, device: Device, trial: Trial) -> Verdict | None:
        """See `simulation.Training`."""
        checked = self._workshops[device.index].check({"trials": [trial_fields(trial)]}, self._blobs)
        (told,) = checked["verdicts"]
        spent = self._spent[device.index]
        spent.macs += checked["macs"]
        spent.tried_macs += checked["macs"]
        spent.tried += 1
        spent.refused += told is not None
        return None if told is None else Verdict(**told)

    def sign_again(self, device: Device, contribution: Contribution) -> Contribution:
        """See `simulation.Training`."""
        return sign_again(self._identities[device.index], contribution, device.coordinator.accused)

    def discard(self, device: Device, plan: JobPlan, fraction: float) -> None:
        """See `simulation.Training`."""
        self._spent[device.index].macs += round(fraction * self._macs(device, plan))

    def _contribution(
        self, device: Device, plan: JobPlan, shard: ShardId, outcome: Mapping[str, Any]
    ) -> Contribution:
        job = next(job for job in plan.shards if job.shard == shard)
        trained = outcome["shards"][shard]
        digest = hashlib.sha256(trained["data"]).hexdigest()
        self._blobs[digest] = trained["data"]
        return sign_contribution(
            self._identities[device.index],
            run_id=self.spec.run_id,
            shard=shard,
            generation=job.generation,
            seen=job.seen(device.id, outcome["samples"]),
            lease_samples=outcome["samples"],
            stem_digest=plan.stem_digest,
            tensors_digest=digest,
            tensors_bytes=len(trained["data"]),
            loss=trained["loss"],
            accuracy=trained["accuracy"],
            distrusts=device.coordinator.accused,
        )

    def _macs(self, device: Device, plan: JobPlan) -> int:
        """MACs of a lease, without those of trying its result."""
        shards = [job.shard for job in plan.shards]
        labels = self._workshops[device.index].train_data.labels
        return round(plan.samples * cost.offered_macs(self.spec, shards, labels))

    def _prune(self, beginning: JobPlan) -> None:
        """Forget tensors that no device holds, is about to be given, or has begun its lease with."""
        devices = self._simulation.devices
        kept = {digest for device in devices for digest in device.held}
        for device in devices:
            kept.update(entry.tensors_digest for entry in device.coordinator.ledger.entries.values())
            kept.update(device.coordinator.keep(device.held))
        for plan in (beginning, *(device.job for device in devices)):
            if plan is not None:
                kept.update(entry.tensors_digest for entry in plan.stem)
                kept.update(entry.tensors_digest for job in plan.shards for entry in job.parents)
        self._blobs = {digest: data for digest, data in self._blobs.items() if digest in kept}


def _identity(seed: int, index: int) -> Identity:
    """The same in every rehearsal with this seed, so that it replays to the byte."""
    return Identity.from_bytes(hashlib.sha256(f"rehearsal/{seed}/{index}".encode()).digest())


def _encoded(frontiers: Mapping[ShardId, Sequence[Contribution]]) -> dict[str, list[bytes]]:
    return {shard: [encode_contribution(one) for one in some] for shard, some in frontiers.items()}
