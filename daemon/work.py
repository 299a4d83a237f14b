"""Work: from the allotment to contributions, one lease after the other.

The coordinator decides; this module shows its claims, brings what the lease starts from, has it trained, and
makes contributions of the result. A lease that comes to nothing is released, and another one is decided on.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import structlog

from ..coordinator import JobPlan
from ..errors import P2PCollabError, StorageError
from ..ledger import Contribution
from ..run import STEM, ShardId
from ..wire import sign_contribution
from .fetching import Fetcher
from .gossip import Gossip
from .intake import Intake
from .session import Session
from .trainer import LeaseJob, LeaseOutcome, TrainerDied

log = structlog.get_logger()

T = TypeVar("T")

#: How often an idle device looks again when nothing wakes it.
_LOOK_AGAIN_S: Final = 1.0
#: How long a lease waits for what it starts from before its device looks for another. Longer than the
#: coordinator's own patience, which lets it start from what came before.
_PREPARE_S: Final = 20.0
#: Pause after a lease that failed, so that a lasting cause does not spin.
_AFTER_FAILURE_S: Final = 2.0


@dataclass(slots=True)
class Progress:
    """The lease in training, for the views."""

    shards: tuple[ShardId, ...]
    samples_total: int
    started: float
    samples_done: int = 0
    losses: dict[ShardId, float] = field(default_factory=dict)

    def to_status(self, labels: list[str], now: float) -> dict[str, Any]:
        """As the status shows it."""
        elapsed = max(now - self.started, 1e-9)
        rate = self.samples_done / elapsed
        left = self.samples_total - self.samples_done
        return {
            "shards": list(self.shards),
            "labels": labels,
            "samples_done": self.samples_done,
            "samples_total": self.samples_total,
            "samples_per_s": rate,
            "loss": dict(self.losses),
            "eta_s": left / rate if rate else None,
        }


class Worker:
    """Trains, for ever."""

    def __init__(
        self,
        session: Session,
        gossip: Gossip,
        intake: Intake,
        fetcher: Fetcher,
        publish: Callable[[], Awaitable[None]],
        on_first_step: Callable[[], None],
        on_claim: Callable[[], None],
    ) -> None:
        """
        Args:
            publish: puts this device's record on the board.
            on_first_step: told when the first training step of this daemon is done.
            on_claim: told when the first lease is held.
        """
        self._session = session
        self._gossip = gossip
        self._intake = intake
        self._fetcher = fetcher
        self._publish = publish
        self._on_first_step = on_first_step
        self._on_claim = on_claim
        self._stopping = False
        self._seed = session.random.getrandbits(31)
        #: The lease in training.
        self.progress: Progress | None = None
        #: Digests of shards that a contribution is about to name: no garbage, though none does yet.
        self.storing: set[str] = set()

    async def run(self) -> None:
        """Train until `stop`."""
        while not self._stopping:
            try:
                if self._session.trainer.pid is None:
                    # It died between leases. Whoever trains nothing any more still assembles with it.
                    await self._restart_trainer()
                if not await self._one_lease():
                    await self._session.work_bell.wait(_LOOK_AGAIN_S)
            except TrainerDied as error:
                self._give_up("trainer", error)
                await self._restart_trainer()
            except P2PCollabError as error:
                self._give_up("training", error)
                await anyio.sleep(_AFTER_FAILURE_S)

    async def stop(self) -> None:
        """Take nothing new; what the lease in progress has trained so far is published by `run`."""
        self._stopping = True
        self._session.coordinator.leave()
        self._session.work_bell.ring()
        await self._session.trainer.cancel()

    def _give_up(self, topic: str, error: P2PCollabError) -> None:
        session = self._session
        self.progress = None
        if session.coordinator.leases:
            session.coordinator.abandoned(session.clock())
        if not self._stopping:
            session.events.add("lease-lost", f"a lease was lost: {error}", topic=topic)
        session.record_bell.ring()

    async def _restart_trainer(self) -> None:
        session = self._session
        delay = _AFTER_FAILURE_S / 4
        while not self._stopping:
            session.counters.trainer_restarts += 1
            session.events.add("trainer-restart", "the trainer is started again")
            try:
                await session.trainer.restart()
                return
            except P2PCollabError as error:
                session.events.add("trainer-failed", f"the trainer did not start: {error}")
                await anyio.sleep(delay)
                delay = min(delay * 2, 30.0)

    async def _one_lease(self) -> bool:
        """Claim, prepare, train and publish one lease; False if there was none to be had."""
        session = self._session
        coordinator = session.coordinator
        await self._gossip.observe()
        claim = coordinator.decide(session.clock())
        if claim is None:
            return False
        await self._publish()
        async with anyio.create_task_group() as tasks:
            for device in claim.ask:
                tasks.start_soon(self._gossip.exchange_with, device)
            tasks.start_soon(self._gossip.observe)
        if not coordinator.confirm(session.clock()):
            log.info("yielded", shards=claim.shards)
            await self._publish()
            return True
        self._on_claim()
        plan = await self._prepare()
        if plan is None:
            session.record_bell.ring()
            return True
        # The others need not know the moment at which training begins: the record goes out meanwhile.
        session.record_bell.ring()
        outcome = await self._train(plan)
        await self._deliver(plan, outcome)
        return True

    async def _prepare(self) -> JobPlan | None:
        """Wait until what the lease starts from is here; None when there is nothing left to train on it."""
        session = self._session
        deadline = session.clock() + _PREPARE_S
        session.fetch_bell.ring()
        while session.coordinator.leases and not self._stopping:
            plan = session.coordinator.job(
                session.store.digests() - self._fetcher.fetching.keys(), session.clock()
            )
            if plan is not None:
                return plan
            if session.clock() > deadline:
                break
            if session.coordinator.leases:
                await session.work_bell.wait(0.25)
        if session.coordinator.leases:
            session.coordinator.abandoned(session.clock())
        return None

    async def _train(self, plan: JobPlan) -> LeaseOutcome:
        session = self._session
        shards = tuple(job.shard for job in plan.shards)
        session.events.add(
            "lease", f"training {session.labels(shards)}", shards=list(shards), samples=plan.samples
        )
        self.progress = Progress(shards=shards, samples_total=plan.samples, started=session.clock())
        frontiers: dict[ShardId, tuple[Contribution, ...]] = {job.shard: job.parents for job in plan.shards}
        frontiers.setdefault(STEM, plan.stem)
        session.counters.merges += sum(len(job.parents) > 1 for job in plan.shards)
        self._seed += 1
        lease = LeaseJob(
            shards=shards,
            frontiers=frontiers,
            samples=plan.samples,
            progress={job.shard: job.progress for job in plan.shards},
            seed=self._seed,
        )
        watch = asyncio.create_task(self._cancel_when_useless())
        try:
            return await session.trainer.train(lease, session.store.get_shard, self._on_progress)
        finally:
            watch.cancel()
            self.progress = None

    async def _cancel_when_useless(self) -> None:
        """End the lease early when it no longer serves: others have completed its shards, or overtaken it."""
        session = self._session
        while session.coordinator.still_needed():
            await session.news_bell.wait(_LOOK_AGAIN_S)
        await session.trainer.cancel()

    def _on_progress(self, samples: int, losses: Mapping[ShardId, float]) -> None:
        self._on_first_step()
        if self.progress is not None:
            self.progress.samples_done = samples
            self.progress.losses = dict(losses)

    async def _deliver(self, plan: JobPlan, outcome: LeaseOutcome) -> None:
        """Store what was made, enter it into the ledger, release the lease, and tell the others."""
        session = self._session
        session.counters.training_macs += outcome.macs
        session.counters.trainer_peak_rss_bytes = outcome.peak_rss_bytes
        if outcome.samples == 0 or not session.coordinator.still_needed():
            session.coordinator.abandoned(session.clock())
            await self._publish()
            return
        self._on_first_step()
        made = []
        for job in plan.shards:
            trained = outcome.shards[job.shard]
            # The shard before the contribution that names it: whatever the moment of a crash, no entry of
            # this device lacks its tensors.
            self.storing.add(await asyncio.to_thread(_digest, trained.data))
            digest = await self._stored(partial(asyncio.to_thread, session.store.put_shard, trained.data))
            made.append(
                sign_contribution(
                    session.identity,
                    run_id=session.run_id,
                    shard=job.shard,
                    generation=job.generation,
                    seen=job.seen(session.device, outcome.samples),
                    lease_samples=outcome.samples,
                    stem_digest=plan.stem_digest,
                    tensors_digest=digest,
                    tensors_bytes=len(trained.data),
                    loss=trained.loss,
                    accuracy=trained.accuracy,
                    distrusts=session.coordinator.accused,
                )
            )
        await self._stored(partial(self._enter, made))
        self.storing.clear()
        session.coordinator.finished(session.clock())
        session.counters.contributions += len(made)
        session.events.add(
            "contribution",
            f"trained {session.labels([job.shard for job in plan.shards])} on {outcome.samples} samples",
            shards=[job.shard for job in plan.shards],
            samples=outcome.samples,
            seconds=outcome.seconds,
            macs=outcome.macs,
        )
        self._record_metrics(made)
        await self._publish()
        # With what it was built on, or it would not count where that has not been heard of.
        self._intake.news.add([*(entry for job in plan.shards for entry in job.parents), *made])

    async def _enter(self, made: list[Contribution]) -> None:
        self._intake.enter(made)

    async def _stored(self, store: Callable[[], Awaitable[T]]) -> T:
        """Store what was trained. While the disk refuses, it is kept in memory and tried again.

        Raises:
            StorageError: the disk still refuses when this device leaves.
        """
        session = self._session
        while True:
            try:
                result = await store()
                session.warnings.pop("disk", None)
                return result
            except StorageError as error:
                if self._stopping:
                    raise
                session.warn("disk", str(error))
            await anyio.sleep(_AFTER_FAILURE_S)

    def _record_metrics(self, made: list[Contribution]) -> None:
        session = self._session
        now = time.time()
        try:
            for entry in made:
                session.store.add_metric(
                    now,
                    entry.shard,
                    {
                        "generation": entry.generation,
                        "samples": session.coordinator.believed.samples(entry.shard),
                        "loss": entry.loss,
                        "accuracy": entry.accuracy,
                    },
                )
        except StorageError as error:
            session.warn("index", str(error))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
