"""The trainer process: it trains, answers meanwhile, and leaves nothing behind whoever dies."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from p2pcollab import limits
from p2pcollab.assembly import load_model
from p2pcollab.cost import evaluation_macs, training_macs
from p2pcollab.daemon.trainer import (
    Budget,
    LeaseJob,
    LeaseOutcome,
    TrainedShard,
    Trainer,
    TrainerDied,
    TrainerSettings,
)
from p2pcollab.errors import DataError, PeerError, StorageError
from p2pcollab.judging import OTHERS_MAX, OWN_MAX
from p2pcollab.keys import Identity
from p2pcollab.ledger import Contribution, Ledger, next_generation, successor_seen
from p2pcollab.models import default_model, initial_shard
from p2pcollab.plans import Trial
from p2pcollab.run import STEM, InputSpec, RunSpec, Schedule, ShardId, TaskSpec
from p2pcollab.screen import RMS_FLOOR, reason_to_refuse_tensors
from p2pcollab.shards import decode_shard, encode_shard
from p2pcollab.wire import sign_contribution

T = TypeVar("T")

SPEC = RunSpec(
    name="digits",
    classes=tuple(str(digit) for digit in range(10)),
    tasks=tuple(TaskSpec(id=f"t{digit}", classes=(digit,)) for digit in range(10)),
    model=default_model("digits"),
    input=InputSpec(channels=1, height=8, width=8, mean=(0.3,), std=(0.3,), augment="none"),
    schedule=Schedule(budget_samples=4096, lease_samples=512, batch_size=32, peak_lr=0.05),
    seed=1,
)
SETTINGS = TrainerSettings(source="digits", share="1/2", budget=Budget(threads=1, duty=1.0))
BRANCHES = (ShardId("t0"), ShardId("t3"))
FOR_EVER = 10**9
DEADLINE_S = 60.0


class Bench:
    """One configured trainer for many tests, and the shards that it has made."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.identity = Identity.from_bytes(bytes(range(32)))
        self.shards: dict[str, bytes] = {}
        self.trainer = Trainer(threads=1)

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, DEADLINE_S))

    def train(self, job: LeaseJob, **arguments: Any) -> LeaseOutcome:
        return self.run(self.trainer.train(job, self.shards.get, **arguments))

    def publish(self, outcome: LeaseOutcome, ledger: Ledger, stem_digest: str = "initial") -> Ledger:
        """The ledger with what a lease has made."""
        for shard, made in outcome.shards.items():
            digest = hashlib.sha256(made.data).hexdigest()
            self.shards[digest] = made.data
            frontier = ledger.frontier(shard)
            ledger = ledger.add(
                sign_contribution(
                    self.identity,
                    run_id=SPEC.run_id,
                    shard=shard,
                    generation=next_generation(frontier),
                    seen=successor_seen(frontier, self.identity.device, outcome.samples),
                    lease_samples=outcome.samples,
                    stem_digest="" if shard == STEM else stem_digest,
                    tensors_digest=digest,
                    tensors_bytes=len(made.data),
                    loss=made.loss,
                    accuracy=made.accuracy,
                )
            )
        return ledger


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench()
    # A trainer that imports hivemind does not get past this: its memory is for training.
    poison = tmp_path_factory.mktemp("poison")
    (poison / "hivemind.py").write_text("raise SystemExit('the trainer imports hivemind')")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(poison), prepend=os.pathsep)
        bench.run(bench.trainer.start())
    bench.run(bench.trainer.configure(SPEC, SETTINGS))
    yield bench
    bench.run(bench.trainer.close())
    bench.loop.close()


def job(*shards: ShardId, samples: int = 128, ledger: Ledger | None = None, seed: int = 5) -> LeaseJob:
    ledger = ledger or Ledger()
    return LeaseJob(
        shards=shards,
        frontiers={shard: ledger.frontier(shard) for shard in {STEM, *shards}},
        samples=samples,
        progress={shard: ledger.progress(shard, SPEC) for shard in shards},
        seed=seed,
    )


def trials(contributions: Iterable[Contribution], reference: Iterable[Contribution] = ()) -> list[Trial]:
    return [
        Trial(contribution=one, reference=tuple(reference), stem=(), behind=0, class_counts=None)
        for one in contributions
    ]


def test_data_are_summed_up(bench: Bench) -> None:
    summary = bench.run(bench.trainer.configure(SPEC, SETTINGS))
    assert summary.train == sum(summary.class_counts) > 0
    assert len(summary.class_counts) == 10
    assert summary.test > 0
    assert any("1/2" in note for note in summary.notes)


