"""What simulated devices do in their leases."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from ..coordinator import JobPlan
from ..ledger import Contribution
from ..plans import Trial
from ..run import STEM, DeviceId, RunSpec, ShardId
from ..trust import Verdict

if TYPE_CHECKING:
    from .devices import Device


Price = Callable[[Sequence[ShardId]], float]
"""Units that an offered sample costs in a lease on these shards."""


def _usual_price(shards: Sequence[ShardId]) -> float:
    return 3.0 if STEM in shards else 1.0 + len(shards)


class Training(Protocol):
    """The port through which the simulation trains."""

    @property
    def devices(self) -> Sequence[DeviceId]:
        """The devices' ids, in the order of the scenario's devices."""

    def duration_s(self, device: Device, plan: JobPlan) -> float:
        """Simulated seconds that a lease takes."""

    def train(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        """A lease's contributions, in the order of the plan's shards; called when the lease ends."""

    def check(self, device: Device, trial: Trial) -> Verdict | None:
        """What is wrong with tensors that a device was given; None: nothing."""

    def sign_again(self, device: Device, contribution: Contribution) -> Contribution:
        """A device's contribution, naming all whom it accuses now."""

    def discard(self, device: Device, plan: JobPlan, fraction: float) -> None:
        """A lease was stopped after this fraction of it, and came to nothing."""


class PretendedTraining:
    """Takes its time and makes digests of nothing: for tests of the protocol.

    A device's speed is in units per second, and what a sample costs is up to `price`.
    """

    def __init__(self, spec: RunSpec, rng: random.Random, devices: int, price: Price | None = None) -> None:
        """
        Args:
            price: None: 3 units on the stem, and 1 plus 1 per branch in a bundle.
        """
        self._price = price or _usual_price
        self._run_id = spec.run_id
        self._rng = rng
        self.devices = tuple(DeviceId(f"{rng.getrandbits(128):032x}") for _ in range(devices))

    def duration_s(self, device: Device, plan: JobPlan) -> float:
        """See `Training`."""
        return plan.samples * self._price([job.shard for job in plan.shards]) / device.plan.speed

    def train(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        """See `Training`."""
        return tuple(
            Contribution(
                run_id=self._run_id,
                shard=job.shard,
                device=device.id,
                public_key=b"",
                generation=job.generation,
                seen=job.seen(device.id, plan.samples),
                lease_samples=plan.samples,
                stem_digest=plan.stem_digest,
                tensors_digest=f"{self._rng.getrandbits(256):064x}",
                tensors_bytes=1,
                loss=0.0,
                accuracy=0.0,
                signature=b"",
            )
            for job in plan.shards
        )

    def check(self, device: Device, trial: Trial) -> Verdict | None:
        """See `Training`: digests of nothing are not looked at."""
        del device, trial
        return None

    def sign_again(self, device: Device, contribution: Contribution) -> Contribution:
        """See `Training`."""
        return replace(contribution, distrusts=device.coordinator.accused)

    def discard(self, device: Device, plan: JobPlan, fraction: float) -> None:
        """See `Training`."""
