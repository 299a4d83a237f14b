"""Death watch: a killed daemon is taken for dead before its lease term is over.

Silence alone proves nothing: a paused device, a slow one and one behind a cut cable are silent, too. But
where a daemon was killed the host is still there, and its kernel refuses connections to the port that
nobody listens on any more. A paused process does not cause that, and a cut cable gives no answer. So a
device that is silent, and whose host has refused for longer than a p2pd takes to be started again, is dead.
Where the whole host is gone, the lease term decides as ever.
"""

from __future__ import annotations

from typing import Final

import anyio

from ..run import DeviceId
from .peer_ids import PeerIds
from .session import Session

#: Silence after which a device is looked at: longer than a beat on a quiet machine, so that few are in vain.
SILENT_S: Final = 2.5
#: Between two looks.
_LOOK_S: Final = 0.75
#: A device whose p2pd died refuses while it is started again, which takes less than a second.
_REFUSING_S: Final = 2.0


class DeathWatch:
    """Looks after the devices that are silent. `run` for ever."""

    def __init__(self, session: Session, peer_ids: PeerIds) -> None:
        self._session = session
        self._peer_ids = peer_ids
        #: Since when each silent device's host refuses.
        self._refusing: dict[DeviceId, float] = {}

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            await self.look()
            await anyio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Ask the hosts of all silent devices once, at the same time."""
        session = self._session
        silent = session.coordinator.silent(SILENT_S, session.clock())
        for device in [device for device in self._refusing if device not in silent]:
            del self._refusing[device]
        async with anyio.create_task_group() as tasks:
            for device in silent:
                tasks.start_soon(self._ask, device)

    async def _ask(self, device: DeviceId) -> None:
        session = self._session
        peer = self._peer_ids.peer_of(device)
        if peer is None or not await session.transport.refuses(peer):
            self._refusing.pop(device, None)
            return
        since = self._refusing.setdefault(device, session.clock())
        if session.clock() - since >= _REFUSING_S:
            session.coordinator.found_dead(device)
            # The first tells of it, the second sees what is free now.
            session.record_bell.ring()
            session.work_bell.ring()