def test_measuring_counts_its_own_work(bench: Bench) -> None:
    measured = bench.run(bench.trainer.measure())
    assert measured.macs_per_s > 0
    assert measured.macs >= training_macs(SPEC, BRANCHES[:1]) * 8
    assert measured.seconds > 0


@pytest.mark.parametrize("shards", [(STEM,), BRANCHES])
def test_lease_gives_shards_that_any_peer_accepts(bench: Bench, shards: tuple[ShardId, ...]) -> None:
    outcome = bench.train(job(*shards))
    assert set(outcome.shards) == set(shards)
    assert outcome.samples == 128
    # One example is tried for 40 samples of a lease, and at least 64 are.
    validated = min(64, bench.run(bench.trainer.configure(SPEC, SETTINGS)).test)
    spent = 128 * training_macs(SPEC, shards) + validated * evaluation_macs(SPEC, shards)
    assert outcome.macs == spent
    assert outcome.peak_rss_bytes > 50 * limits.MIB
    for shard, made in outcome.shards.items():
        decode_shard(made.data, SPEC, shard)
        assert 0.0 <= made.accuracy <= 1.0
        assert made.loss > 0.0


def test_equal_jobs_make_equal_bytes(bench: Bench) -> None:
    first, second = bench.train(job(*BRANCHES)), bench.train(job(*BRANCHES))
    assert {s: made.data for s, made in first.shards.items()} == {
        s: made.data for s, made in second.shards.items()
    }


def test_leases_build_on_each_other_and_the_model_learns(bench: Bench) -> None:
    ledger = bench.publish(bench.train(job(STEM, samples=768)), Ledger())
    everything = tuple(ShardId(task.id) for task in SPEC.tasks)
    for seed in range(2):
        ledger = bench.publish(bench.train(job(*everything, samples=768, ledger=ledger, seed=seed)), ledger)
    frontiers = {shard: ledger.frontier(shard) for shard in SPEC.shards}
    model = bench.run(bench.trainer.assemble(frontiers, bench.shards.get))
    assert (model.missing, model.coverage) == ((), 1.0)
    score = bench.run(bench.trainer.evaluate(model.data))
    assert score.accuracy > 0.8
    assert sum(map(sum, score.confusion)) == score.samples > 0
    assert score.macs == score.samples * evaluation_macs(SPEC, everything)
    assert all(accuracy is not None for accuracy in score.class_accuracy())
    assert bench.run(bench.trainer.evaluate(model.data, at_most=50)).samples == 50
    assert load_model(model.data).provenance["t3"]["samples"] == 2 * 768


def test_partial_model_names_what_is_missing(bench: Bench) -> None:
    ledger = bench.publish(bench.train(job(*BRANCHES)), Ledger())
    frontiers = {shard: ledger.frontier(shard) for shard in SPEC.shards}
    model = bench.run(bench.trainer.assemble(frontiers, bench.shards.get))
    assert model.coverage == 0.2
    assert model.missing == tuple(shard for shard in SPEC.shards if shard not in (STEM, *BRANCHES))


def test_cancelled_lease_gives_what_was_done_and_others_are_served_meanwhile(bench: Bench) -> None:
    async def work() -> tuple[LeaseOutcome, int]:
        begun = asyncio.Event()
        reports: list[int] = []

        def on_progress(samples: int, losses: Mapping[ShardId, float]) -> None:
            assert set(losses) == set(BRANCHES)
            reports.append(samples)
            begun.set()

        long_job = job(*BRANCHES, samples=FOR_EVER)
        lease = asyncio.create_task(bench.trainer.train(long_job, bench.shards.get, on_progress))
        await begun.wait()
        await bench.trainer.assemble({}, bench.shards.get)
        assert not lease.done()
        await bench.trainer.cancel()
        outcome = await lease
        assert reports == sorted(reports)
        return outcome, reports[-1]

    outcome, reported = bench.run(work())
    assert reported <= outcome.samples < FOR_EVER
    assert set(outcome.shards) == set(BRANCHES)


def test_lease_that_nobody_waits_for_any_more_ends(bench: Bench) -> None:
    async def work() -> None:
        begun = asyncio.Event()
        endless = job(*BRANCHES, samples=FOR_EVER)
        lease = asyncio.create_task(
            bench.trainer.train(endless, bench.shards.get, lambda samples, losses: begun.set())
        )
        await begun.wait()
        lease.cancel()
        await asyncio.gather(lease, return_exceptions=True)
        await bench.trainer.measure()

    bench.run(work())


