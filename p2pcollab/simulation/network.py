"""The simulated network: links that are cut, messages that are lost, late or doubled, and the board."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..limits import CLOCK_SKEW_S_MAX, RECORD_TTL_S_MAX
from ..presence import record_expiry
from ..run import DeviceId, ShardId
from .scenarios import Scenario

#: Remembered addresses are tried this often (`daemon.board.KEEPALIVE_S`): until then, the halves of a board
#: stay apart after a cut is healed, and a device that starts is alone.
KEEPALIVE_S: Final = 5.0
#: A node that does not answer holds up what is asked of the board (`daemon.board._RPC_S`).
BOARD_RPC_S: Final = 1.5
#: Records of a device that some part of the board may still show.
_HISTORY: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRecord:
    """`presence.BoardRecord`, without a parser."""

    device: DeviceId
    beat: int
    state: str
    speed: float
    tasks: tuple[ShardId, ...] | None
    prefer: tuple[ShardId, ...]
    class_counts: tuple[int, ...]
    leases: tuple[ShardId, ...]
    lease_sequence: int
    progress: tuple[tuple[ShardId, int, int], ...]


class Links:
    """Which devices reach which: directly, and on the board, where others pass records on.

    A set of devices is an int with a bit for each.
    """

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        count = len(scenario.devices)
        self._everyone = (1 << count) - 1
        self._cuts = [
            (cut, cut.end + rng.random() * KEEPALIVE_S, sum(1 << index for index in cut.side))
            for cut in scenario.cuts
        ]
        #: Devices that are up and have found another one, or look no longer.
        self._found = 0
        self._direct = [self._everyone] * count
        self._shown = [0] * count
        #: Since when nothing that the first publishes is shown to the second.
        self._hidden_since = [[-1.0] * count for _ in range(count)]

    def changes(self) -> list[float]:
        """Times at which `update` must be called."""
        return sorted({time for cut, merged, _ in self._cuts for time in (cut.start, cut.end, merged)})

    def update(self, now: float) -> None:
        """Take in what is cut at this time."""
        everyone = self._everyone
        count = len(self._direct)
        self._direct = [everyone] * count
        passes = [everyone] * count
        for cut, merged, side in self._cuts:
            if not cut.start <= now < merged:
                continue
            for sender in range(count):
                inside = side >> sender & 1
                reached = side if inside else (everyone if cut.one_way else everyone & ~side)
                passes[sender] &= reached
                if now < cut.end:
                    self._direct[sender] &= reached
        for sender in range(count):
            passes[sender] &= self._found
            # Others pass on what they are told.
            shown = passes[sender] if self._found >> sender & 1 else 0
            for relay in range(count):
                if shown >> relay & 1:
                    shown |= passes[relay]
            shown |= 1 << sender
            hidden = self._shown[sender] & ~shown
            self._shown[sender] = shown
            for reader in range(count):
                if hidden >> reader & 1:
                    self._hidden_since[sender][reader] = now

    def set_found(self, index: int, found: bool, now: float) -> None:
        """A device has found the others, or is alone."""
        self._found = self._found | 1 << index if found else self._found & ~(1 << index)
        self.update(now)

    def found(self, index: int) -> bool:
        """Whether a device is up and has found the others."""
        return bool(self._found >> index & 1)

    def open(self, sender: int, receiver: int) -> bool:
        """Whether what one sends arrives at the other."""
        return bool(self._direct[sender] >> receiver & 1)

    def hidden_since(self, author: int, reader: int) -> float | None:
        """Since when the reader does not see what the author publishes; None: it does."""
        return None if self._shown[author] >> reader & 1 else self._hidden_since[author][reader]


class Board:
    """A notice board with expiry, stale readings, and parts that do not see one another."""

    def __init__(self, links: Links, count: int) -> None:
        self._links = links
        self._published: list[list[tuple[float, SimulatedRecord]]] = [[] for _ in range(count)]

    def publish(self, index: int, record: SimulatedRecord, at: float) -> None:
        """Show a record from a time on; earlier ones may still be read for a while."""
        history = self._published[index]
        if history and record_expiry(record.beat) <= record_expiry(history[-1][1].beat):
            return  # the DHT keeps what expires last
        history.append((at, record))
        if len(history) > _HISTORY:
            del history[0]

    def read(self, reader: int, seen_until: float, wall_s: float) -> list[SimulatedRecord]:
        """The records of all devices as `reader` finds them, its own included.

        Args:
            seen_until: what is newer is not shown yet.
            wall_s: the reader's clock, which decides what has expired and what cannot be true yet.
        """
        records = []
        alone = not self._links.found(reader)
        for author, history in enumerate(self._published):
            limit = seen_until
            if history and author != reader:
                if alone:
                    continue
                hidden_since = self._links.hidden_since(author, reader)
                if hidden_since is not None:
                    limit = min(limit, hidden_since)
            for at, record in reversed(history):
                if at <= limit:
                    if 0.0 <= record_expiry(record.beat) - wall_s <= RECORD_TTL_S_MAX:
                        records.append(record)
                    break
        return records


class Wire:
    """Loses, delays, doubles and delivers messages."""

    def __init__(
        self, scenario: Scenario, rng: random.Random, at: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self._scenario = scenario
        self._rng = rng
        self._at = at

    def carry(self, now: float, arrive: Callable[[], None]) -> None:
        """Have `arrive` called once, twice, late, or never."""
        rng, scenario = self._rng, self._scenario
        for _ in range(2 if rng.random() < scenario.duplication else 1):
            if rng.random() < scenario.loss:
                continue
            low, high = scenario.latency_s
            delay_s = low + (high - low) * rng.random()
            if scenario.straggling and rng.random() < scenario.straggling:
                # It overtakes nothing any more: everything else has overtaken it.
                delay_s += scenario.straggle_s * rng.random()
            self._at(now + delay_s, arrive)


def may_call(one_wall_s: float, other_wall_s: float) -> bool:
    """Whether a call between devices with these clocks is let in (`authentication.ReplayGuard`)."""
    return abs(one_wall_s - other_wall_s) <= CLOCK_SKEW_S_MAX
