"""One run of the benchmark: devices, some of which lie, and what their model is worth."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch

from p2pcollab import cost
from p2pcollab.assembly import load_model
from p2pcollab.daemon import workshop
from p2pcollab.daemon.rehearsal import RehearsedDevice
from p2pcollab.data import ArrayDataset, load
from p2pcollab.data.arrays import LoadedData
from p2pcollab.data.batches import eval_batches
from p2pcollab.data.partition import Share, stratified_subset
from p2pcollab.errors import UsageError
from p2pcollab.lease import autocast_for
from p2pcollab.run import RunSpec
from p2pcollab.training import accuracy

from .plain import plain_averaging
from .rehearsal import LyingRehearsal

#: Test images of which each device has an equal part, to try leases and contributions on. Accuracy is
#: measured on the others.
HELD_OUT: Final = 2_000
#: A device's speed, and how much longer than undisturbed a run may take.
SPEED: Final = 1e10
PATIENCE: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is trained, and by whom."""

    spec: RunSpec
    source: str
    root: Path | None
    limit: int
    devices: int
    liars: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The data, read once."""

    train: ArrayDataset
    #: The devices' own held-out examples, by device.
    held_out: tuple[ArrayDataset, ...]
    test: ArrayDataset


def read(setting: Setting) -> Data:
    """The data of a setting, divided."""
    whole = load(setting.source, setting.spec, setting.root, limit=setting.limit)
    mine = stratified_subset(whole.test.labels, min(HELD_OUT, len(whole.test) // 2), seed=setting.spec.seed)
    others = np.setdiff1d(np.arange(len(whole.test)), mine)
    held_out = whole.test.subset(mine)
    places = np.argsort(held_out.labels, kind="stable")
    parts = tuple(held_out.subset(places[index :: setting.devices]) for index in range(setting.devices))
    return Data(train=whole.train, held_out=parts, test=whole.test.subset(others))


def run(
    setting: Setting, data: Data, attack: str | None, *, defended: bool, absent: bool = False,
    on_lease: Callable[[float], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run once; JSON values.

    Args:
        attack: of the liars; None: there are none.
        absent: those that would lie are not there at all.
    """
    spec, everybody = setting.spec, range(setting.devices)
    present = [index for index in everybody if not (absent and index in setting.liars)]
    shares = [Share(index + 1, setting.devices) for index in present]
    liars = [place for place, index in enumerate(present) if attack and index in setting.liars]
    started = time.process_time()
    with (
        plain_averaging() if not defended else nullcontext(),
        mock.patch.object(workshop, "load", functools.partial(_load, setting, data, attack)),
    ):
        rehearsal = LyingRehearsal(
            spec,
            [RehearsedDevice(speed=SPEED, share=share) for share in shares],
            source=setting.source,
            root=setting.root,
            limit=setting.limit,
            seed=spec.seed,
            on_lease=on_lease,
            attack=attack,
            liars=liars,
            limit_s=_limit_s(setting),
        )
        rehearsed = rehearsal.run()
        tally = rehearsal.tally
        try:
            model = load_model(rehearsed.model).model
            found = accuracy(model, eval_batches(data.test, spec), "cpu", autocast_for("cpu", spec))
        except UsageError as error:
            # Nobody reads a model of values that are not numbers: it is worth as much as a guess.
            found = 1 / len(spec.classes)
            tally.reasons[f"no model: {error.what}"] += 1
    return {
        "accuracy": found,
        "attack": attack,
        "defended": defended,
        "absent": absent,
        "seed": spec.seed,
        "incomplete": rehearsal.incomplete,
        "simulated_s": rehearsed.seconds,
        "cpu_s": time.process_time() - started,
        "macs": sum(device.macs for device in rehearsed.devices),
        "honest": {
            "tried": tally.tried[False],
            "refused": tally.refused[False],
            "gross": tally.gross[False],
            "distrusted": rehearsal.distrusted(lying=False),
        },
        "lying": {
            "tried": tally.tried[True],
            "refused": tally.refused[True],
            "gross": tally.gross[True],
            "distrusted": rehearsal.distrusted(lying=True),
            "made": len(tally.lies),
            "kept": len(tally.lies_kept),
        },
        "reasons": dict(tally.reasons),
        "comparisons": tally.comparisons,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "torch": torch.__version__,
    }


def _load(
    setting: Setting, data: Data, attack: str | None, _source: str, _spec: RunSpec, _root: object,
    *, share: Share, **_rest: object,
) -> LoadedData:  # fmt: skip
    """A device's part of the data; one that flips labels trains on wrong ones."""
    index = share.index - 1
    order = np.argsort(data.train.labels, kind="stable")
    train = data.train.subset(order[index :: setting.devices])
    if attack == "label-flip" and index in setting.liars:
        flipped = len(setting.spec.classes) - 1 - train.labels
        train = ArrayDataset(images=train.images, labels=flipped)
    return LoadedData(train=train, test=data.held_out[index])


def _limit_s(setting: Setting) -> float:
    """Simulated seconds after which a run under attack is taken as it is."""
    spec = setting.spec
    macs = sum(spec.budget(shard) * cost.training_macs(spec, [shard]) for shard in spec.shards)
    return 120.0 + PATIENCE * macs / SPEED / max(1, setting.devices - len(setting.liars))
