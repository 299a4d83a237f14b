"""What one device believes of the ledger: which contributions it has heard of count, and which it builds on.

Four ledgers, each a part of the one before:

    heard    all of them: what gossip makes equal on all devices
    holding  those whose claims hold and whose tensors are not malformed
    counted  those without what outvoted devices have made: leases start from them, assemblies are made of it
    built_on those without the branches of devices that this one alone accuses

Time comes in as an argument. One belief belongs to one coordinator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from . import limits
from .claims import Claims, Proof, Refusal
from .holdings import Holdings
from .ledger import Contribution, Ledger
from .run import STEM, DeviceId, RunSpec, ShardId
from .trust import Opinions, Verdict, Work, accused, is_household, outvoted

__all__ = ["Belief"]


class Belief:
    """What a device has heard, what of it counts, and what it thinks of those who made it.

    Args:
        spec: of the run.
        device: this one. Its own work always counts for it, or it would use a count twice.
        holdings: where tensors are; told of what counts and what does not.
        patience_s: for how long a claim that nobody has signed is held back (`claims.Claims`).
    """

    def __init__(self, spec: RunSpec, device: DeviceId, holdings: Holdings, patience_s: float) -> None:
        self._spec = spec
        self._device = device
        self._shards = spec.shards
        self._run_id = spec.run_id
        self._holdings = holdings
        self.heard = Ledger()
        self.holding = Ledger()
        self.counted = Ledger()
        self.built_on = Ledger()
        self._opinions = Opinions()
        self._outvoted: frozenset[DeviceId] = frozenset()
        self._suspended: deque[Refusal] = deque(maxlen=limits.REFUSALS_SHOWN_MAX)
        self._claims = Claims(
            device,
            # A lease ends on a whole batch.
            lease_samples_max=spec.schedule.lease_samples + spec.schedule.batch_size,
            patience_s=patience_s,
        )

    # --- what is heard ---

    def receive(
        self, contributions: Iterable[Contribution], live: AbstractSet[DeviceId], now: float
    ) -> tuple[Contribution, ...]:
        """Take in contributions whose signatures were verified.

        Returns:
            Those that were new.
        """
        new: dict[tuple[ShardId, DeviceId], Contribution] = {}
        for contribution in contributions:
            if contribution.run_id != self._run_id or contribution.shard not in self._shards:
                continue
            held = new.get(contribution.key) or self.heard.get(*contribution.key)
            if held is not None:
                self.convict((held, contribution))
            if held is None or contribution.newer_than(held):
                self._claims.hear(contribution, now)
                self._opinions.heard(contribution, now)
                new[contribution.key] = contribution
        self.heard = self.heard.add_all(new.values())
        if self._outvoted or any(entry.distrusts for entry in new.values()):
            self._outvoted = outvoted(self.heard)
        self.settle(live, now)
        return tuple(new.values())

    def settle(self, live: AbstractSet[DeviceId], now: float) -> None:
        """Let in what was held back and is not any more."""
        settled = self._claims.settle(frozenset(live), now)
        for contribution in settled:
            held = self.holding.get(*contribution.key)
            if held is None or contribution.newer_than(held):
                self._holdings.notice(contribution, held, now)
            if self.distrusts(contribution.device):
                reason = self._opinions.reason(contribution.device) or "other devices distrust its device"
                self._suspended.append(Refusal(contribution=contribution, reason=reason))
        self.holding = self.holding.add_all(settled)
        self._count()

    def forget(self, devices: Collection[DeviceId]) -> None:
        """These devices' contributions leave all ledgers; what others have built on them stays."""
        gone = [entry for entry in self.heard.entries.values() if entry.device in devices]
        self.heard = self.heard.without_devices(frozenset(devices))
        self.holding = self.holding.without_devices(frozenset(devices))
        for entry in gone:
            self._holdings.restore(entry)
        self._claims.forget(frozenset(devices))
        self._outvoted = outvoted(self.heard) if self._outvoted else self._outvoted
        self._count()

    # --- what is thought of it ---

    def judged(self, contribution: Contribution, verdict: Verdict | None, *, fair: bool) -> None:
        """A contribution's tensors were tried.

        What is malformed does not count any more; what is only refused is not built on here. It stays in
        the ledger, so that nobody brings it again.

        Args:
            contribution: that was tried.
            verdict: None: it was not worth trying.
            fair: whether this device may hold a refusal against its maker (`trust.can_tell`).
        """
        accused_before = self._opinions.accused
        samples = sum(count for _, count in contribution.seen)
        progress = samples / self._spec.budget(contribution.shard)
        at_home = is_household(self.heard)
        caught = self._opinions.judge(contribution, verdict, progress=progress, fair=fair, at_home=at_home)
        if verdict is not None and verdict.malformed:
            self._disbelieve([contribution])
        else:
            self._holdings.arrived(contribution)
        if caught:
            reason = f"its device is distrusted: {self._opinions.reason(contribution.device)}"
            self._suspended.append(Refusal(contribution=contribution, reason=reason))
        if self._opinions.accused != accused_before:
            self._count()

    def convict(self, proof: Proof) -> bool:
        """Look at what is said to prove that a device lies; whether that is so, and news."""
        if not self._claims.witness(*proof):
            return False
        self._disbelieve(proof)
        return True

    def distrusts(self, device: DeviceId) -> bool:
        """Whether this device does not rely on another one: it was caught, here or by several others."""
        return device != self._device and (
            self._claims.distrusts(device) or device in self._outvoted or device in self._opinions.distrusted
        )

    @property
    def accused(self) -> tuple[DeviceId, ...]:
        """Devices that this one has caught lying or suspects of it, to be named in its contributions."""
        return accused(self._opinions.accused)

    @property
    def doubted(self) -> AbstractSet[DeviceId]:
        """Devices that are suspected, of which more is to be known before they are accused."""
        return self._opinions.doubted - self._outvoted

    @property
    def shunned(self) -> AbstractSet[Work]:
        """Single contributions that were refused (`trust.work`): they count, and are not built on here."""
        return self._opinions.shunned

    @property
    def unvoiced(self) -> Contribution | None:
        """The newest contribution of this device, if it accuses somebody whom none of them names.

        Signed again with `accused`, it tells the others without waiting for a lease. At the end of a run
        there is none, and the last lie would stay.
        """
        own = [entry for shard in self._shards if (entry := self.heard.get(shard, self._device))]
        if not own or set(self.accused) <= {device for entry in own for device in entry.distrusts}:
            return None
        return max(own, key=lambda entry: (entry.generation, entry.shard))

    @property
    def opinions(self) -> dict[str, Any]:
        """What this device has refused and whom it distrusts, to be kept over a restart."""
        return self._opinions.to_json()

    def restore_opinions(self, kept: object) -> None:
        """Take back `opinions` of an earlier life."""
        self._opinions.restore(kept)
        self._count()

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """What proves that devices equivocate: to be passed on to all, and kept."""
        return self._claims.proofs

    def take_refusals(self) -> tuple[Refusal, ...]:
        """Contributions that were found not to count since the last call, for people."""
        told = (*self._claims.take_refusals(), *self._suspended)
        self._suspended.clear()
        return told

    def _count(self) -> None:
        """What counts now, and what of it is built on."""
        out = self._outvoted - {self._device}
        self.counted = self.holding.without_devices(out) if out else self.holding
        self._holdings.notice_stem(self.counted.frontier(STEM))
        accused = self._opinions.accused - out
        self.built_on = self.counted
        if accused:
            # Stems are refused one by one: each brings the head that it is tried with. Without one that all
            # others use, this device's branches would fit nobody's stem and spoil what they are merged with.
            branches = self.counted.without_devices(accused)
            self.built_on = branches.add_all(self.counted.of_shard(STEM))

    def _disbelieve(self, contributions: Iterable[Contribution]) -> None:
        """These no longer count. What they had claimed to contain counts again."""
        for entry in contributions:
            if self.holding.get(*entry.key) == entry:
                earlier = self._holdings.restore(entry)
                self.holding = self.holding.without(entry)
                if earlier is not None:
                    self.holding = self.holding.add(earlier)
            self._holdings.withdraw(entry)
        self._count()
