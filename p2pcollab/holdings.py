"""Holdings: which tensors a device needs, whom it asks for them, and which it must not throw away.

The ledger travels to everyone; tensors travel to those that need them. A device needs the tensors that its
next lease starts from, what it judges that by, every stem, and its quota of replicas: each contribution
that matters lives on a few devices, chosen by rendezvous hashing, so that all devices agree on them without a
word.

Tensors can be lost: their maker dies before anyone has fetched them. Then a lease starts from what came
before them, which those who have it tell the others. If they are not seen for long, the next contribution
declares them contained (their samples were trained, their effect is lost), or they would stay in the frontier
for ever.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from .ledger import Contribution, Key, Ledger, frontier_of, states_digest, supersedes
from .run import DeviceId, ShardId
from .trust import Work, work


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Tensors to fetch."""

    digest: str
    size: int
    shard: ShardId
    #: Whom to ask, in this order.
    holders: tuple[DeviceId, ...]
    #: A lease waits for it; otherwise it is a replica.
    needed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationSettings:
    """How tensors spread."""

    #: Devices that each contribution of the frontier lives on. Each costs one transfer per lease.
    replicas: int = 3
    #: Keep everything.
    replicate_all: bool = False
    #: Age at which a contribution is replicated, by devices that have an earlier state of that shard. Later
    #: saves the transfer of contributions that are superseded at once; what is lost with a device in between
    #: is at most its last lease.
    replicate_after_s: float = 2.0
    #: How long a lease waits for tensors that nobody gives and whose maker is not alive.
    patience_s: float = 8.0
    #: How long tensors that nobody gives may come back before they are declared contained.
    write_off_s: float = 60.0


#: States of the stem that a device remembers, and whose tensors it keeps where it has them: a branch is tried
#: on the one that it was trained on. A stem is small, and a branch arrives within a few leases.
STEMS_KEPT: Final = 6
#: States that are remembered of what others said they hold of one device's work on one shard. One would do if
#: the newest offer could always be had; another device may have offered more of it than it has by now.
OFFERS_MAX: Final = 3
#: How long what a lease starts from is not fetched for want of something to judge it by. A device that has
#: nothing to compare it with believes what is no worse than guessing.
REFERENCE_WAIT_S: Final = 2.0


def rendezvous(digest: str, devices: Iterable[DeviceId]) -> list[DeviceId]:
    """Devices by their weight for a digest: the first ones keep it (highest random weight)."""
    return sorted(devices, key=lambda device: hashlib.sha256(f"{digest}\0{device}".encode()).digest())


