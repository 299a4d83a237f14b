"""A device's part in a run that it knows: its record, its work, its stores, and its leaving.

Imports hivemind (through board and gossip): `node` imports it in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Final, cast

import anyio
from anyio.abc import TaskGroup

from .. import __version__
from ..coordinator import Advert, Coordinator, CoordinatorSettings
from ..errors import P2PCollabError, StorageError
from ..holdings import ReplicationSettings
from ..keys import Identity, RunKeys
from ..planning import tasks_of
from ..records import DeviceRecord, DeviceState
from ..run import DeviceId, RunSpec, ShardId
from .board import Board
from .death_watch import DeathWatch
from .events import EventLog
from .fetching import Fetcher
from .gossip import Gossip
from .intake import Intake
from .model_file import ModelFile
from .opening import saved_members, saved_names
from .options import DaemonOptions
from .peer_ids import PeerIds
from .rejoining import Rejoining
from .renewal import Renewal
from .session import Counters, Session
from .store import RunStore
from .timings import Timings
from .trainer import Budget, DataSummary, Trainer, TrainerSettings
from .transport import Transport
from .work import Worker

_DRAIN_S: Final = 12.0
#: How long a leaving device waits for others to fetch what only it holds.
_HANDOVER_S: Final = 6.0
#: How long an assembly asks for shards that a live device may have and does not give.
_HARVEST_S: Final = 12.0
#: How long it waits before it looks, or asks, again.
_AGAIN_S: Final = 0.5
_SAVE_S: Final = 5.0


class Member:
    """The parts that take part in a run, and what goes on between them."""

    def __init__(
        self,
        run_store: RunStore,
        options: DaemonOptions,
        identity: Identity,
        keys: RunKeys,
        transport: Transport,
        trainer: Trainer,
        events: EventLog,
        timings: Timings,
        *,
        name: str,
        visitor: bool,
        on_secret: Callable[[bytes], None],
        ask_again: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            name: this device's, for people.
            ask_again: asks by multicast who is there, now.
            on_secret: told of every new run secret.
            visitor: only looks: it shows no record, and holds nothing for others.
        """
        spec = RunSpec.decode(run_store.spec)
        rng = random.Random(identity.seed + run_store.run_id.encode())
        nothing = Advert(speed=1.0, class_counts=(0,) * len(spec.classes), works=False)
        replication = ReplicationSettings(replicate_all=options.replicate_all)
        self._options = options
        self.session = session = Session(
            spec=spec,
            run_id=spec.run_id,
            identity=identity,
            keys=keys,
            store=run_store,
            coordinator=Coordinator(
                spec,
                identity.device,
                nothing,
                CoordinatorSettings(replication=replication),
                rng,
                first_beat=round(time.time() * 1000),
            ),
            transport=transport,
            trainer=trainer,
            events=events,
            counters=Counters.restore(run_store.meta().get("counters")),
            own_name=name,
            random=rng,
        )
        self.board = Board(transport, keys, identity, spec.run_id, observer=visitor)
        session.names.update(saved_names(run_store))
        self.renewal = Renewal(
            session,
            self.board,
            run_store.rotation.with_members(saved_members(run_store)),
            on_secret=on_secret,
            typed=run_store.rotation_is_typed,
        )
        self.intake = Intake(session, self.renewal)
        peer_ids = PeerIds(session, self.board)
        self.gossip = Gossip(session, self.board, self.renewal, self.intake, peer_ids)
        self.fetcher = Fetcher(session, self.intake, peer_ids)
        self._death_watch = DeathWatch(session, peer_ids)
        self.rejoining = Rejoining(session, ask_again)
        self.worker = Worker(
            session,
            self.gossip,
            self.intake,
            self.fetcher,
            self.publish,
            on_first_step=lambda: timings.done("first_step"),
            on_claim=lambda: timings.done("allotment"),
        )
        #: This device's data, once they are loaded.
        self.data: DataSummary | None = None
        #: How far this device is with its preparations: a word for the status.
        self.phase = "joining"
        self.speed_macs_s = 0.0
        #: Follows from this device's secret key: the same after a restart, and unknown to everybody else.
        self._judge_seed = rng.getrandbits(63)
        self._worker_done = anyio.Event()
        self._publishing = anyio.Lock()
        self.intake.restore_proofs(run_store.meta().get("proofs"))
        self.session.coordinator.restore_opinions(run_store.meta().get("opinions"))
        self.intake.restore(run_store.load_contributions())
        session.refusals.extend(
            event for event in events.after(0) if event.kind == "refused" and "shard" in event.fields
        )
        self._tell_notices()
        # Not what only this start needs, and no secret a second time.
        passing = {"mode", "state", "attached", "code", "spec", "secret_hex"}
        run_store.set_meta({"options": options.model_dump(mode="json", exclude=passing)})

    async def start(self) -> None:
        """Take part in the board, alone so far."""
        await self.board.start()

    async def run(self, tasks: TaskGroup) -> None:
        """Take part until `drain`; what goes on beside the work runs in `tasks`.

        Raises:
            DataError: this device's data cannot be used.
            UsageError: it names classes that the run does not have.
        """
        for part in (
            self.board.maintain,
            self._beat,
            self._watch_board,
            self.gossip.run,
            self.fetcher.run,
            self.gossip.spread_news,
            self._death_watch.run,
            self.rejoining.run,
            self.renewal.run,
            self._save_regularly,
            self._collect_garbage,
        ):
            tasks.start_soon(part)
        await self._prepare()
        await self.worker.run()
        self._worker_done.set()

    async def drain(self) -> None:
        """Finish the step in progress, publish it, hand over, say good-bye."""
        session = self.session
        self.phase = "leaving"
        session.events.add("leaving", "leaves the run: finishing this step")
        with anyio.move_on_after(_DRAIN_S), contextlib.suppress(P2PCollabError):
            await self.worker.stop()
            if session.coordinator.advert.works:
                await self._worker_done.wait()
            with anyio.move_on_after(_HANDOVER_S):
                await self.gossip.hand_over()
            session.coordinator.left()
            await self.publish()
            await self.gossip.say_goodbye()

    async def stop(self) -> None:
        """Leave the board, and close the store. The transport goes on."""
        self.renewal.stop()
        with contextlib.suppress(P2PCollabError, asyncio.TimeoutError):
            await self.board.stop()
        self._save()
        self.session.store.close()

    async def look_around(self) -> None:
        """See the board and everybody's ledger, once."""
        await self.gossip.observe()
        await self.gossip.exchange_all()

    async def assemble(self) -> ModelFile:
        """The global model: what is missing here is fetched first.

        Raises:
            P2PCollabError: the trainer could not.
        """
        session = self.session
        deadline = session.clock() + _HARVEST_S
        await self._meet_somebody(deadline)
        await self.gossip.exchange_all()
        session.coordinator.ask_again()
        while True:
            missing = session.coordinator.harvest(session.store.digests(), session.clock())
            # What every live device says that it does not hold died with its maker.
            wants = [want for want in missing if want.holders]
            # Who has not listened for long may not have seen yet who holds the rest.
            open_wants = wants if session.coordinator.has_listened(session.clock()) else missing
            if not open_wants or session.clock() > deadline:
                break
            await self.fetcher.fetch_all(wants)
            # A device that could not give something just now is asked again after a while.
            await anyio.sleep(0 if session.store.has(open_wants[0].digest) else _AGAIN_S)
        held = session.store.digests()
        frontiers = {shard: session.coordinator.assembled_of(shard, held) for shard in session.spec.shards}
        return await session.trainer.assemble(frontiers, session.store.get_shard)

    async def _meet_somebody(self, deadline: float) -> None:
        """Wait for the first other device, where this one has only just begun to listen."""
        session = self.session
        while session.clock() < deadline:
            now = session.clock()
            if len(session.coordinator.live(now)) > 1 or session.coordinator.has_listened(now):
                return
            await self.gossip.observe()
            await anyio.sleep(_AGAIN_S)

    # Preparations

    async def load_data(self) -> DataSummary:
        """Have the trainer load this device's data.

        Raises:
            DataError: they cannot be used.
        """
        self.phase = "loading"
        options = self._options
        self.data = await self.session.trainer.configure(
            self.session.spec,
            TrainerSettings(
                source=options.data,
                root=options.data_root,
                download=options.download,
                share=options.share,
                limit=options.limit,
                budget=Budget.plan(options.share_of_machine, options.threads),
                judge_seed=self._judge_seed,
            ),
        )
        for note in self.data.notes:
            self.session.events.add("data", note)
        return self.data

    async def _prepare(self) -> None:
        """Load the data, measure this device, and offer it."""
        session = self.session
        tasks = self._tasks_named(self._options.tasks)
        prefer = self._tasks_named(self._options.prefer) or frozenset()
        data = await self.load_data()
        works = any(data.class_counts)
        if works:
            self.phase = "measuring"
            measured = await session.trainer.measure()
            self.speed_macs_s = measured.macs_per_s
            session.counters.training_macs += measured.macs
        session.coordinator.advert = Advert(
            speed=max(self.speed_macs_s, 1.0),
            class_counts=data.class_counts,
            tasks=tasks,
            prefer=prefer,
            works=works,
        )
        self.phase = "ready"
        await self.publish()

    def _tasks_named(self, classes: tuple[str, ...]) -> frozenset[ShardId] | None:
        return tasks_of(self.session.spec, classes) if classes else None

    # The board

    async def publish(self) -> None:
        """Put this device's record on the board."""
        session = self.session
        async with self._publishing:
            fields = session.coordinator.record_fields()
            advert = session.coordinator.advert
            record = DeviceRecord(
                run_id=session.run_id,
                device=session.device,
                name=session.own_name,
                beat=self.board.next_beat(),
                state=cast(DeviceState, fields.state),
                speed=advert.speed,
                budget=self._options.share_of_machine,
                class_counts=advert.class_counts,
                tasks=None if advert.tasks is None else tuple(sorted(advert.tasks)),
                prefer=tuple(sorted(advert.prefer)),
                leases=fields.leases,
                lease_sequence=fields.lease_sequence,
                progress=fields.progress,
                addresses=(str(session.transport.address),),
                versions=f"p2pcollab {__version__}",
            )
            await self.board.publish(record)

    async def _beat(self) -> None:
        """Publish in time: a device elsewhere that stands still must not make this one look dead."""
        session = self.session
        while True:
            began = session.clock()
            try:
                await self.publish()
                session.warnings.pop("board", None)
            except P2PCollabError as error:
                session.warn("board", str(error))
            beat_s = session.coordinator.settings.beat_s * (0.9 + 0.2 * session.random.random())
            await session.record_bell.wait(max(0.0, began + beat_s - session.clock()))

    async def _watch_board(self) -> None:
        session = self.session
        known: set[DeviceId] = set()
        while True:
            await self.gossip.observe()
            known = self._tell_comings_and_goings(known)
            await anyio.sleep(session.coordinator.settings.beat_s * (0.9 + 0.2 * session.random.random()))

    def _tell_comings_and_goings(self, known: set[DeviceId]) -> set[DeviceId]:
        session = self.session
        live = {device for device in session.coordinator.live(session.clock()) if device != session.device}
        for device in sorted(live - known):
            session.events.add("peer-joined", f"{session.name(device)} is here", device=device)
        for device in sorted(known - live):
            session.events.add("peer-gone", f"{session.name(device)} is gone", device=device)
        if live:
            session.warnings.pop("alone", None)
        if live != known:
            session.work_bell.ring()
        return live

    async def relink(self) -> None:
        """Go on with the p2pd that the transport has started anew."""
        await self.board.rebind()
        self.session.record_bell.ring()

    # Storage

    def _tell_notices(self) -> None:
        """Tell what the store has found damaged."""
        for notice in self.session.store.notices():
            self.session.warn("store", notice)

    async def _save_regularly(self) -> None:
        while True:
            await anyio.sleep(_SAVE_S)
            self._save()

    def _save(self) -> None:
        """Remember what a restart should know besides the ledger."""
        session = self.session
        self._tell_notices()
        try:
            session.store.set_meta(
                {
                    "counters": {**asdict(session.counters), **session.traffic()},
                    "addresses": [str(address) for address in session.transport.known_addresses],
                    "port": session.transport.port,
                },
                durable=False,
            )
            self.renewal.save_members()
            session.warnings.pop("index", None)
        except StorageError as error:
            session.warn("index", str(error))

    async def _collect_garbage(self) -> None:
        session = self.session
        while True:
            await anyio.sleep(_SAVE_S)
            held = session.store.digests()
            keep = session.coordinator.keep(held) | self.fetcher.fetching.keys() | self.worker.storing
            for digest in self.gossip.fetched_by.keys() - keep:
                del self.gossip.fetched_by[digest]
            try:
                await asyncio.to_thread(session.store.collect_garbage, held - keep)
            except StorageError as error:
                session.warn("disk", str(error))
