"""Bugs to be planted, to see whether the simulation finds them; it has found the last three by itself.

Each is a patch of the installed package for as long as the block lasts, and names the invariant that should
break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pytest

from p2pcollab import ledger, presence
from p2pcollab.coordinator import Coordinator
from p2pcollab.ledger import Contribution
from p2pcollab.presence import BoardRecord, Presence
from p2pcollab.run import DeviceId
from p2pcollab.simulation import Device, devices


@dataclass(frozen=True)
class Plant:
    """One bug."""

    what: str
    #: The invariant that it breaks.
    breaks: str
    apply: Callable[[pytest.MonkeyPatch], None]


def _count_twice(patch: pytest.MonkeyPatch) -> None:
    def summed(contributions: Iterable[Contribution]) -> dict[DeviceId, int]:
        joined: dict[DeviceId, int] = {}
        for contribution in contributions:
            for device, count in contribution.seen:
                joined[device] = joined.get(device, 0) + count
        return joined

    patch.setattr(ledger, "joined_seen", summed)


def _last_comer_wins(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Contribution, "newer_than", lambda self, other: self.version != other.version)


def _never_die(patch: pytest.MonkeyPatch) -> None:
    def live(self: Presence, _now: float) -> dict[DeviceId, BoardRecord]:
        return {device: peer.record for device, peer in self._peers.items() if peer.record.state != "left"}

    patch.setattr(Presence, "live", live)


def _beat_by_the_clock(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(devices, "next_beat", lambda _last, clock_s: round(clock_s * 1000))


def _say_nothing_of_earlier(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Coordinator, "newest_here", lambda _self, _shard, _device, _held: None)


def _collect_unnamed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Device, "kept", lambda self: self.coordinator.keep(self.held))


def _forgive_all(patch: pytest.MonkeyPatch) -> None:
    observe: Callable[..., Any] = Presence.observe

    def forgiving(self: Presence, records: Iterable[BoardRecord], now: float) -> None:
        if self._observed_at is not None and now - self._observed_at > self._silence_s / 2:
            for peer in self._peers.values():
                if self._observed_at - peer.changed_at <= self._silence_s:
                    peer.changed_at = now
            self._observed_at = now
        observe(self, records, now)

    patch.setattr(Presence, "observe", forgiving)


def _trust_the_unknown(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(presence, "OVERDUE_UNKNOWN_S", float("inf"))


PLANTS: Final[Mapping[str, Plant]] = {
    "count-twice": Plant(
        "samples that two contributions share are counted once for each", "counted-once", _count_twice
    ),
    "last-comer-wins": Plant(
        "of two contributions of a device, the one that came last stays", "newer-stays", _last_comer_wins
    ),
    "never-die": Plant("a silent device keeps its leases for ever", "leases-expire", _never_die),
    "beat-by-the-clock": Plant(
        "a device whose clock was set back shows beats that it has shown before",
        "living-are-seen",
        _beat_by_the_clock,
    ),
    "say-nothing-of-earlier": Plant(
        "who knows only the newest of what a dead device has made is not told what came before it",
        "models-equal",
        _say_nothing_of_earlier,
    ),
    "collect-unnamed": Plant(
        "garbage is collected between the write of a shard and of the contribution that names it",
        "stored-before-named",
        _collect_unnamed,
    ),
    "forgive-all": Plant(
        "each slow reading of the board excuses all silence before it", "leases-expire", _forgive_all
    ),
    "trust-the-unknown": Plant(
        "a device that has had no lease itself waits for ever for one whose trainer hangs",
        "coverage-recovers",
        _trust_the_unknown,
    ),
}
