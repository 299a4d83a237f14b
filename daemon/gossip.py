"""Gossip: ledgers spread from device to device until they are equal.

Pull-based anti-entropy every `ROUND_S`, and a push of new contributions to a few devices at once, which
spares most rounds their work. Handlers answer from the ledger and the store; nothing here decides what to
train. What comes in goes through `intake`; shards are fetched by `fetching`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import anyio
import structlog

from .. import limits
from ..errors import IncompatibleError, NotAuthorisedError, P2PCollabError, PeerError, StorageError
from ..keys import device_of_peer
from ..run import PROTOCOL_VERSION, DeviceId, ShardId
from ..wire import (
    Earlier,
    EarlierReply,
    Exchange,
    ExchangeReply,
    Fetch,
    Hello,
    HelloReply,
    Push,
    PushReply,
    encode_contribution,
    first_page,
)
from .board import Board
from .calls import RefusalError, UnreachableError
from .intake import Intake
from .peer_ids import PeerIds
from .renewal import Renewal
from .session import Session

log = structlog.get_logger()

#: Longer: news that a push missed arrives later. Shorter: more messages when nothing happens.
ROUND_S: Final = 2.0
#: Pages of one exchange; what is more is left to the next round.
_PAGES_MAX: Final = 32


class Gossip:
    """One device's part in it: the answers to its peers, and its own questions."""

    def __init__(
        self, session: Session, board: Board, renewal: Renewal, intake: Intake, peer_ids: PeerIds
    ) -> None:
        self._session = session
        self._board = board
        self._renewal = renewal
        self._intake = intake
        self._peer_ids = peer_ids
        #: Devices that have fetched each of this device's shards: whether its work outlives it.
        self.fetched_by: dict[str, set[DeviceId]] = {}

    # Answers to peers: `calls.Handlers`

    async def hello(self, peer: str, request: Hello) -> HelloReply:
        """Give the run spec."""
        del peer
        if request.version != PROTOCOL_VERSION:
            raise IncompatibleError(
                f"this device speaks protocol version {PROTOCOL_VERSION}, the other one {request.version}",
                "install the same version of p2pcollab on all devices",
            )
        if not self._session.run_id.startswith(request.run_prefix):
            raise RefusalError("not-found", "this device takes part in another run")
        return HelloReply(spec=self._session.store.spec)

    async def exchange(self, peer: str, request: Exchange) -> ExchangeReply:
        """Compare ledgers."""
        del peer
        ledger = self._session.coordinator.ledger
        root = ledger.digest()
        if request.root == root:
            return ExchangeReply(root=root, entries=(), want=())
        theirs = request.summary_map()
        newer = ledger.newer_than(theirs)
        if request.shards:
            newer = tuple(entry for entry in newer if entry.shard in request.shards)
        return ExchangeReply(
            root=root, entries=first_page(map(encode_contribution, newer)), want=ledger.older_than(theirs)
        )

    async def push(self, peer: str, request: Push) -> PushReply:
        """Take contributions and the caller's record."""
        if request.record:
            self._board.learn(request.record, device_of_peer(peer))
            await self.observe(fresh=False)
        return PushReply(accepted=len(self._intake.take(request.entries, device_of_peer(peer))))

    async def earlier(self, peer: str, request: Earlier) -> EarlierReply:
        """Say what is held of a device's contributions to a shard."""
        del peer
        session = self._session
        entry = session.coordinator.newest_here(request.shard, request.device, session.store.digests())
        return EarlierReply(entry=b"" if entry is None else encode_contribution(entry))

    async def fetch(self, peer: str, request: Fetch) -> bytes | None:
        """A shard's bytes."""
        data = await asyncio.to_thread(self._session.store.get_shard, request.digest)
        if data is not None:
            self.fetched_by.setdefault(request.digest, set()).add(device_of_peer(peer))
        return data

    # The board

    async def observe(self, *, fresh: bool = True) -> None:
        """Let the coordinator see the board; `fresh`: read it anew first."""
        session = self._session
        # A reading takes as long as the slowest node that is asked: what it shows is as old as its beginning.
        began = session.clock()
        records = await self._board.read() if fresh else self._board.newest()
        others = [
            record
            for record in records
            if record.device != session.device and record.device not in session.forgotten
        ]
        for record in others:
            session.names[DeviceId(record.device)] = record.name
        complete = session.coordinator.complete
        self._renewal.learn_peers(DeviceId(record.device) for record in others)
        if fresh:
            session.coordinator.observe_board(others, began)
        else:
            session.coordinator.hear(others, began)
        # What was held back may count from now on.
        self._intake.tell_refusals()
        self._intake.tell_completion(complete)

    # Rounds

    async def run(self) -> None:
        """Exchange ledgers with some devices in each round, for ever."""
        session = self._session
        while True:
            partners = session.coordinator.partners(session.clock())
            async with anyio.create_task_group() as tasks:
                for device in partners:
                    tasks.start_soon(self.exchange_with, device)
            # Rounds of all devices at the same moments would come in bursts; the jitter spreads them.
            await anyio.sleep(ROUND_S * (0.75 + 0.5 * session.random.random()))

    async def exchange_all(self) -> None:
        """Exchange ledgers with every live device, once."""
        async with anyio.create_task_group() as tasks:
            for device in self._session.coordinator.live(self._session.clock()):
                if device != self._session.device:
                    tasks.start_soon(self.exchange_with, device)

    async def exchange_with(self, device: DeviceId) -> None:
        """Make this ledger and a device's equal, as far as it answers."""
        peer = self._peer_ids.peer_of(device)
        if peer is None:
            return
        await self._renewal.compare(peer)
        try:
            for shards in self._pages():
                for _ in range(_PAGES_MAX):
                    if not await self._exchange_page(device, peer, shards):
                        break
        except UnreachableError:
            return
        except (PeerError, NotAuthorisedError, StorageError) as error:
            log.warning("exchange failed", device=device, reason=str(error))

    def _pages(self) -> list[tuple[ShardId, ...]]:
        """The shards that one message's summary can cover, page by page; empty: all in one."""
        if len(self._session.coordinator.ledger) <= limits.SUMMARY_ENTRIES_MAX:
            return [()]
        size = limits.SUMMARY_ENTRIES_MAX // limits.DEVICES_MAX
        shards = self._session.spec.shards
        return [shards[start : start + size] for start in range(0, len(shards), size)]

    async def _exchange_page(self, device: DeviceId, peer: str, shards: tuple[ShardId, ...]) -> bool:
        """One message pair, and a push where the other side lacks something; whether there may be more."""
        ledger = self._session.coordinator.ledger
        summary = {key: mark for key, mark in ledger.summary().items() if not shards or key[0] in shards}
        reply = await self._session.transport.exchange(
            peer, Exchange.create(ledger.digest(), summary, shards)
        )
        new = self._intake.take(reply.entries, device)
        lacking = [entry for key in reply.want if (entry := ledger.get(*key)) is not None]
        page = first_page(map(encode_contribution, lacking))
        if page:
            await self._session.transport.push(peer, Push(entries=page))
        return bool(new) or len(page) < len(lacking)

    async def spread_news(self) -> None:
        """Push what is new here, for ever.

        Beside the work, because a device that has just died answers nothing for seconds.
        """
        news = self._intake.news
        async with anyio.create_task_group() as tasks:
            while True:
                await news.bell.wait(ROUND_S)
                while news.waiting:
                    entries = first_page(map(encode_contribution, news.waiting.popleft()))
                    devices = self._session.coordinator.hints(self._session.clock())
                    push = Push(entries=entries, record=self._board.sealed)
                    tasks.start_soon(self._push_to, devices, push)

    async def hand_over(self) -> None:
        """Wait until another device holds what only this one has made, for as long as there are others.

        The frontier's tensors are fetched by their quota of devices within seconds; this only waits for it.
        """
        session = self._session
        while len(session.coordinator.live(session.clock())) > 1:
            own = [
                entry.tensors_digest
                for shard in session.spec.shards
                for entry in session.coordinator.believed.frontier(shard)
                if entry.device == session.device
            ]
            if all(self.fetched_by.get(digest) for digest in own):
                return
            await self.exchange_all()
            await anyio.sleep(0.25)

    async def say_goodbye(self) -> None:
        """Tell every live device that this one leaves."""
        devices = self._session.coordinator.live(self._session.clock())
        await self._push_to(devices, Push(entries=(), record=self._board.sealed))

    async def _push_to(self, devices: Sequence[DeviceId], push: Push) -> None:
        async def send(peer: str) -> None:
            try:
                await self._session.transport.push(peer, push)
            except P2PCollabError as error:
                log.info("push failed", peer=peer, reason=str(error))

        async with anyio.create_task_group() as tasks:
            for device in devices:
                peer = self._peer_ids.peer_of(device)
                if peer is not None and device != self._session.device:
                    tasks.start_soon(send, peer)
