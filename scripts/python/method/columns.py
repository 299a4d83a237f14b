"""The four columns: central dense (A), grouped (B), decoupled (C), and assembled from devices (D)."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from p2pcollab import cost
from p2pcollab.assembly import load_model, save_atomic
from p2pcollab.central import Central, train_decoupled, train_dense, train_grouped
from p2pcollab.daemon.rehearsal import Rehearsal, RehearsedDevice
from p2pcollab.daemon.workshop import peak_rss_bytes
from p2pcollab.data import ArrayDataset, load
from p2pcollab.data.batches import Thinning, batches, eval_batches, offered_batch
from p2pcollab.data.partition import Share
from p2pcollab.lease import autocast_for
from p2pcollab.models import initial_shard
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.training import accuracy, train_branches

from .configuration import Configuration

OnProgress = Callable[[float], None]
"""Told which part of a column is trained, 0..1."""

_CENTRAL: Final[Mapping[str, Callable[..., Central]]] = {
    "A": train_dense,
    "B": train_grouped,
    "C": train_decoupled,
}
#: Apart from all seeds of the runs: for the further times that branches see their own examples.
_FURTHER_SEED: Final = 1_000_003
#: Steps of one timing, and how often the two networks take turns.
_TIMED_STEPS: Final = 16
_TURNS: Final = 7
#: Steps after which memory has peaked.
_PEAK_STEPS: Final = 6
#: MAC/s of the slowest device. Only the ratios matter: no time is measured in the rehearsal.
_SLOWEST_MACS_S: Final = 1e10


def run_column(
    configuration: Configuration,
    column: str,
    seed: int,
    threads: int,
    on_progress: OnProgress,
    model_file: Path,
) -> dict[str, Any]:
    """Train one column with one seed; JSON values.

    Args:
        model_file: where the assembled model goes, for what one may ask of it later.
    """
    torch.set_num_threads(threads)
    spec = configuration.spec(seed, column)
    started = time.monotonic()
    if column == "D":
        result = _assembled(configuration, spec, seed, threads, on_progress, model_file)
    else:
        result = _central(configuration, spec, column, seed, on_progress)
    return result | {
        "column": column,
        "seed": seed,
        "seconds": time.monotonic() - started,
        "threads": threads,
        "spec": spec.model_dump(mode="json"),
    }


def _central(
    configuration: Configuration, spec: RunSpec, column: str, seed: int, on_progress: OnProgress
) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load(configuration.source, spec, configuration.root, limit=configuration.limit)
    budget = spec.schedule.budget_samples

    def on_step(done: int, _losses: object) -> bool:
        on_progress(done / budget)
        return True

    source = batches(data.train, spec, seed=seed, samples=budget)
    more: dict[str, Any] = {}
    if column == "C" and spec.schedule.positives is not None:
        seeds = [_FURTHER_SEED * (seed + 1) + again for again in range(1, spec.schedule.positives)]
        more["repeats"] = [batches(data.train, spec, seed=one, samples=budget) for one in seeds]
    trained = _CENTRAL[column](spec, source, device=device, on_step=on_step, **more)
    return {
        "accuracy": _accuracy(trained.model, data.test, spec, device),
        "macs": trained.macs,
        "train_images": len(data.train),
        "test_images": len(data.test),
    }


def _assembled(
    configuration: Configuration,
    spec: RunSpec,
    seed: int,
    threads: int,
    on_progress: OnProgress,
    model_file: Path,
) -> dict[str, Any]:
    shared = configuration.partition == "shared"
    count = len(configuration.speeds)
    devices = [
        RehearsedDevice(speed=_SLOWEST_MACS_S * speed, share=None if shared else Share(index + 1, count))
        for index, speed in enumerate(configuration.speeds)
    ]
    rehearsed = Rehearsal(
        spec,
        devices,
        source=configuration.source,
        root=configuration.root,
        limit=configuration.limit,
        threads=threads,
        seed=seed,
        on_lease=on_progress,
    ).run()
    save_atomic(model_file, rehearsed.model)
    loaded = load_model(rehearsed.model)
    data = load(configuration.source, spec, configuration.root, limit=configuration.limit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "accuracy": _accuracy(loaded.model, data.test, spec, device),
        "macs": sum(tally.macs for tally in rehearsed.devices),
        "devices": [
            {"speed": speed, **asdict(tally)}
            for speed, tally in zip(configuration.speeds, rehearsed.devices, strict=True)
        ],
        "discarded": rehearsed.discarded,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "inference_macs": cost.evaluation_macs(spec, [ShardId(task.id) for task in spec.tasks]),
        "dense_inference_macs": cost.macs_dense(spec),
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
    }


def _accuracy(model: nn.Module, test: ArrayDataset, spec: RunSpec, device: str) -> float:
    return accuracy(model, eval_batches(test, spec), device, autocast_for(device, spec))


def measure(configuration: Configuration) -> dict[str, Any]:
    """Seconds of an epoch on one core and peak memory, of the dense network and of a sub-model with one task.

    JSON values. Each in a process of its own, as a device trains.
    """
    spec = configuration.spec(0)
    return {
        "timing": _in_child(_measure_seconds, configuration),
        "peak_rss_bytes": {
            kind: _in_child(_measure_peak, spec.encode(), kind) for kind in ("sub-model", "dense")
        },
    }


def _in_child(measured: Callable[..., Any], *arguments: object) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, arguments)


def _measure_seconds(configuration: Configuration) -> dict[str, float]:
    """The two networks in turns."""
    torch.set_num_threads(1)
    spec = configuration.spec(0)
    data = load(configuration.source, spec, configuration.root, limit=configuration.limit).train
    seconds: dict[str, list[float]] = {"sub-model": [], "dense": []}
    for _ in range(_TURNS):
        for kind, times in seconds.items():
            times.append(_epoch_seconds(spec, data, kind))
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {
        "sub_model_epoch_s": medians["sub-model"],
        "dense_epoch_s": medians["dense"],
        "ratio": medians["dense"] / medians["sub-model"],
    }


def _epoch_seconds(spec: RunSpec, data: ArrayDataset, kind: str) -> float:
    """Extrapolated from some steps, after one that prepares kernels and memory."""
    marks: list[float] = []

    def on_step(_done: int, _losses: object) -> bool:
        marks.append(time.perf_counter())
        return len(marks) <= _TIMED_STEPS

    _train_steps(spec, data, kind, on_step)
    steps = len(data) / offered_batch(data, spec)
    return steps * (marks[-1] - marks[0]) / (len(marks) - 1)


def _train_steps(
    spec: RunSpec, data: ArrayDataset, kind: str, on_step: Callable[[int, object], bool]
) -> None:
    samples = 2 * (_TIMED_STEPS + 1) * offered_batch(data, spec)
    if kind == "dense":
        train_dense(spec, batches(data, spec, seed=0, samples=samples), on_step=on_step)
        return
    task = ShardId(spec.tasks[0].id)
    train_branches(
        spec,
        initial_shard(spec, STEM),
        {task: initial_shard(spec, task)},
        batches(data, spec, seed=0, samples=samples, thinning=Thinning.of(spec, [task])),
        start_progress={task: 0.0},
        samples=samples,
        batch_offered=offered_batch(data, spec),
        on_step=on_step,
    )


def _measure_peak(encoded: bytes, kind: str) -> int:
    """Peak memory of a process that trains a few steps of one of the two."""
    torch.set_num_threads(1)
    spec = RunSpec.decode(encoded)
    count = 4 * spec.schedule.batch_size
    shape = (count, spec.input.channels, spec.input.height, spec.input.width)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = ArrayDataset(images=images, labels=np.arange(count) % len(spec.classes))
    steps = 0

    def on_step(_done: int, _losses: object) -> bool:
        nonlocal steps
        steps += 1
        return steps < _PEAK_STEPS

    _train_steps(spec, data, kind, on_step)
    return peak_rss_bytes()
