"""What the trainer process does with PyTorch: one method for each request, plain values in and out."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import torch

from .. import cost, limits
from ..assembly import assemble, load_model, merged_shard, to_bytes
from ..data.arrays import ArrayDataset, LoadedData
from ..data.batches import Thinning, batches, eval_batches, offered_batch
from ..data.partition import Share, stratified_subset
from ..data.sources import load
from ..errors import PeerError, RunError, UsageError
from ..lease import OnStep
from ..ledger import Contribution
from ..models import default_model, initial_shard
from ..plans import Trial
from ..run import STEM, InputSpec, RunSpec, Schedule, ShardId, TaskSpec
from ..screen import reason_to_refuse_tensors, within_bounds
from ..shards import ShardTensors, decode_shard, encode_shard
from ..training import LeaseResult, evaluate_shards, log_probabilities, train_branches, train_stem
from ..trust import Verdict
from ..wire import decode_contribution
from .frames import Fields
from .judge import Judge

Blobs = Mapping[str, bytes]
"""Shards by digest, as they lie in the store."""

#: How long `measure` trains.
_MEASURE_S: Final = 0.25
#: First batch of `measure`: small, so that a slow device is not held up by it.
_PROBE_SAMPLES: Final = 8
#: One example is tried for so many of a lease's samples, and at least so many: trying costs a few per cent.
_TRIED_PART: Final = 40
_TRIED_MIN: Final = 64
#: Part of a device's memory for the features of what it tries others' work on.
_FEATURES_PART: Final = 16
#: Without test data, one in so many training examples is held out to try a lease's result on.
_HELD_OUT: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """What `configure` has prepared."""

    spec: RunSpec
    train: ArrayDataset
    #: To try a lease's result on: never trained on.
    validation: ArrayDataset
    #: To try an assembled model on.
    test: ArrayDataset
    device: torch.device
    duty: float
    judge: Judge


class Workshop:
    """Data, model and device of one run."""

    def __init__(self) -> None:
        self._prepared: _Setting | None = None
        _warm_up()

    @property
    def configured(self) -> bool:
        """Whether `configure` has succeeded."""
        return self._prepared is not None

    @property
    def train_data(self) -> ArrayDataset:
        """What this device trains on."""
        return self._setting.train

    @property
    def duty(self) -> float:
        """Fraction of the time in which to compute."""
        return self._setting.duty

    def configure(self, fields: Fields) -> Fields:
        """Take the budget, and load the data.

        Raises:
            DataError: they cannot be used.
        """
        # Relative to what this process had at first: a second call must not add up.
        os.nice(max(0, fields["niceness"] - os.nice(0)))
        torch.set_num_threads(fields["threads"])
        # Where the user's relative paths begin; it may be gone by now.
        with contextlib.suppress(OSError):
            os.chdir(fields["folder"])
        spec = RunSpec.decode(fields["spec"])
        loaded = _load(spec, fields)
        train, validation = _hold_out(loaded, spec)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        test = loaded.test if len(loaded.test) else validation
        self._prepared = _Setting(
            spec=spec,
            train=train,
            validation=validation,
            test=test,
            device=device,
            duty=fields["duty"],
            judge=Judge(spec, test, device, fields["judge_seed"], _features_bytes()),
        )
        return {
            "train": len(train),
            "test": len(loaded.test),
            "class_counts": train.counts(len(spec.classes)),
            "notes": list(loaded.notes),
        }

    def measure(self) -> Fields:
        """Train the first task's branch for a moment: MAC/s within the budget."""
        began = time.perf_counter()
        probe = self._timed_steps(_PROBE_SAMPLES, _MEASURE_S / 4)
        size = self._setting.spec.schedule.batch_size
        macs, rate = probe
        left_s = _MEASURE_S - (time.perf_counter() - began)
        step_s = self._step_macs(size) / rate
        if size > _PROBE_SAMPLES and 2 * step_s < left_s:
            more, rate = self._timed_steps(size, left_s)
            macs += more
        return {
            "macs_per_s": rate * self._setting.duty,
            "macs": macs,
            "seconds": time.perf_counter() - began,
        }

    def train(self, fields: Fields, blobs: Blobs, on_step: OnStep) -> Fields:
        """Train one lease, and try its result on held-out examples.

        Raises:
            RunError: training diverged.
            PeerError: a shard is not what its contribution says.
        """
        spec, shards = self._setting.spec, [ShardId(shard) for shard in fields["shards"]]
        frontiers = self._frontiers(fields["frontiers"])
        states = {
            shard: merged_shard(spec, shard, frontiers.get(shard, ()), self._decoder(blobs))
            for shard in {STEM, *shards}
        }
        result = self._train(shards, states, fields, on_step)
        made, macs = self._published(result, states[STEM])
        return {
            "shards": made,
            "samples": result.samples,
            "macs": result.macs + macs,
            "seconds": result.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def nothing_trained(self) -> Fields:
        """What `train` returns for a lease that never began."""
        return {"shards": {}, "samples": 0, "macs": 0, "seconds": 0.0, "peak_rss_bytes": peak_rss_bytes()}

    def check(self, fields: Fields, blobs: Blobs) -> Fields:
        """What is wrong with shards, and the MACs that trying them has cost."""
        spec, judge, decode = self._setting.spec, self._setting.judge, self._decoder(blobs)
        verdicts: list[Fields | None] = []
        spent = judge.macs
        for told in fields["trials"]:
            try:
                trial = self._trial(told)
                tensors = decode(trial.contribution)
            except PeerError as error:
                verdicts.append({"reason": error.what, "gross": True, "malformed": True})
                continue
            initial = initial_shard(spec, trial.contribution.shard)
            reason = reason_to_refuse_tensors(tensors, initial)
            if reason:
                found: Verdict | None = Verdict(reason=reason, gross=True, malformed=True)
            else:
                found = judge.verdict(trial, tensors, decode)
            verdicts.append(None if found is None else asdict(found))
        return {"verdicts": verdicts, "macs": judge.macs - spent}

    def _trial(self, told: Fields) -> Trial:
        run_id = self._setting.spec.run_id
        return Trial(
            contribution=decode_contribution(told["contribution"], run_id),
            reference=tuple(decode_contribution(one, run_id) for one in told["reference"]),
            stem=tuple(decode_contribution(one, run_id) for one in told["stem"]),
            behind=told["behind"],
            class_counts=None if told["class_counts"] is None else tuple(told["class_counts"]),
        )

    def assemble(self, fields: Fields, blobs: Blobs) -> Fields:
        """The global model's bytes.

        Raises:
            PeerError: a shard is not what its contribution says.
        """
        frontiers = self._frontiers(fields["frontiers"])
        model = assemble(self._setting.spec, frontiers, self._decoder(blobs))
        return {"data": to_bytes(model), "missing": list(model.missing), "coverage": model.coverage}

    def evaluate(self, fields: Fields) -> Fields:
        """Accuracy and confusion of an assembled model on this device's test data.

        Raises:
            UsageError: it is not a model of this run.
        """
        setting = self._setting
        loaded = load_model(fields["data"])
        if loaded.spec != setting.spec:
            raise UsageError("the model belongs to another run")
        test = _at_most(setting.test, fields["at_most"], setting.spec.seed)
        classes = len(setting.spec.classes)
        confusion = np.zeros((classes, classes), dtype=np.int64)
        if len(test):
            scores_NC, labels_N = log_probabilities(
                loaded.model, eval_batches(test, setting.spec), setting.device
            )
            np.add.at(confusion, (labels_N.numpy(), scores_NC.argmax(1).numpy()), 1)
        present = [ShardId(task.id) for task in setting.spec.tasks if task.id not in loaded.missing]
        return {
            "accuracy": float(confusion.trace()) / len(test) if len(test) else 0.0,
            "samples": len(test),
            "confusion": confusion.tolist(),
            "macs": len(test) * cost.evaluation_macs(setting.spec, present),
        }

    @property
    def _setting(self) -> _Setting:
        if self._prepared is None:
            raise RunError("the trainer has no data yet")
        return self._prepared

    def _frontiers(self, encoded: Mapping[str, Sequence[bytes]]) -> dict[ShardId, list[Contribution]]:
        run_id = self._setting.spec.run_id
        return {
            ShardId(shard): [decode_contribution(one, run_id) for one in some]
            for shard, some in encoded.items()
        }

    def _decoder(self, blobs: Blobs) -> _Decoder:
        return _Decoder(self._setting.spec, blobs)

    def _train(
        self,
        shards: Sequence[ShardId],
        states: Mapping[ShardId, ShardTensors],
        fields: Fields,
        on_step: OnStep,
    ) -> LeaseResult:
        setting, samples = self._setting, fields["samples"]
        thinning = Thinning.of(setting.spec, shards)
        source = batches(setting.train, setting.spec, seed=fields["seed"], samples=samples, thinning=thinning)
        progress = {ShardId(shard): value for shard, value in fields["progress"].items()}
        if shards == [STEM]:
            return train_stem(
                setting.spec,
                states[STEM],
                source,
                start_progress=progress[STEM],
                samples=samples,
                device=setting.device,
                on_step=on_step,
            )
        return train_branches(
            setting.spec,
            states[STEM],
            {shard: states[shard] for shard in shards},
            source,
            start_progress=progress,
            samples=samples,
            batch_offered=offered_batch(setting.train, setting.spec),
            device=setting.device,
            on_step=on_step,
        )

    def _published(self, result: LeaseResult, stem: ShardTensors) -> tuple[dict[str, Fields], int]:
        """What a lease made as it is published, and the MACs that trying it has cost."""
        setting = self._setting
        trained = {
            shard: within_bounds(tensors, initial_shard(setting.spec, shard))
            for shard, tensors in result.tensors.items()
        }
        branches = {shard: tensors for shard, tensors in trained.items() if shard != STEM}
        tried = evaluate_shards(
            setting.spec,
            trained.get(STEM, stem),
            branches,
            eval_batches(setting.validation, setting.spec),
            device=setting.device,
        )
        made: dict[str, Fields] = {
            shard: {
                "data": encode_shard(tensors),
                "loss": result.losses[shard],
                "accuracy": tried.scores[shard].accuracy,
            }
            for shard, tensors in trained.items()
        }
        return made, tried.macs

    def _timed_steps(self, batch_size: int, within_s: float) -> tuple[int, float]:
        """Train a branch for a while: MACs spent, and MAC/s of all steps but the first.

        The first step prepares kernels and memory; it counts only where it is all that the time allows.
        """
        setting = self._setting
        schedule = setting.spec.schedule.model_copy(update={"batch_size": max(2, batch_size)})
        spec = setting.spec.model_copy(update={"schedule": schedule})
        shard = ShardId(spec.tasks[0].id)
        samples = 1000 * batch_size
        states = {one: initial_shard(spec, one) for one in (STEM, shard)}
        began = time.perf_counter()
        marks: list[tuple[int, float]] = []

        def on_step(samples_done: int, _losses: Mapping[ShardId, float]) -> bool:
            marks.append((samples_done, time.perf_counter()))
            return marks[-1][1] - began < within_s

        train_branches(
            spec,
            states[STEM],
            {shard: states[shard]},
            batches(setting.train, spec, seed=0, samples=samples),
            start_progress={shard: 0.0},
            samples=samples,
            device=setting.device,
            on_step=on_step,
        )
        (first, start), (last, end) = ((0, began), marks[0]) if len(marks) == 1 else (marks[0], marks[-1])
        per_sample = cost.training_macs(spec, [shard])
        return last * per_sample, (last - first) * per_sample / max(end - start, 1e-9)

    def _step_macs(self, batch_size: int) -> int:
        spec = self._setting.spec
        return batch_size * cost.training_macs(spec, [ShardId(spec.tasks[0].id)])


class _Decoder:
    """A contribution's tensors from the bytes that came with the request."""

    def __init__(self, spec: RunSpec, blobs: Blobs) -> None:
        self._spec = spec
        self._blobs = blobs

    def __call__(self, contribution: Contribution) -> ShardTensors:
        try:
            return decode_shard(self._blobs[contribution.tensors_digest], self._spec, contribution.shard)
        except PeerError as error:
            who = f"the shard {contribution.tensors_digest[:16]} of device {contribution.device[:8]}"
            raise PeerError(f"{who} cannot be used: {error.what}") from error


def _warm_up() -> None:
    """Train a step of a tiny network.

    PyTorch does much on first use, and the first steps are slow: better now, while the
    daemon looks for peers, than in the first step of the run, or in what `measure` measures.
    """
    spec = RunSpec(
        name="warm-up",
        classes=("a", "b"),
        tasks=(TaskSpec(id="t0", classes=(0, 1)),),
        model=default_model("digits"),
        input=InputSpec(channels=1, height=8, width=8, mean=(0.0,), std=(1.0,), augment="none"),
        schedule=Schedule(budget_samples=2, lease_samples=2, batch_size=2, peak_lr=0.1),
        seed=0,
    )
    batch = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    train_stem(spec, initial_shard(spec, STEM), [batch], start_progress=0.0, samples=2)


def _load(spec: RunSpec, fields: Fields) -> LoadedData:
    if fields["source"] is None:
        images = np.zeros((0, spec.input.channels, spec.input.height, spec.input.width), dtype=np.uint8)
        nothing = ArrayDataset(images=images, labels=np.zeros(0, dtype=np.int64))
        return LoadedData(train=nothing, test=nothing)
    return load(
        fields["source"],
        spec,
        Path(fields["root"]) if fields["root"] else None,
        share=Share.parse(fields["share"]) if fields["share"] else None,
        limit=fields["limit"],
        download=fields["download"],
    )


def _hold_out(data: LoadedData, spec: RunSpec) -> tuple[ArrayDataset, ArrayDataset]:
    """What to train on, and what to try a lease's result on."""
    wanted = max(_TRIED_MIN, spec.schedule.lease_samples // _TRIED_PART)
    at_most = min(limits.VALIDATION_EXAMPLES_MAX, wanted)
    if len(data.test):
        return data.train, _at_most(data.test, at_most, spec.seed)
    count = min(at_most, len(data.train) // _HELD_OUT)
    held = np.zeros(len(data.train), dtype=bool)
    held[stratified_subset(data.train.labels, count, seed=spec.seed)] = True
    return data.train.where(~held), data.train.where(held)


def _features_bytes() -> int:
    """What the judge may remember: a Raspberry Pi with 1 GB has 64 MB for it."""
    total: int = psutil.virtual_memory().total
    return min(limits.TRIED_FEATURES_BYTES_MAX, total // _FEATURES_PART)


def _at_most(data: ArrayDataset, count: int | None, seed: int) -> ArrayDataset:
    if count is None or len(data) <= count:
        return data
    return data.subset(stratified_subset(data.labels, count, seed=seed))


def peak_rss_bytes() -> int:
    """The most memory that this process has held at a time."""
    # On Linux getrusage counts what the parent held when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+([0-9]+) kB", status.read_text())
        if found is not None:
            return int(found[1]) * limits.KIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * limits.KIB
