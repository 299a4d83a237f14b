"""One device's life in one run: find it, take part, leave.

Composes the parts; decides nothing about training (`coordinator`) and nothing about form (`status`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import anyio
import psutil
import structlog
from anyio.abc import TaskGroup

from .. import __version__
from ..coordinator import Advert, Coordinator, CoordinatorSettings
from ..errors import NotAuthorisedError, P2PCollabError, PeerError, StorageError, UsageError
from ..holdings import ReplicationSettings
from ..keys import Identity, RunKeys
from ..run import PROTOCOL_VERSION, JoinCode, RunSpec, ShardId
from . import status as views
from .addresses import AddressBook, PeerAddress
from .events import Event, EventLog
from .interfaces import choose_interface
from .model_file import ModelFile
from .options import DaemonOptions
from .p2pd import P2PD_MARK, check_port_is_free, end_stale_p2pd
from .session import Counters, Session
from .store import RunStore, Store
from .timings import Timings
from .trainer import Budget, DataSummary, Trainer, TrainerSettings

log = structlog.get_logger()

Result = TypeVar("Result")

#: A beat of this device's record. The lease term is four of them.
_BEAT_S: Final = 2.0
_NO_PEERS_AFTER_S: Final = 15.0
#: A refusal may come from an impostor: an honest device has this long to answer.
_REFUSED_AFTER_S: Final = 6.0
_DRAIN_S: Final = 12.0
#: How long a leaving device waits for others to fetch what only it holds.
_HANDOVER_S: Final = 6.0
#: How long an assembly looks for shards that nobody gives: longer than a holder is left in peace after it
#: failed to give one.
_HARVEST_S: Final = 12.0
_SAVE_S: Final = 5.0
_P2PD_BACKOFF_S: Final = (0.2, 1.0, 3.0, 10.0)


class Node:
    """The daemon's parts, from the options to the end. Also the API's port (`api.NodePort`)."""

    def __init__(self, options: DaemonOptions, store: Store, *, started: float, visitor: bool = False) -> None:
        """
        Args:
            started: when this process was started, on the clock of `time.monotonic`.
            visitor: only looks: it does not announce itself, and shows no record.

        Raises:
            UsageError: the options cannot be.
            StorageError: the state folder refused.
        """
        self.store = store
        self._visitor = visitor
        self.timings = Timings(started)
        self.phase = "starting"
        self.session: Session | None = None
        self.data: DataSummary | None = None
        self.speed_macs_s = 0.0
        self.api_port = 0
        self.code, self.run_store = _open_run(options, store)
        self.events = EventLog(time.time, _earlier_events(self.run_store), sink=self._keep_event)
        self.options = _remembered(options, self.run_store)
        self.interface = choose_interface(self.options.interface)
        self.budget = Budget.plan(self.options.budget, self.options.threads)
        self.trainer = Trainer(self.budget.threads)
        self.identity = Identity.from_bytes(store.identity_seed())
        self.keys = RunKeys.derive(self.code.secret)
        self.gossip: Any = None  # set once hivemind is imported, and the run is known
        self.board: Any = None
        self.transport: Any = None
        self.worker: Any = None
        self._discovery: Any = None
        self._refused_since: float | None = None
        self._spec_known = anyio.Event()
        self._leaving = anyio.Event()
        self._worker_done = anyio.Event()
        self._publishing = anyio.Lock()

    # The API's port

    def status(self) -> dict[str, Any]:
        """The state of the device, its run and its peers, as JSON values."""
        return views.status(self)

    def run_info(self) -> dict[str, Any]:
        """The run spec, its id and the join code."""
        spec = self.session.spec if self.session else None
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

    async def assemble(self) -> ModelFile:
        """The global model: what is missing here is fetched first."""
        session = self._joined()
        await self.gossip.exchange_all()
        deadline = session.clock() + _HARVEST_S
        while True:
            wants = session.coordinator.harvest(session.store.digests(), session.clock())
            if not wants or session.clock() > deadline:
                break
            await self.gossip.fetch_all(wants)
            # A device that could not give something just now is asked again after a while.
            await anyio.sleep(0 if session.store.has(wants[0].digest) else 0.5)
        held = session.store.digests()
        frontiers = {
            shard: tuple(
                entry for entry in session.coordinator.ledger.frontier(shard) if entry.tensors_digest in held
            )
            for shard in session.spec.shards
        }
        return await session.trainer.assemble(frontiers, session.store.get_shard)

    def _joined(self) -> Session:
        if self.session is None:
            raise P2PCollabError(
                "the run is not known yet: no device of it was found so far",
                "wait, or see `p2pcollab status`",
            )
        return self.session

    # Life

    async def run(self, ready: Callable[[int], None]) -> None:
        """Live until `leave`; `ready` is told the API's port.

        Raises:
            P2PCollabError: why it could not go on.
        """
        # It imports torch, which takes longest of all that follows.
        await self.trainer.start()
        api_module = await asyncio.to_thread(importlib.import_module, ".api", __package__)
        api = api_module.ApiServer(self, self.options.state)
        try:
            self.api_port = await api.start()
            ready(self.api_port)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._live, tasks)
                await self._leaving.wait()
                await self._drain()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._stop_network()
                await self.trainer.close()
                await api.stop()
                if self.run_store is not None:
                    self._save()
                    self.run_store.close()

    async def visit(self, work: Callable[[Node], Awaitable[Result]], within_s: float) -> Result:
        """Find the run, see its board and its ledger, do `work`, and go.

        Raises:
            TimeoutError: no device of the run answered in time.
            P2PCollabError: why it could not be.
        """
        await self.trainer.start()
        try:
            async with anyio.create_task_group() as tasks:
                with anyio.fail_after(within_s):
                    session = await self._find_run(tasks)
                    while not self.timings.has("discovery"):
                        await session.record_bell.wait(within_s)
                    await self.gossip.observe()
                    await self.gossip.exchange_all()
                await self._load_data(session)
                result = await work(self)
                tasks.cancel_scope.cancel()
            return result
        finally:
            with anyio.CancelScope(shield=True):
                await self._stop_network()
                await self.trainer.close()
                if self.run_store is not None:
                    self.run_store.close()

    async def _find_run(self, tasks: TaskGroup) -> Session:
        """Start the network, and look for devices until the run is known; they are met from then on."""
        await self._start_network()
        if self.run_store is not None:
            self._join(self.run_store)
            await self.board.start()
            self._spec_known.set()
        tasks.start_soon(self._watch_discovery, tasks)
        tasks.start_soon(self._watch_p2pd)
        if not self._visitor:
            tasks.start_soon(self._warn_when_alone)
        for text in self.options.peers:
            tasks.start_soon(self._try_address, PeerAddress.parse_option(text))
        for address in self.transport.known_addresses:
            tasks.start_soon(self._try_address, address)
        if self.session is None:
            self.phase = "discovering"
            await self._spec_known.wait()
        return self._joined()

    async def _live(self, tasks: TaskGroup) -> None:
        session = await self._find_run(tasks)
        await self._announce(session)
        tasks.start_soon(self.board.maintain)
        tasks.start_soon(self._beat)
        tasks.start_soon(self.gossip.run)
        tasks.start_soon(self.gossip.fetch_wanted)
        tasks.start_soon(self._save_regularly)
        tasks.start_soon(self._collect_garbage)
        await self._prepare_training(session)
        await self.worker.run()
        self._worker_done.set()

    async def _start_network(self) -> None:
        # In a thread, so that the API answers meanwhile; it takes 2 s.
        network = await asyncio.to_thread(_import_network)
        self.timings.done("imports")
        # It would hold the port of last time.
        end_stale_p2pd(self.options.state / P2PD_MARK)
        book = AddressBook(_saved_addresses(self.run_store))
        self.transport = network.transport.Transport(
            self.identity,
            self.keys,
            self.interface,
            _Doorman(self),
            folder=self.options.state,
            port=self.options.port or _saved_port(self.run_store, self.interface.address),
            book=book,
        )
        self._network = network
        await self.transport.start()
        await self._guard_p2pd()
        self._discovery = network.discovery.Discovery(
            self.interface, self.identity.peer_id, self.code.run_prefix
        )
        await self._discovery.start()
        self.timings.done("p2pd")

    async def _stop_network(self) -> None:
        for part in (self._discovery, self.board, self.transport):
            if part is not None:
                with contextlib.suppress(P2PCollabError, asyncio.TimeoutError):
                    await part.stop()

    async def _guard_p2pd(self) -> None:
        """Whoever outlives the daemon ends its p2pd: the trainer notices the daemon's death at once."""
        pid = self.transport.p2pd_pid
        with contextlib.suppress(psutil.NoSuchProcess):
            await self.trainer.guard(pid, psutil.Process(pid).create_time())

    def _join(self, run_store: RunStore) -> None:
        """The run is known: set up what needs its spec."""
        spec = RunSpec.decode(run_store.spec)
        self.run_store = run_store
        self.store.current = spec.run_id
        rng = random.Random(self.identity.seed + run_store.run_id.encode())
        session = Session(
            spec=spec,
            run_id=spec.run_id,
            identity=self.identity,
            keys=self.keys,
            store=run_store,
            coordinator=Coordinator(
                spec,
                self.identity.device,
                Advert(speed=1.0, class_counts=(0,) * len(spec.classes), works=False),
                CoordinatorSettings(
                    replication=ReplicationSettings(replicate_all=self.options.replicate_all)
                ),
                rng,
                first_beat=round(time.time() * 1000),
            ),
            transport=self.transport,
            trainer=self.trainer,
            events=self.events,
            counters=Counters.restore(run_store.meta().get("counters")),
            own_name=self.device_name,
            random=rng,
        )
        self.board = self._network.board.Board(
            self.transport, self.keys, self.identity, spec.run_id, observer=self._visitor
        )
        self.gossip = self._network.gossip.Gossip(session, self.board)
        self.worker = self._network.work.Worker(
            session,
            self.gossip,
            self.publish,
            on_first_step=lambda: self.timings.done("first_step"),
            on_claim=lambda: self.timings.done("allotment"),
        )
        self.gossip.restore(run_store.load_contributions())
        for notice in run_store.notices():
            session.warn("store", notice)
        run_store.set_meta({"options": self.options.model_dump(mode="json")})
        self.session = session

    async def _announce(self, session: Session) -> None:
        await self._discovery.announce(
            self._network.discovery.Announcement(
                run_prefix=self.code.run_prefix,
                name=session.spec.name,
                peer=self.identity.peer_id,
                port=self.transport.port,
            )
        )
        self.events.add("joined", f"takes part in {session.spec.name!r} on {self.transport.address}")

    async def _load_data(self, session: Session) -> DataSummary:
        self.phase = "loading"
        self.data = await session.trainer.configure(
            session.spec,
            TrainerSettings(
                source=self.options.data,
                root=self.options.data_root,
                download=self.options.download,
                share=self.options.share,
                limit=self.options.limit,
                budget=self.budget,
            ),
        )
        for note in self.data.notes:
            self.events.add("data", note)
        return self.data

    async def _prepare_training(self, session: Session) -> None:
        """Load the data, measure this device, and offer it."""
        data = await self._load_data(session)
        tasks = _tasks_named(session.spec, self.options.tasks)
        prefer = _tasks_named(session.spec, self.options.prefer) or frozenset()
        if any(data.class_counts):
            self.phase = "measuring"
            measured = await session.trainer.measure()
            self.speed_macs_s = measured.macs_per_s
            session.counters.training_macs += measured.macs
        session.coordinator.advert = Advert(
            speed=max(self.speed_macs_s, 1.0),
            class_counts=data.class_counts,
            tasks=tasks,
            prefer=prefer,
            works=any(data.class_counts),
        )
        self.phase = "ready"
        await self.publish()

    async def _drain(self) -> None:
        """Finish the step in progress, publish it, hand over, say good-bye."""
        self.phase = "leaving"
        session = self.session
        if session is None or self.worker is None or self.board is None:
            return
        self.events.add("leaving", "leaves the run: finishing this step")
        with anyio.move_on_after(_DRAIN_S), contextlib.suppress(P2PCollabError):
            await self.worker.stop()
            if session.coordinator.advert.works:
                await self._worker_done.wait()
            with anyio.move_on_after(_HANDOVER_S):
                await self.gossip.hand_over()
            session.coordinator.left()
            await self.publish()
            await self.gossip.say_goodbye()

    # The board

    async def publish(self) -> None:
        """Put this device's record on the board."""
        session = self._joined()
        async with self._publishing:
            fields = session.coordinator.record_fields()
            advert = session.coordinator.advert
            record = self._network.records.DeviceRecord(
                run_id=session.run_id,
                device=session.device,
                name=self.device_name,
                beat=self.board.next_beat(),
                state=fields.state,
                speed=advert.speed,
                budget=self.options.budget,
                class_counts=advert.class_counts,
                tasks=None if advert.tasks is None else tuple(sorted(advert.tasks)),
                prefer=tuple(sorted(advert.prefer)),
                leases=fields.leases,
                lease_sequence=fields.lease_sequence,
                progress=fields.progress,
                addresses=(str(self.transport.address),),
                versions=f"p2pcollab {__version__}",
            )
            await self.board.publish(record)

    @property
    def device_name(self) -> str:
        """This device's name for people."""
        return views.printable_name(self.options.nickname)

    async def _beat(self) -> None:
        session = self._joined()
        known: set[str] = set()
        while True:
            try:
                await self.publish()
                await self.gossip.observe()
                known = self._tell_comings_and_goings(session, known)
            except P2PCollabError as error:
                session.warn("board", str(error))
            if session.coordinator.live(session.clock()) != (session.device,):
                session.warnings.pop("alone", None)
            await session.record_bell.wait(_BEAT_S * (0.9 + 0.2 * session.random.random()))

    def _tell_comings_and_goings(self, session: Session, known: set[str]) -> set[str]:
        live = {device for device in session.coordinator.live(session.clock()) if device != session.device}
        for device in sorted(live - known):
            self.events.add("peer-joined", f"{session.name(device)} is here", device=device)
        for device in sorted(known - live):
            self.events.add("peer-gone", f"{session.name(device)} is gone", device=device)
        if live != known:
            session.work_bell.ring()
        return live

    # Peers

    async def _watch_discovery(self, tasks: TaskGroup) -> None:
        async for found in self._discovery:
            if found.version != PROTOCOL_VERSION:
                self.events.add(
                    "incompatible",
                    f"{found.address.host} uses protocol version {found.version}, this device "
                    f"{PROTOCOL_VERSION}: install the same version of p2pcollab on both",
                )
                continue
            # Not one after the other: a dead address takes seconds.
            tasks.start_soon(self._try_address, found.address)

    async def _try_address(self, address: PeerAddress) -> None:
        """Meet a device at an address, and ask it for the run spec while that is unknown."""
        try:
            if self.session is None:
                await self._ask_for_spec(address)
            if self.session is None:
                return
            await self._spec_known.wait()
            if await self.board.meet(address):
                self.timings.done("discovery")
                self.session.record_bell.ring()
        except NotAuthorisedError as error:
            await self._refused(error)
        except P2PCollabError as error:
            log.info("address failed", address=str(address), reason=str(error))

    async def _ask_for_spec(self, address: PeerAddress) -> None:
        self.phase = "fetching-spec"
        await self.transport.connect(address)
        hello = self._network.wire.Hello(run_prefix=self.code.run_prefix, version=PROTOCOL_VERSION)
        reply = await self.transport.hello(address.peer, hello)
        spec = RunSpec.decode(reply.spec)
        if not spec.run_id.startswith(self.code.run_prefix):
            raise PeerError("the run spec is not the one that the join code names")
        self.timings.done("discovery")
        if self.session is None:
            self._join(self.store.create_run(reply.spec, self.code.secret))
            await self.board.start()
            self._spec_known.set()

    async def _refused(self, error: NotAuthorisedError) -> None:
        """Give up when nobody of the run accepts the join code."""
        self.events.add("refused", str(error))
        await anyio.sleep(_REFUSED_AFTER_S)
        if self.session is None:
            raise error

    async def _warn_when_alone(self) -> None:
        await anyio.sleep(_NO_PEERS_AFTER_S)
        if self.timings.has("discovery"):
            return
        text = (
            f"no other device of this run was found on {self.interface.name} ({self.interface.address}) in "
            f"{_NO_PEERS_AFTER_S:.0f} s: are both on the same network, is multicast let through (UDP port 5353), "
            f"and TCP port {self.transport.port}? Another interface: --interface; an address: --peer"
        )
        if self.session is not None:
            self.session.warn("alone", text)
        else:
            self.events.add("warning", text)

    async def _watch_p2pd(self) -> None:
        """Start p2pd again whenever it dies."""
        failures = 0
        while True:
            await self.transport.died.wait()
            self.events.add("p2pd-died", "p2pd ended; it is started again")
            try:
                await self.transport.restart()
                if self._spec_known.is_set():
                    await self.board.rebind()
                    await self.board.keep_alive()
                await self._guard_p2pd()
                failures = 0
                if self.session is not None:
                    self.session.record_bell.ring()
            except P2PCollabError as error:
                delay = _P2PD_BACKOFF_S[min(failures, len(_P2PD_BACKOFF_S) - 1)]
                failures += 1
                self.events.add("p2pd-failed", f"p2pd did not start: {error}")
                await anyio.sleep(delay)

    # Storage

    async def _save_regularly(self) -> None:
        while True:
            await anyio.sleep(_SAVE_S)
            self._save()

    def _save(self) -> None:
        """Remember what a restart should know besides the ledger."""
        if self.session is None or self.run_store is None:
            return
        try:
            self.run_store.set_meta(
                {
                    "counters": views.counters(self),
                    "addresses": [str(address) for address in self.transport.known_addresses],
                    "port": self.transport.port,
                },
                durable=False,
            )
        except StorageError as error:
            self.session.warn("disk", str(error))

    async def _collect_garbage(self) -> None:
        session = self._joined()
        while True:
            await anyio.sleep(_SAVE_S)
            keep = session.coordinator.keep() | self.gossip.fetching.keys()
            try:
                await asyncio.to_thread(session.store.collect_garbage, keep)
            except StorageError as error:
                session.warn("disk", str(error))

    def _keep_event(self, event: Any) -> None:
        log.info(event.kind, text=event.text)
        if self.run_store is not None:
            with contextlib.suppress(StorageError):
                self.run_store.add_event(event.id, event.time, event.kind, event.text, event.fields)


