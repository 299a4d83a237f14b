"""Devices on 127.0.0.1 for tests: a transport and a board each, with a p2pd of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from p2pcollab.daemon.board import Board
from p2pcollab.daemon.interfaces import Interface
from p2pcollab.daemon.transport import Transport
from p2pcollab.keys import Identity, RunKeys
from p2pcollab.records import DeviceRecord
from p2pcollab.run import RunId
from p2pcollab.wire import (
    Earlier,
    EarlierReply,
    Exchange,
    ExchangeReply,
    Fetch,
    Hello,
    HelloReply,
    Push,
    PushReply,
)

LOOPBACK = Interface(name="lo", address="127.0.0.1", prefix_bits=8)
RUN = RunId("5e" * 32)
HELLO = Hello(run_prefix=RUN[:14], version=1)
NAME = "grandmothers-laptop"


def fresh_keys() -> RunKeys:
    return RunKeys.derive(os.urandom(16))


class Answers:
    """Handlers that answer from attributes, and remember who asked."""

    def __init__(self) -> None:
        self.spec = b"the run spec"
        self.shards: dict[str, bytes] = {}
        self.earlier_of: dict[tuple[str, str], bytes] = {}
        self.callers: list[str] = []
        self.error: Exception | None = None
        self.stuck = False

    async def hello(self, peer: str, request: Hello) -> HelloReply:
        self.callers.append(peer)
        if self.error is not None:
            raise self.error
        if self.stuck:
            await asyncio.Future()
        return HelloReply(spec=self.spec)

    async def exchange(self, peer: str, request: Exchange) -> ExchangeReply:
        return ExchangeReply(root=request.root, entries=(), want=())

    async def push(self, peer: str, request: Push) -> PushReply:
        return PushReply(accepted=len(request.entries))

    async def earlier(self, peer: str, request: Earlier) -> EarlierReply:
        return EarlierReply(entry=self.earlier_of.get((request.shard, request.device), b""))

    async def fetch(self, peer: str, request: Fetch) -> bytes | None:
        return self.shards.get(request.digest)


class Device:
    """One device. Its clock can be set."""

    def __init__(
        self, keys: RunKeys, folder: Path, *, observer: bool = False, clock_off_s: float = 0
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.keys = keys
        self.clock_off_s = clock_off_s
        self.identity = Identity.create()
        self.answers = Answers()
        self.transport = Transport(
            self.identity, keys, LOOPBACK, self.answers, folder=folder, clock=self.clock
        )
        self.board = Board(self.transport, keys, self.identity, RUN, observer=observer, clock=self.clock)

    def clock(self) -> float:
        return time.time() + self.clock_off_s

    def record(self, **changes: Any) -> DeviceRecord:
        fields: dict[str, Any] = {
            "run_id": RUN,
            "device": self.identity.device,
            "name": NAME,
            "beat": self.board.next_beat(),
            "state": "idle",
            "speed": 1e9,
            "budget": 1.0,
            "class_counts": (100,) * 10,
            "addresses": (str(self.transport.address),),
        }
        return DeviceRecord(**(fields | changes))

    async def publish(self, **changes: Any) -> int:
        return await self.board.publish(self.record(**changes))

    async def names(self) -> dict[str, str]:
        return {record.device: record.name for record in await self.board.read()}


@contextlib.asynccontextmanager
async def devices(
    folder: Path, *keys: RunKeys, meet: bool = True, **options: Any
) -> AsyncIterator[tuple[Device, ...]]:
    """One device per key; all meet the first."""
    made = tuple(Device(key, folder / f"device{index}", **options) for index, key in enumerate(keys))
    try:
        await asyncio.gather(*(device.transport.start() for device in made))
        for device in made:
            await device.board.start()
        if meet:
            for device in made[1:]:
                await introduce(device, made[0])
        yield made
    finally:
        for device in made:
            await device.board.stop()
            await device.transport.stop()


async def introduce(one: Device, other: Device) -> None:
    """Have two devices meet. The board, too, calls again when a call has taken longer than its deadline."""
    await until_true(lambda: one.board.meet(other.transport.address), 45.0)


async def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """Wait for a condition that other processes bring about."""

    async def holds() -> bool:
        return condition()

    await until_true(holds, deadline_s)


async def until_true(attempt: Callable[[], Awaitable[bool]], deadline_s: float = 10.0) -> None:
    """Wait for what can be known only by asking or trying: other processes do not announce what they do.

    The pause spares the processor, and the deadline ends a test that fails; no result depends on either.
    """
    end = time.monotonic() + deadline_s
    while not await attempt():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)
