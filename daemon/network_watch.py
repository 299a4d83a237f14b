"""Network watch: a device follows its network when that gives it another address, or another interface.

A laptop that goes from Wi-Fi to a cable, or a router that hands out a new address, must not end a run that
goes on for days. As long as the address is there the device keeps it. When it is gone, p2pd and discovery
move to what is there instead; when nobody answers any more and there are other interfaces, they try these
in turn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

import anyio
import structlog

from ..errors import P2PCollabError, UsageError
from .interfaces import Interface, choose_interface, list_interfaces

log = structlog.get_logger()

_LOOK_S: Final = 2.0
#: An isolated device stays this long where it is, before it tries another interface: devices reach each other
#: within 20 s, if they can.
_STAY_S: Final = 25.0


def moved_address(current: Interface, wanted: str | None, available: Sequence[Interface]) -> Interface | None:
    """Where a device is whose address is gone; None: the address is there, or nothing is there instead.

    Args:
        wanted: what a person named, which stays in force: that interface, or none.
        available: what this device has now.
    """
    if current in available:
        return None
    try:
        return choose_interface(wanted, available)
    except UsageError:
        return None


def another_interface(
    current: Interface, wanted: str | None, available: Sequence[Interface], tried: Collection[Interface]
) -> Interface | None:
    """Where a device could look for company that has lost all others; None: nowhere.

    Args:
        tried: where it was already since it lost them.
    """
    others = [
        one
        for one in available
        if one != current and one not in tried and not (one.is_loopback or one.is_virtual)
    ]
    try:
        return choose_interface(wanted, others)
    except UsageError:
        return None


class NetworkWatch:
    """Looks whether this device still has its address. `run` for ever."""

    def __init__(
        self,
        current: Callable[[], Interface],
        wanted: str | None,
        isolated: Callable[[], bool],
        move: Callable[[Interface], Awaitable[None]],
    ) -> None:
        """
        Args:
            current: where the device is.
            wanted: what a person named.
            isolated: whether nobody answers there.
            move: moves the device.
        """
        self._current = current
        self._wanted = wanted
        self._isolated = isolated
        self._move = move
        self._tried: set[Interface] = set()
        self._stay_until = 0.0

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            await anyio.sleep(_LOOK_S)
            interface = self._elsewhere(list_interfaces())
            if interface is not None:
                try:
                    await self._move(interface)
                except P2PCollabError as error:
                    log.warning("did not move", interface=interface.name, reason=str(error))

    def _elsewhere(self, available: Sequence[Interface]) -> Interface | None:
        current = self._current()
        gone_to = moved_address(current, self._wanted, available)
        if gone_to is not None:
            return gone_to
        if not self._isolated():
            self._tried.clear()
            return None
        if anyio.current_time() < self._stay_until:
            return None
        other = another_interface(current, self._wanted, available, self._tried)
        if other is not None:
            self._tried.add(current)
            self._stay_until = anyio.current_time() + _STAY_S
        return other
