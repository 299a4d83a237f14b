"""What happened on this device, for people and scripts: a bounded log with gap-detectable ids."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .. import limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. Ids of one run are consecutive, over restarts of the daemon too."""

    id: int
    #: Seconds since the epoch, by this device's clock.
    time: float
    #: A word for scripts: `lease`, `peer-joined`, `merged`, `refused`, ...
    kind: str
    #: A sentence for people.
    text: str
    #: JSON values for scripts.
    fields: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the API shows it."""
        return {**self.fields, "id": self.id, "time": self.time, "kind": self.kind, "text": self.text}


class EventLog:
    """The newest events. A reader that remembers the last id it saw can tell whether it missed some.

    Used from the event loop's thread only.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        earlier: Iterable[Event] = (),
        sink: Callable[[Event], None] | None = None,
        capacity: int = limits.EVENTS_MAX,
    ) -> None:
        """
        Args:
            earlier: what is remembered from before a restart, oldest first.
            sink: told of every new event, e.g. to store it.
        """
        self._clock = clock
        self._events = deque(earlier, maxlen=capacity)
        self._sink = sink
        self._next_id = self._events[-1].id + 1 if self._events else 1
        self._news = asyncio.Event()
        self._closed = False
        #: Calls of `wait` that wait at the moment.
        self.waiters = 0

    def add(self, kind: str, text: str, **fields: Any) -> Event:
        """Log an event and wake who waits for it. `fields` are JSON values."""
        event = Event(id=self._next_id, time=self._clock(), kind=kind, text=text, fields=fields)
        self._next_id += 1
        self._events.append(event)
        self._wake()
        if self._sink is not None:
            self._sink(event)
        return event

    @property
    def first_id(self) -> int:
        """Id of the oldest event held (of the next one if none is). A reader whose last id + 1 is below it
        has missed events."""
        return self._events[0].id if self._events else self._next_id

    @property
    def last_id(self) -> int:
        """Id of the newest event; 0 before the first."""
        return self._next_id - 1

    def after(self, id: int) -> tuple[Event, ...]:
        """The events held with a greater id, oldest first."""
        skip = max(0, id + 1 - self.first_id)
        return tuple(self._events)[skip:]

    async def wait(self, after: int, wait_s: float) -> tuple[Event, ...]:
        """Like `after`, but if there is none yet, wait up to `wait_s` seconds for one."""
        if self.last_id <= after and not self._closed:
            self.waiters += 1
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except asyncio.TimeoutError:
                return ()
            finally:
                self.waiters -= 1
        return self.after(after)

    def close(self) -> None:
        """Let nobody wait any longer: the daemon ends."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