def test_peers_shard_that_is_not_what_it_says_is_named_and_never_merged(bench: Bench) -> None:
    outcome = bench.train(job(*BRANCHES))
    good = bench.publish(outcome, Ledger())
    for made in outcome.shards.values():
        bench.shards[hashlib.sha256(made.data).hexdigest()] = made.data[:-1] + b"\xff"
    contributions = list(good.entries.values())
    verdicts = bench.run(bench.trainer.check(trials(contributions), lambda digest: b"garbage"))
    assert all(verdict and verdict.gross and "bytes" in verdict.reason for verdict in verdicts.found)
    with pytest.raises(PeerError, match=contributions[0].device[:8]):
        bench.run(bench.trainer.train(job(*BRANCHES, ledger=good), lambda digest: b"garbage"))
    good = bench.publish(outcome, Ledger())
    assert bench.run(bench.trainer.check(trials(contributions), bench.shards.get)).found == (None, None)


def test_lease_from_a_state_just_under_a_bound_is_not_malformed(bench: Bench) -> None:
    """A liar that gives such a state would have honest devices convicted of what they made of it."""
    branch = BRANCHES[0]
    outcome = bench.train(job(branch))
    tensors = decode_shard(outcome.shards[branch].data, SPEC, branch)
    tensors["head.bias"] = torch.full_like(tensors["head.bias"], 0.999 * RMS_FLOOR)
    pill = replace(outcome.shards[branch], data=encode_shard(tensors))
    ledger = bench.publish(replace(outcome, shards={branch: pill}), Ledger())
    assert reason_to_refuse_tensors(tensors, initial_shard(SPEC, branch)) is None
    again = bench.train(job(branch, ledger=ledger))
    made = decode_shard(again.shards[branch].data, SPEC, branch)
    # Unscaled it stays where it was: training moves the two biases apart, and their mean hardly.
    assert float(made["head.bias"].square().mean().sqrt()) <= 0.996 * RMS_FLOOR
    assert reason_to_refuse_tensors(made, initial_shard(SPEC, branch)) is None


def test_peers_work_is_tried_on_own_examples_against_what_is_here(bench: Bench) -> None:
    shard = BRANCHES[1]
    ledger = Ledger()
    for seed in range(2):
        ledger = bench.publish(bench.train(job(shard, samples=512, ledger=ledger, seed=seed)), ledger)
    good = ledger.frontier(shard)
    lie = {name: -tensor for name, tensor in initial_shard(SPEC, shard).items()}
    lie |= {name: -tensor for name, tensor in lie.items() if name.endswith(("running_var", "tracked"))}
    bad = bench.publish(
        LeaseOutcome(
            shards={shard: TrainedShard(data=encode_shard(lie), loss=0.1, accuracy=0.9)},
            samples=100,
            macs=0,
            seconds=0.0,
            peak_rss_bytes=0,
        ),
        ledger,
    ).frontier(shard)
    told = bench.run(bench.trainer.check(trials(bad, reference=good), bench.shards.get))
    (verdict,) = told.found
    assert verdict is not None and "worse than what it would replace" in verdict.reason
    # Once with it and once without.
    assert 0 < told.macs <= 2 * (OWN_MAX + OTHERS_MAX) * evaluation_macs(SPEC, [shard])
    better = bench.run(bench.trainer.check(trials(good), bench.shards.get))
    assert better.found == (None,)
    # Where the reference was lost or damaged meanwhile, guessing takes its place.
    lost = {entry.tensors_digest: b"garbage" for entry in good}
    read = {**bench.shards, **lost}.get
    assert bench.run(bench.trainer.check(trials(bad, reference=good), read)).found != (None,)


def test_shard_that_the_store_lost_is_a_storage_error(bench: Bench) -> None:
    ledger = bench.publish(bench.train(job(*BRANCHES)), Ledger())
    with pytest.raises(StorageError, match="not in the store"):
        bench.run(bench.trainer.train(job(*BRANCHES, ledger=ledger), lambda digest: None))
    assert bench.train(job(*BRANCHES, ledger=ledger)).samples == 128


def test_data_that_cannot_be_used_are_told_with_what_to_do(bench: Bench, tmp_path: Path) -> None:
    settings = TrainerSettings(source=str(tmp_path / "none"), budget=SETTINGS.budget)
    with pytest.raises(DataError) as caught:
        bench.run(bench.trainer.configure(SPEC, settings))
    assert caught.value.fix
    bench.run(bench.trainer.configure(SPEC, SETTINGS))


def test_device_without_data_checks_and_assembles_but_does_not_train(bench: Bench) -> None:
    summary = bench.run(bench.trainer.configure(SPEC, TrainerSettings(source=None, budget=SETTINGS.budget)))
    assert (summary.train, summary.test, sum(summary.class_counts)) == (0, 0, 0)
    model = bench.run(bench.trainer.assemble({}, bench.shards.get))
    assert bench.run(bench.trainer.evaluate(model.data)).samples == 0
    with pytest.raises(DataError):
        bench.train(job(*BRANCHES))
    with pytest.raises(DataError):
        bench.run(bench.trainer.measure())
    bench.run(bench.trainer.configure(SPEC, SETTINGS))


