"""Claims: which contributions a device believes, of those that it has heard of.

What is heard goes into the ledger and is passed on, so that all ledgers become equal. What is *believed*
decides: what a lease starts from, how far a shard is, what an assembly is made of. Three things keep a
contribution that was heard from being believed.

It counts samples of another device that this device has not signed. `seen` says that a contribution
contains others' work, which takes their place and counts as progress, so nobody may claim more of a device
than that device has signed itself. A claim that runs ahead is *held back*, not counted: usually the
contribution that it was built on is still on its way, and lets it in when it arrives. It may never arrive,
because its maker and all who had heard of it are gone: then honest work would be shut out for good, with
all that was built on it. So after a while one lease more than what was signed is granted of a device that
is not there any more. A liar gains little by that: one lease of each device that is gone, once.

Its device equivocates: it has signed two contributions with one and the same count of its own samples. A
count is never used twice, so the two together are proof, to everybody, that their maker breaks the
protocol. Neither is believed, and nothing that it makes afterwards. The same goes for two counts with the
same tensors: training changes them.

Its tensors were looked at, and are malformed; or its device is outvoted (`trust`).
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from .ledger import Contribution, Key
from .run import DeviceId

Proof = tuple[Contribution, Contribution]
"""Two contributions of one device to one shard that an honest device cannot both have made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A contribution that is not believed, for people."""

    contribution: Contribution
    reason: str


@dataclass(slots=True)
class _HeldBack:
    contribution: Contribution
    since: float
    told: bool = False


def own_count(contribution: Contribution) -> int:
    """Samples of its author that a contribution stands for."""
    return dict(contribution.seen).get(contribution.device, 0)


def equivocation(one: Contribution, other: Contribution) -> bool:
    """Whether two contributions prove that their device breaks the protocol.

    Two with one count tell two stories. Two with different counts and equal tensors are one lease's work
    counted twice: even a lease that learns nothing counts its batches in the tensors. One and the same
    contribution again, which a device that has lost its memory may make, is neither.
    """
    same_tensors = one.tensors_digest == other.tensors_digest
    return one.key == other.key and same_tensors != (own_count(one) == own_count(other))


class Claims:
    """What this device thinks of the contributions that it has heard of."""

    def __init__(self, device: DeviceId, *, lease_samples_max: int, patience_s: float) -> None:
        """
        Args:
            device: this one, which believes itself.
            lease_samples_max: the longest lease of the run: what may be granted unsigned.
            patience_s: how long a claim that nobody has signed is held back before it is told of, or granted.
        """
        self._device = device
        self._lease_max = lease_samples_max
        self._patience_s = patience_s
        #: The greatest count of its own samples that each device has signed, by shard. Like all that follows,
        #: no larger than the ledger.
        self._signed: dict[Key, int] = {}
        #: Greatest counts that were granted to devices that are gone.
        self._granted: dict[Key, int] = {}
        self._held_back: dict[Key, _HeldBack] = {}
        self._proofs: dict[DeviceId, Proof] = {}
        #: Devices whose entries have left the ledger with what they had signed.
        self._forgotten: set[DeviceId] = set()
        self._refusals: list[Refusal] = []

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """Of each device that equivocates, what proves it."""
        return tuple(self._proofs.values())

    @property
    def held_back(self) -> tuple[Contribution, ...]:
        """Contributions that count samples which nobody has signed yet."""
        return tuple(held.contribution for held in self._held_back.values())

    def distrusts(self, device: DeviceId) -> bool:
        """Whether a device was caught equivocating."""
        return device in self._proofs

    def witness(self, one: Contribution, other: Contribution) -> bool:
        """Compare two contributions of one device; whether they prove, for the first time, that it lies."""
        if one.device == self._device or one.device in self._proofs or not equivocation(one, other):
            return False
        self._proofs[one.device] = (one, other)
        what = (
            f"the same count of {own_count(other)} samples"
            if own_count(one) == own_count(other)
            else "the same tensors"
        )
        reason = f"its device has signed another one with {what}"
        self._refusals.append(Refusal(contribution=other, reason=reason))
        return True

    def forget(self, devices: AbstractSet[DeviceId]) -> None:
        """Devices were shut out, and their entries dropped: what others have built on them still counts."""
        self._forgotten |= devices

    def hear(self, contribution: Contribution, now: float) -> None:
        """A contribution is new to this device's ledger. Whether it is believed, `settle` tells."""
        key = contribution.key
        self._signed[key] = max(self._signed.get(key, 0), own_count(contribution))
        self._held_back[key] = _HeldBack(contribution, now)

    def settle(self, live: AbstractSet[DeviceId], now: float) -> list[Contribution]:
        """Contributions that are to be believed from now on."""
        believed = []
        for key, held in list(self._held_back.items()):
            author = held.contribution.device
            if author in self._proofs:
                del self._held_back[key]
                reason = "its device was caught signing two contributions that cannot both be true"
                self._refusals.append(Refusal(contribution=held.contribution, reason=reason))
            elif author == self._device or self._allowed(held, live, now):
                del self._held_back[key]
                believed.append(held.contribution)
        return believed

    def _allowed(self, held: _HeldBack, live: AbstractSet[DeviceId], now: float) -> bool:
        shard = held.contribution.shard
        excess = [
            (other, count)
            for other, count in held.contribution.seen
            if other not in self._forgotten
            and count > max(self._signed.get((shard, other), 0), self._granted.get((shard, other), 0))
        ]
        if not excess or now - held.since <= self._patience_s:
            return not excess
        signed = {other: self._signed.get((shard, other), 0) for other, _ in excess}
        if all(other not in live and count <= signed[other] + self._lease_max for other, count in excess):
            self._granted.update({(shard, other): count for other, count in excess})
            return True
        if not held.told:
            held.told = True
            other, count = max(excess, key=lambda claim: claim[1] - signed[claim[0]])
            reason = f"it counts {count} samples of device {other[:8]}, which has signed {signed[other]}"
            self._refusals.append(Refusal(contribution=held.contribution, reason=reason))
        return False

    def take_refusals(self) -> tuple[Refusal, ...]:
        """What was found unbelievable since the last call."""
        taken = tuple(self._refusals)
        self._refusals.clear()
        return taken
