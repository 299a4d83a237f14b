"""The ledger: which device made which contribution to which shard, and what has been built on what.

It is a join-semilattice. Each (shard, device) keeps that device's newest contribution; joining two ledgers
takes the newer of each, which is commutative, associative and idempotent, so devices may exchange entries in
any order, any number of times, and end equal.

`seen` of a contribution is a version vector in samples: {device: samples which that device has given to the
state that this contribution stands for}. Only a device itself ever raises its own count, and each of its
contributions is built on its previous one. Hence `seen` tells whether one contribution contains another, and
the pointwise maximum over several counts no sample twice.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from .run import DeviceId, RunId, RunSpec, ShardId

Key = tuple[ShardId, DeviceId]
"""Place of an entry in the ledger."""
Mark = tuple[int, bytes]
"""What a summary tells of an entry: its generation, and 8 bytes that tell it from others."""

MARK_BYTES: Final = 8
NOTHING_MERGED: Final = "initial"
"""Digest of a shard that nobody has trained: every device computes its tensors from the run spec."""
#: A contribution that is more generations behind the newest has no vote where three or more are merged: three
#: stragglers must not outvote the one that is in front. Its weight is under an eighth anyway.
VOTE_STALENESS_MAX: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one device made of one shard in one lease: the signed header; the tensors travel apart."""

    run_id: RunId
    shard: ShardId
    device: DeviceId
    #: Ed25519, 32 bytes.
    public_key: bytes
    #: One more than the newest of the contributions that it was built on; the initial state is 0.
    generation: int
    #: Samples by device, this lease included; sorted by device, counts >= 1.
    seen: tuple[tuple[DeviceId, int], ...]
    #: Samples of this lease: its weight.
    lease_samples: int
    #: `states_digest` of the stem that it was trained on; empty for the stem itself.
    stem_digest: str
    #: SHA-256 of the shard's bytes, 64 hexadecimal digits.
    tensors_digest: str
    tensors_bytes: int
    #: Mean training loss of the lease's last tenth.
    loss: float
    #: On the device's own validation data, 0..1; 0 if unknown.
    accuracy: float
    #: Devices that its maker has caught lying (`trust`), sorted.
    distrusts: tuple[DeviceId, ...] = ()
    #: Ed25519, 64 bytes.
    signature: bytes

    @property
    def key(self) -> Key:
        """Its place in the ledger."""
        return self.shard, self.device

    @property
    def version(self) -> tuple[int, int, str, int, bytes]:
        """Total order of the contributions of one device to one shard; the greatest is the newest.

        The number of those that it distrusts decides where a device has signed one again to name more. The
        digest and the signature decide only between contributions of a device that equivocates: the
        ledgers then still converge.
        """
        samples = sum(count for _, count in self.seen)
        return self.generation, samples, self.tensors_digest, len(self.distrusts), self.signature

    def newer_than(self, other: Contribution) -> bool:
        """Whether it takes the other's place; both are of one device and shard."""
        if self.generation != other.generation:
            return self.generation > other.generation
        return self is not other and self.version > other.version

    @property
    def mark(self) -> Mark:
        """What a summary tells of it."""
        generation, samples, digest, _, signature = self.version
        data = struct.pack(">QQ", generation, samples) + digest.encode() + signature
        return generation, hashlib.sha256(data).digest()[:MARK_BYTES]


class _Entries:
    """The newest contributions to one shard, with what follows from them, computed once."""

    __slots__ = ("_frontier", "_generation", "_marks", "_root", "_samples", "_seen", "by_device")

    def __init__(self, by_device: dict[DeviceId, Contribution]) -> None:
        self.by_device = by_device
        self._frontier: tuple[Contribution, ...] | None = None
        self._marks: dict[DeviceId, Mark] | None = None
        self._root: bytes | None = None
        self._seen: dict[DeviceId, int] | None = None
        self._samples: int | None = None
        self._generation: int | None = None

    def frontier(self) -> tuple[Contribution, ...]:
        if self._frontier is None:
            self._frontier = frontier_of(self.by_device.values())
        return self._frontier

    def marks(self) -> dict[DeviceId, Mark]:
        if self._marks is None:
            self._marks = {device: entry.mark for device, entry in self.by_device.items()}
        return self._marks

    def root(self, shard: ShardId) -> bytes:
        if self._root is None:
            digest = hashlib.sha256(shard.encode() + b"\0")
            marks = self.marks()
            for device in sorted(marks):
                generation, distinct = marks[device]
                digest.update(device.encode() + b"\0" + struct.pack(">Q", generation) + distinct)
            self._root = digest.digest()
        return self._root

    def seen(self) -> dict[DeviceId, int]:
        if self._seen is None:
            self._seen = joined_seen(self.frontier())
        return self._seen

    def samples(self) -> int:
        if self._samples is None:
            self._samples = sum(self.seen().values())
        return self._samples

    def generation(self) -> int:
        if self._generation is None:
            self._generation = max((entry.generation for entry in self.frontier()), default=0)
        return self._generation