def test_relative_paths_are_the_daemons(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in SPEC.classes[:2]:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    settings = TrainerSettings(source="photos", budget=SETTINGS.budget)
    assert bench.run(bench.trainer.configure(SPEC, settings)).train > 0
    bench.run(bench.trainer.configure(SPEC, SETTINGS))


def test_lease_that_is_cancelled_before_it_comes_does_not_begin(bench: Bench) -> None:
    ledger = bench.publish(bench.train(job(*BRANCHES)), Ledger())

    async def work() -> None:
        reading, cancelled = threading.Event(), threading.Event()

        def read(digest: str) -> bytes:
            reading.set()
            assert cancelled.wait(DEADLINE_S)
            return bench.shards[digest]

        lease = asyncio.create_task(
            bench.trainer.train(job(*BRANCHES, samples=FOR_EVER, ledger=ledger), read)
        )
        await asyncio.to_thread(reading.wait, DEADLINE_S)
        await bench.trainer.cancel()
        cancelled.set()
        outcome = await lease
        assert outcome.samples == 0 and not outcome.shards

    bench.run(work())


def test_interrupt_in_the_terminal_does_not_reach_the_trainer(bench: Bench) -> None:
    assert bench.trainer.pid is not None
    os.kill(bench.trainer.pid, signal.SIGINT)
    assert bench.train(job(*BRANCHES)).samples == 128


def test_killed_trainer_is_an_error_and_its_successor_goes_on(bench: Bench) -> None:
    async def work() -> None:
        begun = asyncio.Event()
        lease = asyncio.create_task(
            bench.trainer.train(
                job(*BRANCHES, samples=FOR_EVER), bench.shards.get, lambda samples, losses: begun.set()
            )
        )
        await begun.wait()
        assert bench.trainer.pid is not None
        os.kill(bench.trainer.pid, signal.SIGKILL)
        with pytest.raises(TrainerDied, match="killed"):
            await lease
        await bench.trainer.wait_ended()
        assert bench.trainer.pid is None
        with pytest.raises(TrainerDied):
            await bench.trainer.measure()
        with pytest.raises(TrainerDied):
            await bench.trainer.check([], bench.shards.get)
        early = asyncio.create_task(bench.trainer.restart())
        while bench.trainer.pid is None:  # noqa: ASYNC110 - the process is started by the other task
            await asyncio.sleep(0)
        assert (await bench.trainer.check([], bench.shards.get)).found == ()
        summary = await early
        assert summary is not None and summary.train > 0

    bench.run(work())
    assert bench.train(job(*BRANCHES)).samples == 128


DAEMON = """
import asyncio, subprocess, sys, psutil
from p2pcollab.daemon.trainer import Trainer

async def main():
    trainer = Trainer(threads=1)
    await trainer.start()
    guarded = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    await trainer.guard(guarded.pid, psutil.Process(guarded.pid).create_time())
    if sys.argv[1] == "close":
        await trainer.close()
    print(trainer.pid or 0, guarded.pid, flush=True)
    await asyncio.Event().wait()  # until it is killed

asyncio.run(main())
"""


def start_daemon(how: str) -> tuple[subprocess.Popen[bytes], int, psutil.Process]:
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, how], stdout=subprocess.PIPE, cwd="/")
    assert daemon.stdout is not None
    trainer, guarded = (int(text) for text in daemon.stdout.readline().split())
    return daemon, trainer, psutil.Process(guarded)


def test_killed_daemon_leaves_neither_trainer_nor_p2pd_behind() -> None:
    daemon, trainer, guarded = start_daemon("live")
    remains = [psutil.Process(trainer), guarded]
    daemon.kill()
    daemon.communicate()
    _, alive = psutil.wait_procs(remains, timeout=DEADLINE_S)
    assert not alive


def test_trainer_that_is_closed_leaves_p2pd_to_the_daemon() -> None:
    daemon, trainer, guarded = start_daemon("close")
    try:
        assert trainer == 0
        assert guarded.is_running()
    finally:
        guarded.kill()
        daemon.kill()
        daemon.communicate()


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_budget_comes_to_its_share_of_the_cores(share: float) -> None:
    cores = Budget.plan(1.0).threads
    budget = Budget.plan(share)
    assert budget.threads >= 1
    assert budget.threads * budget.duty == pytest.approx(share * cores)
    assert Budget.plan(1.0, threads=2 * cores).duty == 0.5
