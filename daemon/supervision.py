"""Supervision: p2pd is started again whenever it ends, and it ends when the daemon does."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import anyio
import psutil

from ..errors import P2PCollabError
from .events import EventLog
from .trainer import Trainer, TrainerDied

if TYPE_CHECKING:
    # It imports hivemind, which takes seconds.
    from .transport import Transport

_BACKOFF_S: Final = (0.2, 1.0, 3.0, 10.0)
_MOVED_WITHIN_S: Final = 20.0


class P2pdKeeper:
    """Keeps a device's p2pd alive."""

    def __init__(
        self,
        transport: Transport,
        trainer: Trainer,
        events: EventLog,
        relink: Callable[[], Awaitable[None]],
    ) -> None:
        """
        Args:
            relink: binds to the new p2pd what used the old one.
        """
        self._transport = transport
        self._trainer = trainer
        self._events = events
        self._relink = relink
        self._moved = anyio.Event()
        self._moving: str | None = None

    async def move(self, text: str) -> None:
        """Start p2pd anew, because the transport is to be elsewhere; return when it is, or after a while.

        Args:
            text: the event's, for people.
        """
        self._moving, self._moved = text, anyio.Event()
        self._transport.died.set()
        # If the new address is gone again, p2pd does not start, and the caller has to find another.
        with anyio.move_on_after(_MOVED_WITHIN_S):
            await self._moved.wait()

    async def guard(self) -> None:
        """Whoever outlives the daemon ends its p2pd: the trainer notices the daemon's death at once."""
        pid = self._transport.p2pd_pid
        # A trainer that is dead itself is told when it is started again.
        with contextlib.suppress(psutil.NoSuchProcess, TrainerDied):
            await self._trainer.guard(pid or 0, psutil.Process(pid).create_time())

    async def run(self) -> None:
        """Start p2pd again whenever it dies, for ever."""
        failures = 0
        while True:
            await self._transport.died.wait()
            if self._moving is not None:
                self._events.add("moved", self._moving)
                self._moving = None
            else:
                self._events.add("p2pd-died", "p2pd ended; it is started again")
            try:
                await self._transport.restart()
                await self.guard()
                await self._relink()
                failures = 0
                self._moved.set()
            except P2PCollabError as error:
                # Whichever step failed: a p2pd that the board does not use is as good as none.
                self._transport.died.set()
                delay = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                self._events.add("p2pd-failed", f"p2pd did not start: {error}")
                await anyio.sleep(delay)