class _Doorman:
    """Answers peers from the first moment on: before the run is known there is nothing to answer with."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        async def answer(peer: str, request: Any) -> Any:
            if self._node.gossip is None:
                raise self._node._network.calls.RefusalError("not-ready", "this device only just starts")
            return await getattr(self._node.gossip, name)(peer, request)

        return answer


def _import_network() -> Any:
    """The modules that import hivemind and zeroconf, and with hivemind torch."""
    from types import SimpleNamespace

    from .. import records, wire
    from . import board, calls, discovery, gossip, transport, work

    return SimpleNamespace(
        board=board,
        calls=calls,
        discovery=discovery,
        gossip=gossip,
        records=records,
        transport=transport,
        wire=wire,
        work=work,
    )


def _open_run(options: DaemonOptions, store: Store) -> tuple[JoinCode, RunStore | None]:
    """The join code, and the run if this device knows it already."""
    if options.mode == "new":
        if options.spec is None or options.secret_hex is None:
            raise UsageError("a new run needs a spec and a secret")
        spec = options.spec.encode()
        secret = bytes.fromhex(options.secret_hex)
        return JoinCode.create(secret, RunSpec.decode(spec).run_id), store.create_run(spec, secret)
    if options.code is None:
        if store.current is None:
            raise UsageError(
                "this device takes part in no run yet", "join one with `p2pcollab join --code P2P-…`"
            )
        known = store.open_run(store.current)
        return JoinCode.create(known.secret, known.run_id), known
    code = JoinCode.parse(options.code)
    for run_id in store.runs():
        if run_id.startswith(code.run_prefix):
            known = store.open_run(run_id)
            if known.secret == code.secret:
                return code, known
            known.close()
            raise NotAuthorisedError(
                "the join code does not fit the run of the same name in this state folder",
                "check the code, or use another state folder with --state",
            )
    return code, None


def _remembered(options: DaemonOptions, run_store: RunStore | None) -> DaemonOptions:
    """The options, with what was given when this device first joined where nothing is given now."""
    saved = run_store.meta().get("options") if run_store is not None else None
    if not isinstance(saved, dict):
        return options
    given = options.model_dump(mode="json")
    defaults = DaemonOptions(mode=options.mode, state=options.state).model_dump(mode="json")
    kept = {
        name: saved[name]
        for name, value in given.items()
        if name in saved and value == defaults[name] and name not in ("mode", "attached", "code", "spec")
    }
    return DaemonOptions.model_validate({**given, **kept})


def _earlier_events(run_store: RunStore | None) -> list[Event]:
    if run_store is None:
        return []
    return [
        Event(id=id, time=at, kind=kind, text=text, fields=fields)
        for id, at, kind, text, fields in run_store.events()
    ]


def _saved_addresses(run_store: RunStore | None) -> list[PeerAddress]:
    saved = run_store.meta().get("addresses") if run_store is not None else None
    return [PeerAddress.parse(str(text)) for text in saved] if isinstance(saved, list) else []


def _saved_port(run_store: RunStore | None, host: str) -> int:
    """The port of last time, so that the others find this device where they remember it; 0 if it is taken."""
    saved = run_store.meta().get("port") if run_store is not None else None
    if isinstance(saved, int):
        with contextlib.suppress(UsageError):
            check_port_is_free(host, saved)
            return saved
    return 0


def _tasks_named(spec: RunSpec, names: tuple[str, ...]) -> frozenset[ShardId] | None:
    from ..planning import tasks_of

    return tasks_of(spec, names) if names else None