class Holdings:
    """What is known about tensors, besides the ledger."""

    def __init__(self, device: DeviceId, settings: ReplicationSettings) -> None:
        self._device = device
        self._settings = settings
        #: The contribution that each entry of the ledger replaced.
        self._replaced: dict[Key, Contribution] = {}
        #: Of each key what came last, or what was the newest held when garbage was last collected.
        self._here: dict[Key, Contribution] = {}
        #: Of keys whose newest tensors devices did not give, what they said they had instead, oldest first.
        self._offered: dict[Key, list[Contribution]] = {}
        self._noticed_at: dict[str, float] = {}
        self._missing_since: dict[str, float] = {}
        #: Since when tensors are asked for only to judge others by.
        self._sought_since: dict[str, float] = {}
        self._refused: dict[str, dict[DeviceId, float]] = {}
        #: Of each digest the live devices by their weight, and whether its quota of replicas names this one.
        self._ranked: dict[str, list[DeviceId]] = {}
        self._chosen: dict[str, bool] = {}
        self._ranked_among: frozenset[DeviceId] = frozenset()
        #: Frontiers of the stem, the newest last.
        self._stems: deque[tuple[Contribution, ...]] = deque(maxlen=STEMS_KEPT)

    def notice(self, contribution: Contribution, replaced: Contribution | None, now: float) -> None:
        """A contribution has entered the ledger, in the place of an older one if there was one."""
        self._noticed_at[contribution.tensors_digest] = now
        # One that was signed again, to name more liars, is no newer work.
        if replaced is not None and work(replaced) != work(contribution):
            self._drop_offers(contribution.key)
            earlier = self._replaced.get(replaced.key)
            if earlier is not None:
                self._forget(earlier.tensors_digest)
            self._replaced[replaced.key] = replaced

    def arrived(self, contribution: Contribution) -> None:
        """Tensors are here: several newer ones may be heard of before garbage is collected."""
        here = self._here.get(contribution.key)
        if here is None or here.version < contribution.version:
            self._here[contribution.key] = contribution

    def newest_here(self, ledger: Ledger, key: Key, held: AbstractSet[str]) -> Contribution | None:
        """The newest of a device's contributions to a shard whose tensors are here."""
        newest = ledger.get(*key)
        known = () if newest is None else (newest, *self._earlier(key))
        here = [entry for entry in known if entry.tensors_digest in held]
        return max(here, key=lambda entry: entry.version, default=None)

    def offer(
        self,
        ledger: Ledger,
        contribution: Contribution,
        held: AbstractSet[str],
        live: AbstractSet[DeviceId],
        now: float,
    ) -> bool:
        """Another device has this of a key whose newest tensors it could not give; whether that is news.

        A device that came late, or has restarted, knows only the newest of what the dead have made. Without
        this it would go on from less than the others do, and assemble another model.
        """
        newest = ledger.get(*contribution.key)
        if newest is None or not supersedes(newest, contribution):
            return False
        if work(contribution) in {work(entry) for entry in self._known(ledger, contribution.shard)}:
            return False
        offers = self._offered.setdefault(contribution.key, [])
        offers.append(contribution)
        offers.sort(key=lambda entry: entry.version)
        if len(offers) > OFFERS_MAX:
            lost = [
                entry
                for entry in offers
                if entry.tensors_digest not in held and not self._askable(entry.tensors_digest, live, now)
            ]
            self.withdraw((lost or offers)[0])
        return contribution in offers

    def _drop_offers(self, key: Key) -> None:
        for entry in self._offered.pop(key, ()):
            self._forget(entry.tensors_digest)

    def withdraw(self, contribution: Contribution) -> None:
        """What was offered is of no use."""
        offers = self._offered.get(contribution.key, [])
        if contribution in offers:
            offers.remove(contribution)
            self._forget(contribution.tensors_digest)

    def ask_again(self) -> None:
        """Believe no longer that devices lack what they lacked a while ago."""
        self._refused.clear()

    def _forget(self, digest: str) -> None:
        self._noticed_at.pop(digest, None)
        self._missing_since.pop(digest, None)
        self._sought_since.pop(digest, None)
        self._refused.pop(digest, None)
        self._ranked.pop(digest, None)
        self._chosen.pop(digest, None)

    def restore(self, contribution: Contribution) -> Contribution | None:
        """A contribution has left the ledger: the one that it had replaced."""
        self._forget(contribution.tensors_digest)
        self._here.pop(contribution.key, None)
        self._drop_offers(contribution.key)
        return self._replaced.pop(contribution.key, None)

    def remembered(self) -> tuple[int, int]:
        """Contributions that came before the newest, and the digests about which most is known."""
        since = max(len(self._noticed_at), len(self._missing_since), len(self._sought_since))
        earlier = len(self._replaced) + sum(map(len, self._offered.values()))
        return earlier, max(since, len(self._refused), len(self._ranked), len(self._chosen))

    def refuse(self, digest: str, device: DeviceId, now: float) -> None:
        """A device has answered that it does not hold a digest."""
        self._refused.setdefault(digest, {})[device] = now

    def _known(self, ledger: Ledger, shard: ShardId) -> list[Contribution]:
        known = {work(entry): entry for entry in ledger.of_shard(shard)}
        for entry in tuple(known.values()):
            for earlier in self._earlier(entry.key):
                known.setdefault(work(earlier), earlier)
        return list(known.values())

    def _earlier(self, key: Key) -> list[Contribution]:
        """What is known of a device's contributions to a shard besides the newest."""
        own = (self._replaced.get(key), self._here.get(key))
        return [*(entry for entry in own if entry is not None), *self._offered.get(key, ())]

    def without(
        self,
        ledger: Ledger,
        contribution: Contribution,
        held: AbstractSet[str],
        shunned: AbstractSet[Work] = frozenset(),
    ) -> tuple[Contribution, ...]:
        """What a shard could be merged of here if a contribution had never been made.

        So without what was built on it, which is better as a rule.
        """
        known = self._known(ledger, contribution.shard)
        return frontier_of(
            entry
            for entry in known
            if work(entry) != work(contribution)
            and entry.tensors_digest in held
            and work(entry) not in shunned
            and not supersedes(entry, contribution)
        )

    def notice_stem(self, frontier: tuple[Contribution, ...]) -> None:
        """The stem is merged of these now."""
        if frontier and (not self._stems or self._stems[-1] != frontier):
            self._stems.append(frontier)

    def stem(
        self, digest: str, held: AbstractSet[str], shunned: AbstractSet[Work] = frozenset()
    ) -> tuple[Contribution, ...] | None:
        """What the stem with this `states_digest` is merged of, if that is known, held and not refused.

        A frontier, or one contribution to it: others may have refused the rest, or not have heard of it. The
        initial stem only for as long as a device may still train on it that has not heard of better: later, a
        branch that is good on that one spoils those that are merged with it.
        """
        if digest == states_digest(()):
            newest = max((entry.generation for frontier in self._stems for entry in frontier), default=0)
            return () if newest < STEMS_KEPT else None
        for frontier in reversed(self._stems):
            for state in (frontier, *((entry,) for entry in frontier)):
                if states_digest(state) == digest:
                    usable = all(
                        entry.tensors_digest in held and work(entry) not in shunned for entry in state
                    )
                    return state if usable else None
        return None

    def references(
        self,
        ledger: Ledger,
        start: Sequence[Contribution],
        held: AbstractSet[str],
        live: AbstractSet[DeviceId],
        now: float,
        shunned: AbstractSet[Work] = frozenset(),
    ) -> tuple[Contribution, ...]:
        """What is missing here to judge a lease's start by: what a shard would be merged of without it.

        Nothing, if it cannot be had, or does not come within `REFERENCE_WAIT_S`.
        """
        missing = []
        for entry in start:
            if entry.device != self._device and entry.tensors_digest not in held:
                known = self._known(ledger, entry.shard)
                others = [one for one in known if one not in start and work(one) not in shunned]
                missing += [one for one in frontier_of(others) if one.tensors_digest not in held]
        return tuple(
            one
            for one in dict.fromkeys(missing)
            if self._askable(one.tensors_digest, live, now)
            and now - self._sought_since.setdefault(one.tensors_digest, now) < REFERENCE_WAIT_S
        )

    def named(self, ledger: Ledger, shard: ShardId, digest: str) -> list[Contribution]:
        """The contributions to a shard that are known to have these tensors."""
        return [entry for entry in self._known(ledger, shard) if entry.tensors_digest == digest]

    def start(
        self,
        ledger: Ledger,
        shard: ShardId,
        held: AbstractSet[str],
        live: AbstractSet[DeviceId],
        now: float,
        shunned: AbstractSet[Work] = frozenset(),
    ) -> tuple[Contribution, ...]:
        """What a shard can be merged of: its frontier, without what cannot be had or is not to be used."""
        return self._without(
            lambda entry: (
                work(entry) in shunned or (entry.tensors_digest not in held and self._lost(entry, live, now))
            ),
            ledger,
            shard,
        )

    def sought(
        self,
        ledger: Ledger,
        shard: ShardId,
        held: AbstractSet[str],
        live: AbstractSet[DeviceId],
        now: float,
    ) -> tuple[Contribution, ...]:
        """What a shard can be merged of if everybody is asked for it, however long that takes."""
        return self._without(
            lambda entry: (
                entry.tensors_digest not in held and not self._askable(entry.tensors_digest, live, now)
            ),
            ledger,
            shard,
        )

    def here(self, ledger: Ledger, shard: ShardId, held: AbstractSet[str]) -> tuple[Contribution, ...]:
        """What a shard can be merged of now."""
        return self._without(lambda entry: entry.tensors_digest not in held, ledger, shard)

    def _without(
        self, lost: Callable[[Contribution], bool], ledger: Ledger, shard: ShardId
    ) -> tuple[Contribution, ...]:
        """The frontier of a shard, with what came before where that is lost."""
        start = ledger.frontier(shard)
        known: list[Contribution] | None = None
        while True:
            gone = [entry for entry in start if lost(entry)]
            if not gone:
                return start
            if known is None:
                known = self._known(ledger, shard)
            known = [entry for entry in known if entry not in gone]
            start = frontier_of(known)

    def _lost(self, entry: Contribution, live: AbstractSet[DeviceId], now: float) -> bool:
        digest = entry.tensors_digest
        missing_s = now - self._missing_since.setdefault(digest, now)
        if missing_s > self._settings.write_off_s:
            return True
        if entry.device not in live and missing_s > self._settings.patience_s:
            return True
        return not self._askable(digest, live, now)

    def _askable(self, digest: str, live: AbstractSet[DeviceId], now: float) -> set[DeviceId]:
        """Live devices that have not refused a digest lately."""
        refused = self._refused.get(digest, {})
        since = now - self._settings.patience_s
        return {device for device in live if device != self._device and refused.get(device, -1e300) < since}

    def written_off(
        self, ledger: Ledger, shard: ShardId, held: AbstractSet[str], now: float
    ) -> tuple[Contribution, ...]:
        """Contributions of the frontier that have been missing for so long that they are given up."""
        return tuple(
            entry
            for entry in ledger.frontier(shard)
            if entry.tensors_digest not in held
            and now - self._missing_since.get(entry.tensors_digest, now) > self._settings.write_off_s
        )

    def want(
        self,
        entries: Iterable[Contribution],
        held: AbstractSet[str],
        live: AbstractSet[DeviceId],
        now: float,
        *,
        needed: bool,
    ) -> list[Want]:
        """Those of `entries` that are not held, each with the devices to ask."""
        return [
            Want(
                digest=entry.tensors_digest,
                size=entry.tensors_bytes,
                shard=entry.shard,
                holders=self._holders(entry, live, now),
                needed=needed,
            )
            for entry in entries
            if entry.tensors_digest not in held
        ]

    def _holders(self, entry: Contribution, live: AbstractSet[DeviceId], now: float) -> tuple[DeviceId, ...]:
        askable = self._askable(entry.tensors_digest, live, now)
        ranked = [device for device in self._rank(entry.tensors_digest, live) if device in askable]
        return tuple(sorted(ranked, key=lambda device: device != entry.device))

    def _rank_among(self, live: AbstractSet[DeviceId]) -> None:
        if live != self._ranked_among:
            self._ranked_among = frozenset(live)
            self._ranked.clear()
            self._chosen.clear()

    def _rank(self, digest: str, live: AbstractSet[DeviceId]) -> list[DeviceId]:
        self._rank_among(live)
        if digest not in self._ranked:
            self._ranked[digest] = rendezvous(digest, live)
        return self._ranked[digest]

    def quota(
        self,
        ledger: Ledger,
        shards: Sequence[ShardId],
        held: AbstractSet[str],
        live: AbstractSet[DeviceId],
        now: float,
    ) -> list[Contribution]:
        """Contributions of the frontiers that this device should keep a replica of.

        At once where it has nothing of a shard: a device may come back with all that was ever trained of it,
        and die.
        """
        mature = now - self._settings.replicate_after_s
        self._rank_among(live)
        chosen = []
        for shard in shards:
            for entry in ledger.frontier(shard):
                if self._noticed_at.get(entry.tensors_digest, now) <= mature or not any(
                    known.tensors_digest in held for known in self._known(ledger, shard)
                ):
                    in_quota = self._chosen.get(entry.tensors_digest)
                    if in_quota is None:
                        in_quota = self._chosen[entry.tensors_digest] = self._in_quota(entry, live)
                    if in_quota:
                        chosen.append(entry)
        return chosen

    def _in_quota(self, entry: Contribution, live: AbstractSet[DeviceId]) -> bool:
        if self._settings.replicate_all:
            return True
        replicas = self._settings.replicas - (entry.device in live)
        for device in self._rank(entry.tensors_digest, live):
            if replicas <= 0:
                break
            if device == self._device:
                return entry.device != device
            replicas -= device != entry.device
        return False

    def keep(self, ledger: Ledger, shards: Sequence[ShardId], held: AbstractSet[str]) -> set[str]:
        """Digests that must not be thrown away: of each shard the frontier, and what came before it.

        And the newest of what is held, however much was heard of since: the tensors of later work may die
        with their makers before they come.
        """
        kept: set[str] = set()
        newest_here: dict[Key, Contribution] = {}
        for shard in shards:
            frontier, known = ledger.frontier(shard), self._known(ledger, shard)
            before = frontier_of(entry for entry in known if entry not in frontier)
            here = frontier_of(entry for entry in known if entry.tensors_digest in held)
            newest_here.update({entry.key: entry for entry in here})
            kept.update(entry.tensors_digest for entry in (*frontier, *before, *here))
        self._here = newest_here
        kept.update(entry.tensors_digest for frontier in self._stems for entry in frontier)
        return kept
