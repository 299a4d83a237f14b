"""What goes into and comes out of the coordinator, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from .holdings import ReplicationSettings
from .ledger import Contribution, next_generation, successor_seen
from .run import DeviceId, ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """The knobs of one device; devices of a run may differ in them."""

    #: A device that stands still for less keeps its leases. Shorter: work is taken over sooner. Longer: fewer
    #: false alarms.
    lease_term_s: float = 3.0
    #: How often devices show a new beat.
    beat_s: float = 2.0
    #: Devices to exchange ledgers with in a round. Each costs one message pair per round; the rounds that
    #: news needs shrink with its logarithm.
    gossip_fanout: int = 2
    replication: ReplicationSettings = field(default_factory=ReplicationSettings)

    @property
    def silence_s(self) -> float:
        """A device is taken for dead when its beat has not been seen to rise for this long.

        The lease's term and two beats: a device can stand still just before its next beat is due, and the
        board may take most of another beat to show what it is given.
        """
        return self.lease_term_s + 2 * self.beat_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    """What this device has to offer."""

    #: Dense-equivalent training MAC/s times the budget share, > 0.
    speed: float
    #: Training examples per class of the run.
    class_counts: tuple[int, ...]
    #: Train only these class tasks; None: all.
    tasks: frozenset[ShardId] | None = None
    prefer: frozenset[ShardId] = frozenset()
    #: False: observe only, or paused.
    works: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Shards that this device wants to train; to be shown on the board."""

    shards: tuple[ShardId, ...]
    sequence: int
    #: Devices whose records promise newer contributions to these shards or the stem: exchange ledgers with
    #: them before the job is asked for.
    ask: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard of a lease: what to start from, and what to call the result."""

    shard: ShardId
    #: Merge these; the initial tensors if there are none. All are held.
    parents: tuple[Contribution, ...]
    #: Contributions that the result stands for though their tensors are lost.
    written_off: tuple[Contribution, ...]
    #: Samples seen so far, and their part of the budget, 0..1: where the learning rate goes on.
    samples: int
    progress: float

    @property
    def generation(self) -> int:
        """Generation of the result."""
        return next_generation((*self.parents, *self.written_off))

    def seen(self, device: DeviceId, samples: int) -> tuple[tuple[DeviceId, int], ...]:
        """`seen` of the result, if `device` has trained `samples` (at least 1)."""
        return successor_seen((*self.parents, *self.written_off), device, samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What the trainer should do in this lease."""

    shards: tuple[ShardJob, ...]
    #: Samples to train on each shard.
    samples: int
    #: The stem to compute features with: merge these. Empty if the job is the stem, or nobody trained it.
    stem: tuple[Contribution, ...]
    #: `stem_digest` of the contributions to come.
    stem_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A contribution whose tensors are here, and what to compare them with (`judging`)."""

    contribution: Contribution
    #: What the shard would be merged of without it; the initial tensors if there is none. All are held.
    reference: tuple[Contribution, ...]
    #: The stem to try a branch on, likewise.
    stem: tuple[Contribution, ...]
    #: Generations that it is behind the reference, at least 0.
    behind: int
    #: Training examples per class that its author says it has; None: unknown.
    class_counts: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFields:
    """What the coordinator puts into this device's record; the rest is the daemon's."""

    beat: int
    state: str
    leases: tuple[ShardId, ...]
    lease_sequence: int
    progress: tuple[tuple[ShardId, int, int], ...]
