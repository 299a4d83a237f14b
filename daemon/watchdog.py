"""Telling whoever supervises this daemon that it is ready and lives.

systemd is told over its socket (sd_notify(3), which is one datagram). Elsewhere the daemon supervises itself,
if it is asked to: a timer of the interpreter ends it when the event loop has not turned for too long, and
writes to the log where every thread stood; whoever started it starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import socket
import sys
from collections.abc import MutableMapping
from typing import Final

#: Seconds without a turn of the event loop after which the daemon ends itself, for supervisors that do not.
SELF_WATCH_VARIABLE: Final = "P2PCOLLAB_WATCHDOG_S"
_SOCKET: Final = "NOTIFY_SOCKET"
_PERIOD: Final = "WATCHDOG_USEC"
_FOR_PID: Final = "WATCHDOG_PID"
#: Signs of life in each period: one may be late.
_PER_PERIOD: Final = 3
_SELF_WATCH_S_MIN: Final = 5.0
#: The socket holds ten datagrams that a busy supervisor has not read yet.
_ROOM_WITHIN_S: Final = 1.0


class Watchdog:
    """The daemon's side of its supervision. Does nothing where nobody asks for it."""

    def __init__(self, environment: MutableMapping[str, str], pid: int) -> None:
        """
        Args:
            environment: what the supervisor has set; it is taken out, because p2pd and the trainer are not
                the process that is supervised.
        """
        self._address = environment.pop(_SOCKET, "")
        period = environment.pop(_PERIOD, "")
        watched = environment.pop(_FOR_PID, "")
        own = environment.pop(SELF_WATCH_VARIABLE, "")
        #: Seconds between two signs of life; 0: nobody waits for one.
        self._period_s = 0.0
        if self._address and period.isdecimal() and watched in ("", str(pid)):
            self._period_s = int(period) / 1e6
        #: Seconds without a turn of the event loop after which the daemon ends.
        self._self_watch_s = max(_SELF_WATCH_S_MIN, int(own)) if own.isdecimal() and int(own) else 0.0

    def ready(self) -> None:
        """The daemon answers."""
        self._tell(f"READY=1\nMAINPID={os.getpid()}")

    def leaving(self) -> None:
        """The daemon ends, in its own time."""
        self._tell("STOPPING=1")

    async def keep(self) -> None:
        """Give signs of life, for ever. From the event loop: what hangs there is what must be noticed."""
        periods = [period for period in (self._period_s, self._self_watch_s) if period]
        if not periods:
            return
        try:
            while True:
                if self._period_s:
                    # The next one makes up for one that finds no room.
                    self._tell("WATCHDOG=1", wait_s=0.0)
                if self._self_watch_s:
                    faulthandler.dump_traceback_later(self._self_watch_s, exit=True, file=sys.__stderr__ or 2)
                await asyncio.sleep(min(periods) / _PER_PERIOD)
        finally:
            if self._self_watch_s:
                faulthandler.cancel_dump_traceback_later()

    def _tell(self, state: str, wait_s: float = _ROOM_WITHIN_S) -> None:
        if not self._address:
            return
        # A name that begins with @ is in the kernel's own name space, where the first byte is 0.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A supervisor that is gone, or too busy to read, must not hold the daemon up.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as talk,
        ):
            talk.settimeout(wait_s)
            talk.sendto(state.encode(), address)
