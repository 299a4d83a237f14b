"""What comes into the ledger: contributions of peers, of the store, and of this device's own leases.

All of them are verified here, stored, and entered. What is refused is told of once; who is caught with two
stories is kept in mind over restarts, and the proof is passed on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from .. import limits
from ..errors import PeerError
from ..ledger import Contribution, Key
from ..run import DeviceId
from ..screen import reason_to_refuse
from ..wire import decode_contribution, encode_contribution
from .renewal import Renewal
from .session import Bell, Session

log = structlog.get_logger()

#: Refused contributions that are remembered, so that each is told of once.
_REFUSED_KEPT: Final = 4096
#: Leases whose results wait to be told.
_NEWS_MAX: Final = 16


class News:
    """What was made here and nobody was told yet; what is dropped travels with the next round."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Contribution, ...]] = deque(maxlen=_NEWS_MAX)
        self.bell = Bell()

    def add(self, contributions: Sequence[Contribution]) -> None:
        """Have some devices told soon, and of what this device does now."""
        self.waiting.append(tuple(contributions))
        self.bell.ring()


class Intake:
    """The way into one device's ledger."""

    def __init__(self, session: Session, renewal: Renewal) -> None:
        self._session = session
        self._renewal = renewal
        self.news = News()
        #: Signatures of contributions that were refused, oldest first.
        self._refused: dict[bytes, None] = {}

    def take(self, encoded: Iterable[bytes], source: DeviceId) -> tuple[Contribution, ...]:
        """Verify contributions and take in the acceptable ones; those that were new.

        Raises:
            PeerError: one of them is not what a device of the run would send.
        """
        acceptable = []
        for data in encoded:
            contribution = decode_contribution(data, self._session.run_id)
            if contribution.device in self._session.forgotten:
                continue
            reason = reason_to_refuse(contribution, self._session.spec)
            if reason is None and not self._is_known(contribution):
                reason = self._reason_to_leave_out(contribution)
            if reason is None:
                acceptable.append(contribution)
            else:
                self.refuse(contribution, reason)
        new = self.enter(acceptable)
        self._learn_authors(new)
        if new:
            log.info("heard", entries=len(new), source=source)
        return new

    def _learn_authors(self, contributions: Iterable[Contribution]) -> None:
        keys = {entry.device: entry.public_key for entry in contributions}
        self._renewal.learn(keys, keys.get)

    def _is_known(self, contribution: Contribution) -> bool:
        return self._session.coordinator.ledger.get(*contribution.key) is not None

    def _reason_to_leave_out(self, contribution: Contribution) -> str | None:
        """Why a device that has no place in the ledger yet gets none."""
        # A run of honest devices never comes near: this bounds what invented identities can fill.
        if len(self._session.coordinator.ledger.of_shard(contribution.shard)) >= limits.DEVICES_MAX:
            return f"the shard has contributions of {limits.DEVICES_MAX} devices already"
        return None

    def enter(self, contributions: Sequence[Contribution]) -> tuple[Contribution, ...]:
        """Store contributions and enter them into the ledger; those that were new.

        Raises:
            StorageError: they could not be stored, and were not entered.
        """
        session = self._session
        ledger = session.coordinator.ledger
        acceptable = [entry for entry in contributions if entry.signature not in self._refused]
        self._convict(acceptable)
        fresh = [
            entry
            for entry in acceptable
            if (held := ledger.get(*entry.key)) is None or entry.version > held.version
        ]
        if not fresh:
            return ()
        session.store.put_contributions(
            (entry.shard, entry.device, encode_contribution(entry)) for entry in fresh
        )
        complete = session.coordinator.complete
        new = session.coordinator.receive(fresh, session.clock())
        self.tell_refusals()
        self.tell_completion(complete)
        session.work_bell.ring()
        session.news_bell.ring()
        session.fetch_bell.ring()
        return new

    def _convict(self, contributions: Sequence[Contribution]) -> None:
        """Look for two stories of one device in what came and what is here; pass them on, and keep them."""
        session = self._session
        known = len(session.coordinator.proofs)
        told: dict[Key, Contribution] = {}
        for entry in contributions:
            # A proof that is passed on comes as two entries of one message.
            for other in (session.coordinator.ledger.get(*entry.key), told.get(entry.key)):
                if other is not None:
                    session.coordinator.convict((other, entry))
            told[entry.key] = entry
        proofs = session.coordinator.proofs
        if len(proofs) == known:
            return
        self.tell_refusals()
        for proof in proofs[known:]:
            self.news.add(proof)
        session.store.set_meta(
            {"proofs": [[encode_contribution(one).hex() for one in proof] for proof in proofs]}
        )

    def restore_proofs(self, kept: object) -> None:
        """Remember who was caught lying before a restart; what is damaged is left out."""
        session = self._session
        for pair in kept if isinstance(kept, list) else ():
            try:
                one, other = (decode_contribution(bytes.fromhex(text), session.run_id) for text in pair)
            except (PeerError, TypeError, ValueError):
                continue
            session.coordinator.convict((one, other))
        session.coordinator.refusals()  # told of in an earlier life

    def tell_completion(self, before: bool) -> None:
        """Tell of the run's completion, if it was not complete before."""
        session = self._session
        if session.coordinator.complete and not before:
            session.events.add("complete", "the run is complete: every shard has seen its samples")
            session.record_bell.ring()

    def tell_refusals(self) -> None:
        """Tell of what the coordinator has refused since it was asked last."""
        for refusal in self._session.coordinator.refusals():
            self.refuse(refusal.contribution, refusal.reason)

    def restore(self, encoded: Iterable[bytes]) -> None:
        """Enter what the store remembers; what is damaged there is left to the peers to give again."""
        session = self._session
        known = []
        for data in encoded:
            try:
                known.append(decode_contribution(data, session.run_id))
            except PeerError as error:
                session.warn("store", f"a stored contribution is damaged and was left out: {error}")
        known = [entry for entry in known if entry.device not in session.forgotten]
        session.coordinator.forget(session.forgotten)
        session.coordinator.receive(known, session.clock())
        session.coordinator.refusals()  # told of in an earlier life
        self._learn_authors(known)

    def refuse(self, contribution: Contribution, reason: str) -> None:
        """Count a refused contribution and tell of it, once."""
        session = self._session
        if contribution.signature in self._refused:
            return  # whoever believes in it offers it again and again
        self._refused[contribution.signature] = None
        if len(self._refused) > _REFUSED_KEPT:
            del self._refused[next(iter(self._refused))]
        session.counters.refused += 1
        event = session.events.add(
            "refused",
            f"a contribution of {session.name(contribution.device)} to "
            f"{session.labels([contribution.shard]) or contribution.shard} was refused: {reason}",
            device=contribution.device,
            shard=contribution.shard,
            reason=reason,
        )
        session.refusals.append(event)