_NONE: Final = _Entries({})


class Ledger:
    """An immutable map (shard, device) -> newest contribution. Operations return new ledgers.

    A new ledger shares all shards that did not change with the one it was made from.
    """

    __slots__ = ("_root", "_shards", "_summary")

    def __init__(self, contributions: Iterable[Contribution] = ()) -> None:
        self._shards: dict[ShardId, _Entries] = {}
        self._root: bytes | None = None
        self._summary: Mapping[Key, Mark] | None = None
        self._shards = self.add_all(contributions)._shards

    def add(self, contribution: Contribution) -> Ledger:
        """With one contribution more, unless a newer one of the same device is here."""
        return self.add_all((contribution,))

    def add_all(self, contributions: Iterable[Contribution]) -> Ledger:
        """With several contributions more; this very ledger if none is new."""
        changed: dict[ShardId, dict[DeviceId, Contribution]] = {}
        for contribution in contributions:
            shard, device = contribution.key
            here = changed.get(shard)
            if here is None:
                here = self._shards.get(shard, _NONE).by_device
            held = here.get(device)
            if held is None or contribution.newer_than(held):
                changed.setdefault(shard, dict(here))[device] = contribution
        if not changed:
            return self
        ledger = Ledger()
        ledger._shards = {**self._shards, **{shard: _Entries(entries) for shard, entries in changed.items()}}
        return ledger

    def without_devices(self, devices: AbstractSet[DeviceId]) -> Ledger:
        """Without all that some devices have made."""
        return Ledger(entry for entry in self.entries.values() if entry.device not in devices)

    def without(self, contribution: Contribution) -> Ledger:
        """Without one contribution. Nothing but a refusal may take an entry away: peers bring it back."""
        return Ledger(entry for entry in self.entries.values() if entry != contribution)

    def join(self, other: Ledger) -> Ledger:
        """The newer of each entry: commutative, associative, idempotent."""
        return self.add_all(other.entries.values())

    @property
    def entries(self) -> Mapping[Key, Contribution]:
        """All entries, sorted by shard and device."""
        return {
            (shard, device): entries.by_device[device]
            for shard, entries in sorted(self._shards.items())
            for device in sorted(entries.by_device)
        }

    def get(self, shard: ShardId, device: DeviceId) -> Contribution | None:
        """A device's newest contribution to a shard."""
        return self._shards.get(shard, _NONE).by_device.get(device)

    def of_shard(self, shard: ShardId) -> tuple[Contribution, ...]:
        """Every device's newest contribution to a shard, in device order."""
        entries = self._shards.get(shard, _NONE).by_device
        return tuple(entries[device] for device in sorted(entries))

    def __len__(self) -> int:
        return sum(len(entries.by_device) for entries in self._shards.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> bytes:
        """SHA-256 over all entries: equal ledgers, and only those, have equal digests."""
        if self._root is None:
            roots = (entries.root(shard) for shard, entries in sorted(self._shards.items()))
            self._root = hashlib.sha256(b"".join(roots)).digest()
        return self._root

    def frontier(self, shard: ShardId) -> tuple[Contribution, ...]:
        """The contributions that no other one contains, in device order: what is merged."""
        return self._shards.get(shard, _NONE).frontier()

    def seen(self, shard: ShardId) -> Mapping[DeviceId, int]:
        """Samples that each device has given to a shard."""
        return self._shards.get(shard, _NONE).seen()

    visits = seen

    def samples(self, shard: ShardId) -> int:
        """Samples that a shard has seen, none counted twice."""
        return self._shards.get(shard, _NONE).samples()

    def generation(self, shard: ShardId) -> int:
        """The newest generation of a shard; 0 if nobody has trained it."""
        return self._shards.get(shard, _NONE).generation()

    def progress(self, shard: ShardId, spec: RunSpec) -> float:
        """Samples seen over the shard's budget, 0..1."""
        return min(1.0, self.samples(shard) / spec.budget(shard))

    def complete(self, spec: RunSpec) -> bool:
        """Whether every shard of the run has seen its budget."""
        return all(self.samples(shard) >= spec.budget(shard) for shard in spec.shards)

    def summary(self) -> Mapping[Key, Mark]:
        """A mark for each entry: enough for a peer to tell which of its entries are newer."""
        if self._summary is None:
            self._summary = {
                (shard, device): mark
                for shard, entries in self._shards.items()
                for device, mark in entries.marks().items()
            }
        return self._summary

    def newer_than(self, summary: Mapping[Key, Mark]) -> tuple[Contribution, ...]:
        """Entries that the author of `summary` lacks or has older.

        Where generations are equal but marks differ (equivocation), both sides send theirs, and joining
        decides.
        """
        mine = self.summary()
        newer = [key for key, mark in mine.items() if not _covers(summary.get(key), mark)]
        return tuple(self._shards[shard].by_device[device] for shard, device in sorted(newer))

    def older_than(self, summary: Mapping[Key, Mark]) -> tuple[Key, ...]:
        """Places at which the author of `summary` has an entry that is missing or older here."""
        mine = self.summary()
        return tuple(sorted(key for key, mark in summary.items() if not _covers(mine.get(key), mark)))


def _covers(held: Mark | None, other: Mark) -> bool:
    return held is not None and (held == other or held[0] > other[0])


def supersedes(newer: Contribution, older: Contribution) -> bool:
    """Whether `newer` contains all that `older` stands for.

    Two contributions with equal `seen` can only be made by a device that breaks the protocol; then exactly
    one of them gives way, so that no shard loses its state.
    """
    return _contains(dict(newer.seen), newer, older)


def _contains(counts: Mapping[DeviceId, int], newer: Contribution, older: Contribution) -> bool:
    for device, count in older.seen:
        if counts.get(device, 0) < count:
            return False
    return newer.seen != older.seen or (newer.version, newer.device) > (older.version, older.device)


def frontier_of(contributions: Iterable[Contribution]) -> tuple[Contribution, ...]:
    """Those contributions to one shard that no other of them contains, in device order."""
    pool = [(dict(entry.seen), entry) for entry in contributions]
    pool.sort(key=lambda pair: sum(pair[0].values()), reverse=True)
    frontier: list[tuple[dict[DeviceId, int], Contribution]] = []
    for counts, entry in pool:
        if not any(_contains(others, other, entry) for others, other in frontier):
            # Only an equal `seen`, which has an equal sum, can still replace what is in.
            frontier = [pair for pair in frontier if not _contains(counts, entry, pair[1])]
            frontier.append((counts, entry))
    return tuple(sorted((entry for _, entry in frontier), key=lambda entry: (entry.device, entry.version)))


def joined_seen(contributions: Iterable[Contribution]) -> dict[DeviceId, int]:
    """Pointwise maximum of `seen`."""
    joined: dict[DeviceId, int] = {}
    for contribution in contributions:
        for device, count in contribution.seen:
            if count > joined.get(device, 0):
                joined[device] = count
    return joined


def next_generation(parents: Iterable[Contribution]) -> int:
    """Generation of a contribution that is built on `parents`."""
    return 1 + max((parent.generation for parent in parents), default=0)


def successor_seen(
    parents: Iterable[Contribution], device: DeviceId, samples: int
) -> tuple[tuple[DeviceId, int], ...]:
    """`seen` of a contribution of `device` that adds `samples` (at least 1) to `parents`."""
    assert samples >= 1
    seen = joined_seen(parents)
    seen[device] = seen.get(device, 0) + samples
    return tuple(sorted(seen.items()))


def states_digest(frontier: Sequence[Contribution]) -> str:
    """Name of the state merged of `frontier`: equal names, equal tensors to the bit.

    Returns:
        64 hexadecimal digits, or `NOTHING_MERGED` for the initial state.
    """
    if not frontier:
        return NOTHING_MERGED
    ordered = sorted(frontier, key=lambda entry: (entry.device, entry.version))
    # The weights of the mean follow from lease_samples and generation, so these belong to the name.
    names = (f"{entry.tensors_digest}:{entry.lease_samples}:{entry.generation}" for entry in ordered)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
