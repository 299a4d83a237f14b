"""Presence: which devices are alive, judged by what the board shows over time.

Wall clocks of the devices are never compared. A device counts as alive until its beat has not been seen to
rise for so long (`CoordinatorSettings.silence_s`) of *this* device's monotonic clock. A record that is shown
again with the same beat, by a slow or stale part of the board, says nothing. Silence is counted up to the
last reading of the board: what nobody has looked for is not missed. Sooner than that a device is dead only
when its own host says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from . import limits
from .run import STEM, DeviceId

#: A record is valid this long by its author's clock. As much is left of RECORD_TTL_S_MAX, above and below, as
#: two clocks may differ.
RECORD_TTL_S: Final = limits.RECORD_TTL_S_MAX - limits.CLOCK_SKEW_S_MAX
#: A lease is overdue when it has been held for this many times what it should take. Higher, and a stuck
#: trainer delays the end of the run for longer; lower, and honest long leases are trained twice.
OVERDUE_FACTOR: Final = 4.0
#: A lease on the stem may take this many times one on a branch: all of it is trained, on every example
#: (AlexNet: 4 to 6). Lower, and devices that have never trained it take who does for stuck; higher, and they
#: wait for one who is.
STEM_LEASE_MAX: Final = 8.0
#: The same for a device that has had no lease to compare with, e.g. since it was started again. Without it,
#: one whose only partner is stuck waits for ever.
OVERDUE_UNKNOWN_S: Final = 300.0
#: Deadly silences for which a device that is no longer shown stays known, so that a late echo of its record
#: does not revive it.
FORGET_SILENCES: Final = 8.0


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


@dataclass(slots=True)
class LeaseTimes:
    """How long this device's own leases took at most; 0: it has had none."""

    stem_s: float = 0.0
    branches_s: float = 0.0

    def add(self, leases: Collection[str], seconds: float) -> None:
        """A lease has ended."""
        if STEM in leases:
            self.stem_s = max(self.stem_s, seconds)
        else:
            self.branches_s = max(self.branches_s, seconds)

    def expected_s(self, leases: Collection[str]) -> float:
        """How long such leases should take at most at this device's speed."""
        if STEM in leases and not self.stem_s:
            return STEM_LEASE_MAX * self.branches_s
        return max(self.stem_s, self.branches_s)


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
    #: Its host has said that nobody listens where it was.
    refused: bool = False


class Presence:
    """The other devices of the run, as this one has seen them."""

    def __init__(self, device: DeviceId, silence_s: float) -> None:
        self._device = device
        self._silence_s = silence_s
        self._peers: dict[DeviceId, _Peer] = {}
        self._observed_at: float | None = None
        self.observing_since: float | None = None
        """When the board was first read; None before."""

    def __len__(self) -> int:
        return len(self._peers)

    def observe(self, records: Iterable[BoardRecord], now: float) -> None:
        """Take in a reading of the board that began at `now`."""
        unheard_s = 0.0 if self._observed_at is None else now - self._observed_at
        if unheard_s > self._silence_s / 2:
            # This device was suspended, or its board did not answer: silence that nobody listened to is no
            # evidence of death. A little of it is, or on a board that is always slow nobody would ever die.
            # What came by a push meanwhile is as fresh as it can be.
            for peer in self._peers.values():
                peer.changed_at = min(now, peer.changed_at + unheard_s - self._silence_s / 4)
        # Of two readings at the same time, the one that began first may end last.
        self._observed_at = max(now, self._observed_at or now)
        if self.observing_since is None:
            self.observing_since = now
        forgotten = now - FORGET_SILENCES * self._silence_s
        for device in [device for device, peer in self._peers.items() if peer.shown_at < forgotten]:
            del self._peers[device]
        self.hear(records, now)

    def hear(self, records: Iterable[BoardRecord], now: float) -> None:
        """Take in records that came by another way, e.g. with a push: they tell of life, not of silence."""
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
        peer.refused = False

    def found_dead(self, device: DeviceId) -> None:
        """A device's host answers that its daemon is not there: it is dead until its beat rises again.

        A device that is only paused or cut off never causes this: its host takes connections all the same, or
        says nothing.
        """
        if device in self._peers:
            self._peers[device].refused = True

    def silent(self, longer_than_s: float, now: float) -> tuple[DeviceId, ...]:
        """The devices that count as alive although their beat has not risen for so long."""
        return tuple(
            device for device in self.live(now) if now - self._peers[device].changed_at > longer_than_s
        )

    def drop(self, devices: Iterable[DeviceId]) -> None:
        """Devices that have no part in the run any more, whatever their last records said."""
        for device in devices:
            self._peers.pop(device, None)

    def live(self, now: float) -> dict[DeviceId, BoardRecord]:
        """The newest records of the other devices that are alive."""
        listened = now if self._observed_at is None else min(now, self._observed_at)
        return {
            device: peer.record
            for device, peer in self._peers.items()
            if listened - peer.changed_at <= self._silence_s
            and not peer.refused
            and peer.record.state != "left"
        }

    def record(self, device: DeviceId) -> BoardRecord | None:
        """A device's newest record, however old that is."""
        peer = self._peers.get(device)
        return None if peer is None else peer.record

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
        if not peer.record.leases:
            return False
        limit_s = OVERDUE_FACTOR * expected_s if expected_s else OVERDUE_UNKNOWN_S
        return now - peer.claimed_at > max(limit_s, 2 * self._silence_s)


def record_expiry(beat: int) -> float:
    """When a record expires, unix seconds of any device's clock. `beat`: unix milliseconds."""
    return beat / 1000 + RECORD_TTL_S


def next_beat(last: int, clock_s: float) -> int:
    """The beat of a device's next record: unix milliseconds, and greater than `last`, its greatest so far.

    Only a clock that was set back by more than others tolerate starts anew: what was published then was
    refused.

    Args:
        clock_s: the device's wall clock, unix seconds.
    """
    now_ms = round(clock_s * 1000)
    ahead = last - now_ms
    return last + 1 if 0 <= ahead <= limits.CLOCK_SKEW_S_MAX * 1000 else now_ms
