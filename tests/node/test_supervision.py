"""What the daemon does when a part of it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from loopback import Device, devices, fresh_keys, until, until_true

from p2pcollab.daemon.events import EventLog
from p2pcollab.daemon.supervision import P2pdKeeper
from p2pcollab.daemon.trainer import Trainer
from p2pcollab.errors import RunError


async def _survive_p2pds_death(folder: Path, failures: int) -> list[str]:
    """Kill a device's p2pd while its trainer is dead as well; the kinds of events until both met again.

    Args:
        failures: how often binding to the new p2pd fails first.
    """
    keys = fresh_keys()
    async with devices(folder, keys, keys) as (survivor, other):
        events = EventLog(time.time, [])
        attempts = 0

        async def relink() -> None:
            nonlocal attempts
            if attempts < failures:
                attempts += 1
                raise RunError("p2pd ended at once")
            await survivor.board.rebind()
            attempts += 1

        # Never started, which is what a dead one looks like.
        keeper = P2pdKeeper(survivor.transport, Trainer(1), events, relink)
        await keeper.guard()
        watch = asyncio.create_task(keeper.run())
        # Both, as in a daemon: only the one that called knows where the other one is.
        maintenance = [asyncio.create_task(device.board.maintain()) for device in (survivor, other)]
        try:
            os.kill(survivor.transport.p2pd_pid or 0, signal.SIGKILL)
            await until(lambda: attempts > failures, 30.0)
            await _heard(survivor, other)
        finally:
            for task in (watch, *maintenance):
                task.cancel()
        return [event.kind for event in events.after(0)]


async def _heard(speaker: Device, listener: Device) -> None:
    """Publish until the listener's board shows it."""

    async def shown() -> bool:
        await speaker.publish()
        return speaker.identity.device in await listener.names()

    await until_true(shown, 90.0)


def test_p2pd_comes_back_although_the_trainer_that_should_guard_it_is_dead(tmp_path: Path) -> None:
    kinds = asyncio.run(asyncio.wait_for(_survive_p2pds_death(tmp_path, failures=0), 180))
    assert kinds == ["p2pd-died"]


def test_a_p2pd_that_the_board_cannot_use_is_replaced_too(tmp_path: Path) -> None:
    kinds = asyncio.run(asyncio.wait_for(_survive_p2pds_death(tmp_path, failures=1), 180))
    assert kinds == ["p2pd-died", "p2pd-failed", "p2pd-died"]
