"""Re-joining: a device that has lost all others says so, and looks for them harder than usual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import anyio

from ..isolation import Change, Isolation
from ..run import DeviceId
from .session import Session

_LOOK_S: Final = 1.0
#: Between two attempts at all remembered addresses, however often they failed, and two multicast questions.
_TRY_S: Final = 5.0


class Rejoining:
    """Watches whether this device is isolated. `run` for ever."""

    def __init__(self, session: Session, ask_again: Callable[[], None]) -> None:
        """
        Args:
            ask_again: asks by multicast who is there, now.
        """
        self._session = session
        self._ask_again = ask_again
        self._isolation = Isolation()
        self._tried_at = 0.0

    @property
    def isolated(self) -> bool:
        """Whether all others are lost."""
        return self._isolation.isolated

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            self.look()
            await anyio.sleep(_LOOK_S)

    def look(self) -> None:
        """Look once: say what has changed, and try again if it is time."""
        session, now = self._session, self._session.clock()
        live = frozenset(session.coordinator.live(now)) - {session.device}
        left = {
            DeviceId(seen.record.device)
            for seen in session.coordinator.sightings(now)
            if seen.record.state == "left"
        }
        change = self._isolation.observe(live, left, now)
        if change is Change.ISOLATED:
            self._tell()
        elif change is Change.REJOINED:
            session.events.add("rejoined", "other devices of the run are here again")
        if not self.isolated:
            session.warnings.pop("isolated", None)
        if self.isolated and now - self._tried_at >= _TRY_S:
            self._tried_at = now
            # The board tries whoever is due, every few seconds.
            session.transport.book.retry_all()
            self._ask_again()

    def _tell(self) -> None:
        session = self._session
        interface = session.transport.interface
        text = (
            f"no other device of this run answers on {interface.name} ({interface.address}): is the network "
            "there? This device trains on, and looks for the others at their addresses and by multicast"
        )
        session.events.add("isolated", text)
        session.warnings["isolated"] = text
