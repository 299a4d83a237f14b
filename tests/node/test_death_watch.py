"""Who is taken for dead before its lease term is over: whoever's host says so, and nobody else."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from loopback import Device, devices, fresh_keys, introduce

from p2pcollab.coordinator import Advert, Coordinator, CoordinatorSettings
from p2pcollab.daemon.death_watch import SILENT_S, DeathWatch
from p2pcollab.daemon.session import Bell
from p2pcollab.data import inspect
from p2pcollab.planning import PlanOptions, plan_run

SPEC = plan_run("watch", inspect("digits", None), PlanOptions(epochs=1, seed=1))


class Watcher:
    """A device that watches another one, by a clock that is set."""

    def __init__(self, own: Device, other: Device) -> None:
        self.now = 0.0
        advert = Advert(speed=1.0, class_counts=(10,) * 10)
        self.coordinator = Coordinator(
            SPEC, own.identity.device, advert, CoordinatorSettings(), random.Random(0)
        )
        self.coordinator.observe_board([other.record()], 0.0)
        session: Any = SimpleNamespace(
            coordinator=self.coordinator,
            transport=own.transport,
            clock=lambda: self.now,
            record_bell=Bell(),
            work_bell=Bell(),
        )
        peer_ids: Any = SimpleNamespace(peer_of=lambda _device: other.identity.peer_id)
        self._watch = DeathWatch(session, peer_ids)

    async def looks_until(self, end: float) -> bool:
        """Look each second from the moment at which the other is silent; whether it is taken for alive."""
        self.now = SILENT_S
        while self.now < end:
            self.now += 1.0
            await self._watch.look()
        return len(self.coordinator.live(self.now)) == 2


def _try(folder: Path, harm: Callable[[Device], Awaitable[None]], *, end: float, met: bool = True) -> bool:
    async def run() -> bool:
        keys = fresh_keys()
        async with devices(folder, keys, keys, meet=False) as (own, other):
            if met:
                await introduce(own, other)
            else:
                own.transport.book.learn(other.transport.address)
            watcher = Watcher(own, other)
            await harm(other)
            alive = await watcher.looks_until(end)
            if other.transport.p2pd_pid is not None:
                psutil.Process(other.transport.p2pd_pid).resume()
            return alive

    return asyncio.run(asyncio.wait_for(run(), 60))


async def _gone(device: Device) -> None:
    await device.transport.stop()


async def _paused(device: Device) -> None:
    psutil.Process(device.transport.p2pd_pid).send_signal(signal.SIGSTOP)


async def _nothing(device: Device) -> None:
    pass


def test_device_whose_daemon_is_gone_is_dead_before_its_term_is_over(tmp_path: Path) -> None:
    assert not _try(tmp_path, _gone, end=SILENT_S + 4)
    assert CoordinatorSettings().silence_s > SILENT_S + 4


def test_device_whose_p2pd_is_only_started_again_is_not_dead(tmp_path: Path) -> None:
    assert _try(tmp_path, _gone, end=SILENT_S + 2)


def test_device_that_is_paused_is_not_dead(tmp_path: Path) -> None:
    assert _try(tmp_path, _paused, end=SILENT_S + 4)


def test_device_that_is_only_silent_is_not_dead(tmp_path: Path) -> None:
    assert _try(tmp_path, _nothing, end=SILENT_S + 4)


def test_device_that_was_never_reached_is_not_dead_because_its_firewall_refuses(tmp_path: Path) -> None:
    assert _try(tmp_path, _gone, end=SILENT_S + 4, met=False)
