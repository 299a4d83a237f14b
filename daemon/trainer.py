"""The daemon's side of the trainer: a process of its own that does everything that needs PyTorch.

A process and not a thread: training must not delay the answers to peers, may be niced, and may die (of
memory, mostly) without taking the device out of the run. Spawned and not forked: fork deadlocks PyTorch's
threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .. import limits
from ..errors import P2PCollabError, StorageError
from ..ledger import Contribution
from ..plans import Trial
from ..run import RunSpec, ShardId
from ..trust import Verdict
from ..wire import encode_contribution
from .error_fields import error_from_fields
from .frames import BrokenFrame, Fields, encode_frame, receive_frame
from .model_file import ModelFile

Progress = Callable[[int, Mapping[ShardId, float]], None]
"""Told of a lease's samples done and each shard's loss, at most five times a second."""
ReadShard = Callable[[str], bytes | None]
"""A shard's bytes by digest; called in a thread."""

_END_WITHIN_S: Final = 3.0
#: asyncio stops reading at twice this; its default of 64 KiB makes a 60 MB shard a thousand wake-ups.
_BUFFER_BYTES: Final = limits.MIB


class TrainerDied(P2PCollabError):
    """The trainer process has ended. `Trainer.restart` starts another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of the machine training may use."""

    threads: int
    #: Fraction of the time in which they compute; the rest is slept away between steps.
    duty: float

    @classmethod
    def plan(cls, share: float, threads: int | None = None) -> Budget:
        """Threads and duty cycle that come to `share` of this machine's cores.

        Args:
            threads: as many as the user asks for; otherwise the fewest that can use up the share.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = threads or max(1, math.ceil(share * cores))
        return cls(threads=threads, duty=min(1.0, share * cores / threads))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What the trainer needs to know of this device."""

    #: Data source as in `DaemonOptions`. None: this device has no data; it can check and
    #: assemble, not train.
    source: str | None
    #: Where known data sets lie or are downloaded to.
    root: Path | None = None
    download: bool = False
    #: `I/N`: use only the I-th of N equal parts of the training data.
    share: str | None = None
    #: Use at most this many training images of the whole set, before it is divided.
    limit: int | None = None
    budget: Budget
    niceness: int = 5
    #: Of the choice of examples that others' work is tried on: this device's secret.
    judge_seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What this device trains and measures with."""

    train: int
    test: int
    #: Training samples of each class.
    class_counts: tuple[int, ...]
    #: Sentences for people: what was skipped, which split was used.
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How fast this device trains within its budget."""

    macs_per_s: float
    #: What the measurement itself has cost.
    macs: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseJob:
    """One lease: the stem, or a bundle of branches on the newest stem."""

    shards: tuple[ShardId, ...]
    #: For each of `shards`, and the stem: the contributions to merge and go on from. Where there is none, the
    #: initial tensors are.
    frontiers: Mapping[ShardId, Sequence[Contribution]]
    samples: int
    #: Progress of each of `shards` when the lease begins, in 0..1.
    progress: Mapping[ShardId, float]
    #: Of the order and augmentation of the samples.
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedShard:
    """What a lease has made of one shard."""

    data: bytes
    loss: float
    #: On this device's own held-out examples, 0..1: recall averaged over {own classes, "other"}; of the stem,
    #: its auxiliary head's accuracy. 0 if this device has none.
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseOutcome:
    """What a lease has made. Nothing (`samples` 0) if it was cancelled before its first step."""

    shards: Mapping[ShardId, TrainedShard]
    samples: int
    #: MACs spent, the stem's forward pass and the validation included.
    macs: int
    #: Seconds of training, pauses for the budget included.
    seconds: float
    #: Most memory that the trainer has ever had resident.
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScore:
    """How good an assembled model is on this device's own test data."""

    accuracy: float
    samples: int
    #: Row: the true class, column: what the model says; counts.
    confusion: tuple[tuple[int, ...], ...]
    macs: int

    def class_accuracy(self) -> tuple[float | None, ...]:
        """Recall of each class; `None` where there are no examples."""
        return tuple(row[index] / sum(row) if any(row) else None for index, row in enumerate(self.confusion))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """What the trainer thinks of some contributions."""

    #: What is wrong with each; None: nothing.
    found: tuple[Verdict | None, ...]
    macs: int


