"""One device's life: start the network, find the run, take part, leave.

What belongs to a known run is the `Member`'s; nothing here decides about training.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import structlog
from anyio.abc import TaskGroup

from .. import limits
from ..errors import NotAuthorisedError, P2PCollabError, PeerError, RunError, StorageError
from ..keys import Identity, RunKeys
from ..run import PROTOCOL_VERSION, JoinCode, RunSpec
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
)
from . import opening
from . import status as views
from .addresses import AddressBook, PeerAddress
from .calls import Handlers, RefusalError
from .discovery import Announcement, Discovery
from .events import Event, EventLog
from .interfaces import Interface, choose_interface
from .model_file import ModelFile
from .network_watch import NetworkWatch
from .options import DaemonOptions
from .p2pd import P2PD_MARK, check_port_is_free, end_stale_p2pd
from .store import RunStore, Store
from .supervision import P2pdKeeper
from .timings import Timings
from .trainer import Budget, Trainer

if TYPE_CHECKING:
    # They import hivemind, which takes seconds: `_start_network` does that in a thread.
    from .member import Member
    from .transport import Transport

log = structlog.get_logger()

_NO_PEERS_AFTER_S: Final = 15.0
#: A refusal may come from an impostor: an honest device has this long to answer.
_REFUSED_AFTER_S: Final = 6.0
#: Between two attempts to start discovery on a new interface.
_DISCOVER_AGAIN_S: Final = 1.0

Result = TypeVar("Result")


class Node:
    """The daemon, from the options to the end. Also the API's port (`api.NodePort`)."""

    def __init__(
        self, options: DaemonOptions, store: Store, *, started: float, visitor: bool = False
    ) -> None:
        """
        Args:
            started: when this process was started, on the clock of `time.monotonic`.
            visitor: only looks: it does not announce itself, and shows no record.

        Raises:
            UsageError: the options cannot be.
            NotAuthorisedError: the join code is not that of the run that is known here.
            StorageError: the state folder refused.
        """
        self._store = store
        self._visitor = visitor
        self.timings = Timings(started)
        self.code, self.run_store = opening.open_run(options, store)
        self.events = EventLog(time.time, opening.earlier_events(self.run_store), sink=self._keep_event)
        self.options = opening.remembered(options, self.run_store)
        self.interface = choose_interface(self.options.interface)
        self.identity = Identity.from_bytes(store.identity_seed())
        self.name = views.printable_name(self.options.nickname)
        self._keys = RunKeys.derive(self.code.secret)
        self._trainer = Trainer(Budget.plan(self.options.share_of_machine, self.options.threads).threads)
        #: How far the start is; once the run is known, its member's word counts.
        self.phase = "starting"
        self.transport: Transport | None = None
        self.member: Member | None = None
        self.discovery: Discovery | None = None
        self._keeper: P2pdKeeper | None = None
        self._run_known = anyio.Event()
        #: Another device of the run has answered as one.
        self._met = anyio.Event()
        self._leaving = anyio.Event()

    # The API's port

    def status(self) -> dict[str, Any]:
        """The state of the device, its run and its peers, as JSON values."""
        return views.status(self)

    def run_info(self) -> dict[str, Any]:
        """The run spec, its id and the join code."""
        spec = self.member.session.spec if self.member else None
        return {
            "join_code": str(self.code),
            "id": spec.run_id if spec else None,
            "spec": spec.model_dump(mode="json") if spec else None,
        }

    def history(self, after: int) -> list[dict[str, Any]]:
        """Points of the metrics history with a greater id, oldest first."""
        if self.run_store is None:
            return []
        return [
            {"id": id, "time": at, "series": series, **fields}
            for id, at, series, fields in self.run_store.metrics(after)
        ]

    def leave(self) -> None:
        """Begin to leave."""
        self._leaving.set()

    async def forget(self, device: str) -> dict[str, Any]:
        """Shut a device out of the run."""
        member = await self._joined()
        return {**await member.renewal.forget(device), "join_code": str(self.code)}

    async def assemble(self) -> ModelFile:
        """The global model: what is missing here is fetched first."""
        member = await self._joined()
        return await member.assemble()

    async def _joined(self) -> Member:
        """This device's part in the run, once it takes part.

        Raises:
            P2PCollabError: the run is not known yet.
        """
        if self.member is None:
            raise P2PCollabError(
                "the run is not known yet: no device of it was found so far",
                "wait, or see `p2pcollab status`",
            )
        # It is known a moment before the board has started, which on a busy machine may be seconds.
        await self._run_known.wait()
        return self.member

    # Life

    async def run(self, ready: Callable[[int], None], leaving: Callable[[], None] = lambda: None) -> None:
        """Live until `leave`; `ready` is told the API's port, and `leaving` that the end has begun.

        Raises:
            P2PCollabError: why it could not go on.
        """
        # One that outlived a killed daemon would hold the port.
        end_stale_p2pd(self.options.state / P2PD_MARK)
        if self.options.port:
            # Now, and not where p2pd starts: whoever detaches from the daemon still hears of it.
            check_port_is_free(self.interface.address, self.options.port)
        # It imports torch, which takes longest of all that follows.
        await self._trainer.start()
        api_module = await asyncio.to_thread(importlib.import_module, ".api", __package__)
        api = api_module.ApiServer(self, self.options.state)
        try:
            ready(await api.start())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._live, tasks)
                await self._leaving.wait()
                self.phase = "leaving"
                leaving()
                if self.member is not None and self._run_known.is_set():
                    await self.member.drain()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._stop()
                await api.stop()

    async def visit(self, work: Callable[[Node], Awaitable[Result]], within_s: float) -> Result:
        """Find the run, see its board and its ledger, do `work`, and go.

        Raises:
            TimeoutError, P2PCollabError: no device of the run answered in time, or why it could not be; alone
                or in a group.
        """
        await self._trainer.start()
        try:
            # Before the clock runs: a small device needs longer for its imports than to find others.
            transport = await self._start_network()
            async with anyio.create_task_group() as tasks:
                with anyio.fail_after(within_s):
                    member = await self._find_run(tasks, transport)
                    await self._met.wait()
                    await member.look_around()
                await member.load_data()
                result = await work(self)
                tasks.cancel_scope.cancel()
            return result
        finally:
            with anyio.CancelScope(shield=True):
                await self._stop()

    async def _live(self, tasks: TaskGroup) -> None:
        transport = await self._start_network()
        member = await self._find_run(tasks, transport)
        assert self.discovery is not None
        await self.discovery.announce(self._announcement(member, transport))
        tasks.start_soon(
            NetworkWatch(
                lambda: self.interface,
                self.options.interface,
                lambda: member.rejoining.isolated,
                partial(self._move, tasks, member, transport),
            ).run
        )
        tasks.start_soon(self._end_when_shut_out, member)
        self.events.add("joined", f"takes part in {member.session.spec.name!r} on {transport.address}")
        await member.run(tasks)

    def _announcement(self, member: Member, transport: Transport) -> Announcement:
        return Announcement(
            run_prefix=self.code.run_prefix,
            name=member.session.spec.name,
            peer=self.identity.peer_id,
            port=transport.port,
        )

    async def _move(
        self, tasks: TaskGroup, member: Member, transport: Transport, interface: Interface
    ) -> None:
        """Be at another address from now on: p2pd there, the board with it, and an announcement of it."""
        assert self._keeper is not None and self.discovery is not None
        before, self.interface = self.interface, interface
        transport.move(interface, port=self.options.port)
        await self._keeper.move(
            f"goes from {before.name} ({before.address}) to {interface.name} ({interface.address})"
        )
        member.session.record_bell.ring()
        with contextlib.suppress(OSError):
            await self.discovery.stop()
        tasks.start_soon(self._discover_from, interface, tasks, member, transport)

    async def _discover_from(
        self, interface: Interface, tasks: TaskGroup, member: Member, transport: Transport
    ) -> None:
        """Start discovery where this device is now, however long that takes, unless it moves on meanwhile."""
        discovery = Discovery(interface, self.identity.peer_id, self.code.run_prefix)
        while self.interface == interface:
            try:
                await discovery.start(self._announcement(member, transport))
            except RunError as error:
                # An address that has just come takes no multicast for a moment.
                member.session.warn("discovery", str(error))
                await anyio.sleep(_DISCOVER_AGAIN_S)
                continue
            member.session.warnings.pop("discovery", None)
            if self.interface != interface:
                await discovery.stop()
                return
            self.discovery = discovery
            tasks.start_soon(self._watch_discovery, tasks)
            return

    def _ask_again(self) -> None:
        if self.discovery is not None:
            self.discovery.ask_again()

    async def _find_run(self, tasks: TaskGroup, transport: Transport) -> Member:
        """Look for devices until the run is known; they are met from then on."""
        if self.run_store is not None:
            await self._join(self.run_store)
        tasks.start_soon(self._watch_discovery, tasks)
        assert self._keeper is not None
        tasks.start_soon(self._keeper.run)
        if not self._visitor:
            tasks.start_soon(self._warn_when_alone)
        given = (PeerAddress.parse_option(text) for text in self.options.peers)
        for address in (*given, *transport.known_addresses):
            tasks.start_soon(self._try_address, address)
        if not self._run_known.is_set():
            self.phase = "discovering"
            await self._run_known.wait()
        assert self.member is not None
        return self.member

    async def _start_network(self) -> Transport:
        # In a thread, so that the API answers meanwhile; it takes 2 s.
        await asyncio.to_thread(importlib.import_module, ".member", __package__)
        from .transport import Transport

        self.timings.done("imports")
        self.transport = Transport(
            self.identity,
            self._keys,
            self.interface,
            _Doorman(self),
            folder=self.options.state,
            port=self.options.port or opening.saved_port(self.run_store, self.interface.address),
            book=AddressBook(opening.saved_addresses(self.run_store)),
        )
        await self.transport.start()
        self._keeper = P2pdKeeper(self.transport, self._trainer, self.events, self._relink)
        await self._keeper.guard()
        self.discovery = Discovery(self.interface, self.identity.peer_id, self.code.run_prefix)
        await self.discovery.start()
        self.timings.done("p2pd")
        return self.transport

    async def _stop(self) -> None:
        for part in (self.discovery, self.member, self.transport):
            if part is not None:
                with contextlib.suppress(P2PCollabError, asyncio.TimeoutError):
                    await part.stop()
        await self._trainer.close()
        if self.run_store is not None:
            self.run_store.close()

    async def _join(self, run_store: RunStore) -> None:
        """The run is known: set up what needs its spec."""
        from .member import Member

        assert self.transport is not None
        self.run_store = run_store
        self._store.current = run_store.run_id
        self.member = Member(
            run_store,
            self.options,
            self.identity,
            self._keys,
            self.transport,
            self._trainer,
            self.events,
            self.timings,
            name=self.name,
            visitor=self._visitor,
            ask_again=self._ask_again,
            on_secret=self._new_secret,
        )
        await self.member.start()
        self._run_known.set()

    def _new_secret(self, secret: bytes) -> None:
        assert self.run_store is not None
        self.code = JoinCode.create(secret, self.run_store.run_id)

    async def _end_when_shut_out(self, member: Member) -> None:
        await member.renewal.ended.wait()
        assert member.renewal.shut_out is not None
        raise member.renewal.shut_out

    # Peers

    async def _watch_discovery(self, tasks: TaskGroup) -> None:
        assert self.discovery is not None
        gate = anyio.Semaphore(limits.ADDRESSES_TRIED_AT_ONCE)
        async for found in self.discovery:
            if found.version != PROTOCOL_VERSION:
                self.events.add(
                    "incompatible",
                    f"{found.address.host} uses protocol version {found.version}, this device "
                    f"{PROTOCOL_VERSION}: install the same version of p2pcollab on both",
                )
                continue
            # Not one after the other: a dead address takes seconds. Nor all at once: anybody can announce.
            await gate.acquire()
            tasks.start_soon(self._try_announced, found.address, gate)

    async def _try_announced(self, address: PeerAddress, gate: anyio.Semaphore) -> None:
        try:
            refusal = await self._meet(address)
        finally:
            gate.release()
        if refusal is not None:
            await self._refused(refusal)

    async def _try_address(self, address: PeerAddress) -> None:
        refusal = await self._meet(address)
        if refusal is not None:
            await self._refused(refusal)

    async def _meet(self, address: PeerAddress) -> NotAuthorisedError | None:
        """Meet a device at an address, and ask it for the run spec while that is unknown; its refusal."""
        try:
            if self.member is None:
                await self._ask_for_spec(address)
            await self._run_known.wait()
            if self.member is not None and self.member.renewal.unproved:
                # The board swallows why a device does not answer.
                assert self.transport is not None
                await self.transport.connect(address)
                await self.transport.prove(address.peer)
            if self.member is not None and await self.member.board.meet(address):
                self.timings.done("discovery")
                self._met.set()
                self.member.session.record_bell.ring()
        except NotAuthorisedError as error:
            return error
        except P2PCollabError as error:
            log.info("address failed", address=str(address), reason=str(error))
        return None

    async def _ask_for_spec(self, address: PeerAddress) -> None:
        assert self.transport is not None
        self.phase = "fetching-spec"
        await self.transport.connect(address)
        hello = Hello(run_prefix=self.code.run_prefix, version=PROTOCOL_VERSION)
        reply = await self.transport.hello(address.peer, hello)
        spec = RunSpec.decode(reply.spec)
        if not spec.run_id.startswith(self.code.run_prefix):
            raise PeerError("the run spec is not the one that the join code names")
        self.timings.done("discovery")
        if self.member is None:
            await self._join(self._store.create_run(reply.spec, self.code.secret))

    async def _refused(self, error: NotAuthorisedError) -> None:
        """Give up when nobody of the run accepts the join code."""
        self.events.add("refused", str(error))
        await anyio.sleep(_REFUSED_AFTER_S)
        if self.member is None or self.member.renewal.unproved:
            raise error

    async def _warn_when_alone(self) -> None:
        await anyio.sleep(_NO_PEERS_AFTER_S)
        if self.timings.has("discovery") or self.transport is None:
            return
        text = (
            f"no other device of this run was found on {self.interface.name} ({self.interface.address}) in "
            f"{_NO_PEERS_AFTER_S:.0f} s: are both on the same network, is multicast let through (UDP port "
            f"5353), and TCP port {self.transport.port}? Another interface: --interface; an address: --peer"
        )
        if self.member is not None:
            self.member.session.warn("alone", text)
        else:
            self.events.add("warning", text)

    async def _relink(self) -> None:
        if self.member is not None and self._run_known.is_set():
            await self.member.relink()

    def _keep_event(self, event: Event) -> None:
        log.info(event.kind, text=event.text)
        if self.run_store is not None:
            with contextlib.suppress(StorageError):
                self.run_store.add_event(event.id, event.time, event.kind, event.text, event.fields)


class _Doorman:
    """Answers peers from the first moment on: before the run is known there is nothing to answer with."""

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def _gossip(self) -> Handlers:
        if self._node.member is None:
            raise RefusalError("not-ready", "this device only just starts")
        return self._node.member.gossip

    async def hello(self, peer: str, request: Hello) -> HelloReply:
        """Give the run spec."""
        return await self._gossip.hello(peer, request)

    async def exchange(self, peer: str, request: Exchange) -> ExchangeReply:
        """Compare ledgers."""
        return await self._gossip.exchange(peer, request)

    async def push(self, peer: str, request: Push) -> PushReply:
        """Take contributions and the caller's record."""
        return await self._gossip.push(peer, request)

    async def earlier(self, peer: str, request: Earlier) -> EarlierReply:
        """Say what is held of a device's contributions to a shard."""
        return await self._gossip.earlier(peer, request)

    async def fetch(self, peer: str, request: Fetch) -> bytes | None:
        """The whole shard; None if it is not held."""
        return await self._gossip.fetch(peer, request)
