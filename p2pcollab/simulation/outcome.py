"""What a simulated run did, in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..run import DeviceId, ShardId


@dataclass(slots=True, kw_only=True)
class Takeover:
    """A lease whose holder died or hung, and what became of it; all times in seconds since then."""

    cause: str
    #: Until a device that may train the shard, and had no lease of its own, took the holder for dead; if it
    #: hung, until such a device looked.
    noticed_s: float | None = None
    #: Until another device held a lease on the shard.
    lease_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Healing:
    """What followed the end of a cut, in gossip rounds of 2 s since then."""

    #: Until every device had heard what any had known when the cut ended.
    heard_rounds: int | None = None
    #: Until all ledgers had one digest. Where leases end meanwhile, that means little.
    equal_rounds: int | None = None


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
    kills: int = 0
    stops: int = 0
    takeovers: list[Takeover] = field(default_factory=list)
    #: How often a device took another one for dead that was alive and shown by the board, and did not stand
    #: still for longer than a lease's term; only devices that stand still at all are looked for.
    false_alarms: int = 0
    #: Claims of a shard that such a device held.
    false_takeovers: int = 0
    healings: list[Healing] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    #: Samples by shard and device.
    visits: dict[ShardId, dict[DeviceId, int]] = field(default_factory=dict)
    #: SHA-256 over everything that happened: equal if and only if two runs did the same.
    digest: str = ""

    @property
    def busy(self) -> float:
        """Fraction of the devices' time that was spent training."""
        return self.training_s / self.alive_s if self.alive_s else 0.0

    @property
    def messages_per_device_second(self) -> float:
        """Messages of every kind, over all simulated device-seconds."""
        return sum(self.messages.values()) / self.alive_s

    @property
    def takeover_s(self) -> list[float]:
        """Seconds from each death to the new lease."""
        return [takeover.lease_s for takeover in self.takeovers if takeover.cause == "kill"]