class Trainer:
    """The trainer process and what it is asked to do.

    Every request raises `TrainerDied` if the process ends meanwhile, and waits for `configure` to succeed.
    `check`, `assemble` and `evaluate` are served between the steps of a lease in progress; there is one
    lease, `configure` or `measure` at a time.
    """

    def __init__(self, threads: int) -> None:
        """
        Args:
            threads: of the numeric libraries, from `Budget`.
        """
        self._threads = threads
        self._folder = "/"
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._requests: dict[int, tuple[asyncio.Future[Fields], Progress | None]] = {}
        self._next_id = 1
        self._lease_id: int | None = None
        self._configured: tuple[RunSpec, TrainerSettings] | None = None
        self._guarded: tuple[int, float] = (0, 0.0)
        self._ended = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start the process. Returns at once; it imports PyTorch meanwhile, which takes seconds."""
        assert self.pid is None
        self._ended = asyncio.Event()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "p2pcollab.daemon.trainer_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)},
            # Python puts the current folder first on its path: a checkout must not shadow what is installed.
            cwd="/",
            limit=_BUFFER_BYTES,
        )
        self._reading = asyncio.create_task(self._read(self._process), name="trainer")
        if self._guarded[0]:
            await self.guard(*self._guarded)

    async def wait_ended(self) -> None:
        """Wait until the process has ended, whyever."""
        await self._ended.wait()

    async def close(self) -> None:
        """End the process; a lease in progress is lost. What it guards is left alone."""
        process = self._process
        if process is None or process.stdin is None:
            return
        if process.returncode is None:
            self._guarded = (0, 0.0)
            with contextlib.suppress(TrainerDied):
                await self.guard(0, 0.0)
            process.stdin.close()
            await _ended(process)
        if self._reading is not None:
            await self._reading

    async def restart(self) -> DataSummary | None:
        """Start a new process in place of one that died or hangs, configured like it; what it read."""
        self._kill()
        if self._reading is not None:
            await self._reading
        await self.start()
        return await self.configure(*self._configured) if self._configured else None

    async def guard(self, pid: int, create_time: float) -> None:
        """Have the trainer kill this process, if it is still that one, when the daemon dies; 0: none.

        Args:
            create_time: as psutil tells it.
        """
        self._guarded = (pid, create_time)
        await self._send(encode_frame({"do": "guard", "pid": pid, "create_time": create_time}))

    async def configure(self, spec: RunSpec, settings: TrainerSettings) -> DataSummary:
        """Load this device's data.

        Raises:
            DataError: they cannot be used.
        """
        self._configured = (spec, settings)
        # Where relative paths begin; it may be gone when a trainer is started again.
        with contextlib.suppress(OSError):
            self._folder = str(Path.cwd())
        reply = await self._ask(
            "configure",
            {
                "spec": spec.encode(),
                "source": settings.source,
                "root": str(settings.root) if settings.root else None,
                "folder": self._folder,
                "download": settings.download,
                "share": settings.share,
                "limit": settings.limit,
                "threads": settings.budget.threads,
                "duty": settings.budget.duty,
                "niceness": settings.niceness,
                "judge_seed": settings.judge_seed,
            },
        )
        return DataSummary(
            train=reply["train"],
            test=reply["test"],
            class_counts=tuple(reply["class_counts"]),
            notes=tuple(reply["notes"]),
        )

    async def measure(self) -> Measurement:
        """Train a few batches to learn how fast this device is; their result is thrown away."""
        reply = await self._ask("measure", {})
        return Measurement(macs_per_s=reply["macs_per_s"], macs=reply["macs"], seconds=reply["seconds"])

    async def train(
        self, job: LeaseJob, read: ReadShard, on_progress: Progress | None = None
    ) -> LeaseOutcome:
        """Train one lease. After `cancel` it returns what was done until then.

        Raises:
            RunError: training diverged, or the trainer failed.
            PeerError: a shard of the frontier is not what its contribution says.
            StorageError: a shard of the frontier is not in the store any more.
        """
        fields = {
            "shards": list(job.shards),
            "frontiers": _frontier_fields(job.frontiers),
            "samples": job.samples,
            "progress": dict(job.progress),
            "seed": job.seed,
        }
        try:
            self._lease_id = self._next_id
            reply = await self._ask("train", fields, _digests(job.frontiers), read, on_progress)
        finally:
            self._lease_id = None
        shards = {
            ShardId(shard): TrainedShard(data=made["data"], loss=made["loss"], accuracy=made["accuracy"])
            for shard, made in reply["shards"].items()
        }
        return LeaseOutcome(
            shards=shards,
            samples=reply["samples"],
            macs=reply["macs"],
            seconds=reply["seconds"],
            peak_rss_bytes=reply["peak_rss_bytes"],
        )

    async def cancel(self) -> None:
        """End the lease in progress at its next step; `train` then returns what was done."""
        if self._lease_id is not None:
            with contextlib.suppress(TrainerDied):
                await self._send(encode_frame({"do": "cancel", "id": self._lease_id}))

    async def check(self, trials: Sequence[Trial], read: ReadShard) -> Verdicts:
        """Whether the shards of some contributions may be merged.

        Raises:
            StorageError: one of the shards is not in the store.
        """
        digests = [
            entry.tensors_digest
            for trial in trials
            for entry in (trial.contribution, *trial.reference, *trial.stem)
        ]
        fields = {"trials": [trial_fields(trial) for trial in trials]}
        reply = await self._ask("check", fields, list(dict.fromkeys(digests)), read)
        found = (None if one is None else Verdict(**one) for one in reply["verdicts"])
        return Verdicts(found=tuple(found), macs=reply["macs"])

    async def assemble(
        self, frontiers: Mapping[ShardId, Sequence[Contribution]], read: ReadShard
    ) -> ModelFile:
        """The global model from the frontiers of all shards; a task without any is missing in it.

        Raises:
            PeerError: a shard is not what its contribution says.
            StorageError: a shard is not in the store any more.
        """
        fields = {"frontiers": _frontier_fields(frontiers)}
        reply = await self._ask("assemble", fields, _digests(frontiers), read)
        return ModelFile(data=reply["data"], missing=tuple(reply["missing"]), coverage=reply["coverage"])

    async def evaluate(self, model: bytes, at_most: int | None = None) -> ModelScore:
        """Try an assembled model on this device's own test data.

        Args:
            at_most: use only so many examples, with the classes in proportion; a lease in progress waits.

        Raises:
            P2PCollabError: the bytes are not a model of this run.
        """
        reply = await self._ask("evaluate", {"data": model, "at_most": at_most})
        return ModelScore(
            accuracy=reply["accuracy"],
            samples=reply["samples"],
            confusion=tuple(tuple(row) for row in reply["confusion"]),
            macs=reply["macs"],
        )

    async def _ask(
        self,
        do: str,
        fields: Mapping[str, Any],
        digests: Iterable[str] = (),
        read: ReadShard | None = None,
        on_progress: Progress | None = None,
    ) -> Fields:
        id = self._next_id
        self._next_id += 1
        future: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._requests[id] = (future, on_progress)
        try:
            for digest in digests:
                assert read is not None
                data = await asyncio.to_thread(read, digest)
                if data is None:
                    raise StorageError(f"the shard {digest[:16]} is not in the store", "it is fetched again")
                await self._send(encode_frame({"do": "blob", "id": id, "digest": digest, "data": data}))
            await self._send(encode_frame({**fields, "do": do, "id": id}))
            reply = await future
        except BaseException:
            with contextlib.suppress(TrainerDied):
                await self._send(encode_frame({"do": "forget", "id": id}))
            raise
        finally:
            del self._requests[id]
        if "error" in reply:
            raise error_from_fields(reply["error"])
        return reply

    async def _send(self, frame: bytes) -> None:
        process = self._process
        if process is None or process.stdin is None or self._ended.is_set():
            raise self._death()
        async with self._writing:
            try:
                process.stdin.write(frame)
                await process.stdin.drain()
            except ConnectionError as error:
                raise self._death() from error

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenFrame):
                while (frame := await receive_frame(process.stdout)) is not None:
                    self._take(frame)
        finally:
            # Its output has ended, so it has, or it is of no more use.
            await _ended(process)
            self._ended.set()
            for future, _ in self._requests.values():
                if not future.done():
                    future.set_exception(self._death())

    def _take(self, frame: Fields) -> None:
        future, on_progress = self._requests.get(frame["id"], (None, None))
        if "progress" in frame:
            if on_progress is not None:
                on_progress(frame["progress"], frame["losses"])
        elif future is not None and not future.done():
            future.set_result(frame)

    def _kill(self) -> None:
        if self.pid is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _death(self) -> TrainerDied:
        code = self._process.returncode if self._process is not None else None
        if code is None:
            return TrainerDied("the trainer does not run")
        if code == -signal.SIGKILL:
            return TrainerDied(
                "the trainer was killed", "if this happens again, memory may be short: use a smaller model"
            )
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return TrainerDied(f"the trainer ended {how}", "the daemon's log says more")


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait for the end of a process that should end by itself; if it does not, end it."""
    try:
        await asyncio.wait_for(process.wait(), _END_WITHIN_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def trial_fields(trial: Trial) -> dict[str, Any]:
    """A trial as the trainer process reads it."""
    return {
        "contribution": encode_contribution(trial.contribution),
        "reference": [encode_contribution(one) for one in trial.reference],
        "stem": [encode_contribution(one) for one in trial.stem],
        "behind": trial.behind,
        "class_counts": None if trial.class_counts is None else list(trial.class_counts),
    }


def _frontier_fields(frontiers: Mapping[ShardId, Sequence[Contribution]]) -> dict[str, list[bytes]]:
    return {shard: [encode_contribution(one) for one in frontier] for shard, frontier in frontiers.items()}


def _digests(frontiers: Mapping[ShardId, Sequence[Contribution]]) -> list[str]:
    digests = (one.tensors_digest for frontier in frontiers.values() for one in frontier)
    return list(dict.fromkeys(digests))
