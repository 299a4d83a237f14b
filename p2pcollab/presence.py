"""Presence: which devices are alive, judged by what the board shows over time.

Wall clocks of the devices are never compared. A device counts as alive for one lease term of *this* device's
monotonic clock after its beat was last seen to rise. A record that is shown again with the same beat, by a
slow or stale part of the board, says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from .run import DeviceId

#: A lease is overdue when it has been held for this many times what it should take. Higher, and a stuck
#: trainer delays the end of the run for longer; lower, and honest long leases are trained twice.
OVERDUE_FACTOR: Final = 4.0
#: Lease terms for which a device that is no longer shown stays known, so that a late echo of its record does
#: not revive it.
FORGET_TERMS: Final = 8.0


class BoardRecord(Protocol):
    """What presence and the coordinator read of a device's record; `records.DeviceRecord` is one."""

    @property
    def device(self) -> str: ...
    @property
    def beat(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def speed(self) -> float: ...
    @property
    def tasks(self) -> tuple[str, ...] | None: ...
    @property
    def prefer(self) -> tuple[str, ...]: ...
    @property
    def class_counts(self) -> tuple[int, ...]: ...
    @property
    def leases(self) -> tuple[str, ...]: ...
    @property
    def lease_sequence(self) -> int: ...
    @property
    def progress(self) -> tuple[tuple[str, int, int], ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A device as it was last seen."""

    record: BoardRecord
    #: Seconds since its beat was last seen to rise.
    silent_s: float
    #: Whether it counts as alive.
    live: bool


@dataclass(slots=True)
class _Peer:
    record: BoardRecord
    changed_at: float
    shown_at: float
    #: When its present leases were first seen.
    claimed_at: float


class Presence:
    """The other devices of the run, as this one has seen them."""

    def __init__(self, device: DeviceId, lease_term_s: float) -> None:
        self._device = device
        self._lease_term_s = lease_term_s
        self._peers: dict[DeviceId, _Peer] = {}
        self._observed_at: float | None = None
        self.observing_since: float | None = None
        """When the board was first read; None before."""

    def observe(self, records: Iterable[BoardRecord], now: float) -> None:
        """Take in one reading of the board."""
        if self._observed_at is not None and now - self._observed_at > self._lease_term_s / 2:
            # This device was suspended, or its board did not answer: silence that nobody listened to is no
            # evidence of death.
            for peer in self._peers.values():
                if self._observed_at - peer.changed_at <= self._lease_term_s:
                    peer.changed_at = now
        self._observed_at = now
        if self.observing_since is None:
            self.observing_since = now
        forgotten = now - FORGET_TERMS * self._lease_term_s
        for device in [device for device, peer in self._peers.items() if peer.shown_at < forgotten]:
            del self._peers[device]
        for record in records:
            if record.device != self._device:
                self._see(record, now)

    def _see(self, record: BoardRecord, now: float) -> None:
        device = DeviceId(record.device)
        peer = self._peers.get(device)
        if peer is None:
            self._peers[device] = _Peer(record, changed_at=now, shown_at=now, claimed_at=now)
            return
        peer.shown_at = now
        if record.beat <= peer.record.beat:
            return
        before = peer.record
        if (record.lease_sequence, record.leases) != (before.lease_sequence, before.leases):
            peer.claimed_at = now
        peer.record = record
        peer.changed_at = now

    def drop(self, devices: Iterable[DeviceId]) -> None:
        """Devices that have no part in the run any more, whatever their last records said."""
        for device in devices:
            self._peers.pop(device, None)

    def live(self, now: float) -> dict[DeviceId, BoardRecord]:
        """The newest records of the other devices that are alive."""
        return {
            device: peer.record
            for device, peer in self._peers.items()
            if now - peer.changed_at <= self._lease_term_s and peer.record.state != "left"
        }

    def sightings(self, now: float) -> tuple[Sighting, ...]:
        """All other devices that were seen of late, alive or not, in device order."""
        live = self.live(now)
        return tuple(
            Sighting(record=peer.record, silent_s=now - peer.changed_at, live=device in live)
            for device, peer in sorted(self._peers.items())
        )

    def overdue(self, device: DeviceId, expected_s: float, now: float) -> bool:
        """Whether a device has held its leases for so long that its trainer must be stuck.

        How long the device held earlier leases is no guide: a stuck one would excuse the next.

        Args:
            device: one that `live` names.
            expected_s: how long its lease should take, by this device's own leases; 0 if it has had none.
        """
        peer = self._peers[device]
        if not peer.record.leases or expected_s == 0.0:
            return False
        return now - peer.claimed_at > max(OVERDUE_FACTOR * expected_s, 2 * self._lease_term_s)
