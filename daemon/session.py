"""What the parts of the daemon share once the run is known."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import anyio

from .. import limits
from ..coordinator import Coordinator
from ..keys import Identity, RunKeys
from ..run import DeviceId, RunId, RunSpec
from .events import Event, EventLog
from .store import RunStore
from .trainer import Trainer

if TYPE_CHECKING:
    # It imports hivemind, which takes seconds: the daemon does that in a thread.
    from .transport import Transport


class Bell:
    """Wakes one waiting task; rings that come while nobody waits are kept as one."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def ring(self) -> None:
        """Wake the task that waits, now or when it comes to wait."""
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Wait for a ring, but not longer than `timeout_s`."""
        with anyio.move_on_after(timeout_s):
            await self._event.wait()
        self._event = anyio.Event()


@dataclass(slots=True)
class Counters:
    """What this device did in this run, over restarts of the daemon."""

    training_macs: int = 0
    #: Of them, what trying others' work took.
    tried_macs: int = 0
    contributions: int = 0
    merges: int = 0
    refused: int = 0
    trainer_restarts: int = 0
    #: Of earlier lives; this life's are the transport's.
    bytes_sent: int = 0
    bytes_received: int = 0
    p2pd_restarts: int = 0
    trainer_peak_rss_bytes: int = 0

    @classmethod
    def restore(cls, saved: object) -> Counters:
        """From what `status.counters` gave an earlier life to store; what is unknown is left out."""
        if not isinstance(saved, dict):
            return cls()
        names = {field.name for field in fields(cls)}
        return cls(
            **{name: value for name, value in saved.items() if name in names and isinstance(value, int)}
        )


@dataclass(slots=True)
class Session:
    """One device's part in one run. Mutable, and used from the event loop only."""

    spec: RunSpec
    run_id: RunId
    identity: Identity
    keys: RunKeys
    store: RunStore
    coordinator: Coordinator
    transport: Transport
    trainer: Trainer
    events: EventLog
    counters: Counters
    #: This device's name for people.
    own_name: str = "this device"
    #: Devices that were shut out of the run.
    forgotten: frozenset[DeviceId] = frozenset()
    #: Names of devices for people, as their records give them.
    names: dict[DeviceId, str] = field(default_factory=dict)
    #: Rung when there may be something to train.
    work_bell: Bell = field(default_factory=Bell)
    #: Rung when there may be something to fetch.
    fetch_bell: Bell = field(default_factory=Bell)
    #: Rung when contributions have come in.
    news_bell: Bell = field(default_factory=Bell)
    #: Rung when this device's record has changed.
    record_bell: Bell = field(default_factory=Bell)
    #: Contributions that were refused lately, as events: whose, to which shard, and why.
    refusals: deque[Event] = field(default_factory=lambda: deque(maxlen=limits.REFUSALS_SHOWN_MAX))
    #: What a person should know of, by topic.
    warnings: dict[str, str] = field(default_factory=dict)
    random: random.Random = field(default_factory=random.Random)
    clock: Callable[[], float] = time.monotonic

    @property
    def device(self) -> DeviceId:
        """This device."""
        return self.identity.device

    def traffic(self) -> dict[str, int]:
        """What this device's transport did in this run, over restarts of the daemon."""
        now = self.transport.counters
        return {
            "bytes_sent": self.counters.bytes_sent + now.bytes_sent,
            "bytes_received": self.counters.bytes_received + now.bytes_received,
            "p2pd_restarts": self.counters.p2pd_restarts + now.p2pd_restarts,
        }

    def warn(self, topic: str, text: str) -> None:
        """Show a warning until it is cleared; an event, too, if it is new."""
        if text not in self.warnings.values():
            self.events.add("warning", text, topic=topic)
        self.warnings[topic] = text

    def name(self, device: DeviceId) -> str:
        """A device's name for people."""
        if device == self.device:
            return self.own_name
        return self.names.get(device, f"device {device[:6]}")

    def labels(self, shards: Sequence[str]) -> str:
        """Shards for people."""
        return ", ".join(self.spec.label(shard) for shard in self.spec.shards if shard in shards)
