"""Honest devices, and whom they accuse; see scripts/bench-honest."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from p2pcollab.daemon import workshop
from p2pcollab.daemon.rehearsal import Rehearsal, RehearsedDevice
from p2pcollab.data import inspect, load
from p2pcollab.data.arrays import LoadedData
from p2pcollab.data.partition import Share
from p2pcollab.errors import P2PCollabError
from p2pcollab.files import write_atomic
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.plans import Trial
from p2pcollab.run import RunSpec
from p2pcollab.simulation import Device
from p2pcollab.trust import Verdict, outvoted

SPEED = 1e10


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="digits", help="where the data come from, as `p2pcollab new --data`"
    )
    parser.add_argument("--data-root", type=Path, help="where torchvision's sets are kept")
    parser.add_argument("--limit", type=int, help="training images of all devices together")
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--devices", type=int, default=5)
    parser.add_argument(
        "--fast", type=float, default=1.0, help="how many times as fast as the others the first device is"
    )
    parser.add_argument("--classes", type=int, default=0, help="that each device has examples of; 0: all")
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7,8,9,10,11", help="separated by commas")
    parser.add_argument("--json", type=Path, help="write all rows into this file")
    return parser.parse_args()


class Watched(Rehearsal):
    """A rehearsal that counts what is tried and refused."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.tried = Counter[bool]()
        super().__init__(*arguments, **named)

    def check(self, device: Device, trial: Trial) -> Verdict | None:
        verdict = super().check(device, trial)
        self.tried[verdict is not None] += 1
        return verdict

    def accused(self) -> int:
        """Pairs of a device and one that it accuses in the end."""
        return sum(len(device.coordinator.accused) for device in self._simulation.devices)

    def outvoted(self) -> int:
        """Devices that do not count any more in the end."""
        return len(outvoted(self._simulation.devices[0].coordinator.ledger))


def _load(options: argparse.Namespace, source: str, spec: RunSpec, root: Path | None,
          *, share: Share, limit: int | None, **_rest: object) -> LoadedData:  # fmt: skip
    """A device's part of the data: of each of its classes, what falls to it among those that have it."""
    whole = load(source, spec, root, limit=limit)
    classes, index = len(spec.classes), share.index - 1
    many = options.classes or classes
    chosen: list[int] = []
    for label in range(classes):
        having = [one for one in range(options.devices) if (label - 2 * one) % classes < many]
        if index in having:
            members = np.flatnonzero(whole.train.labels == label)
            chosen += members[having.index(index) :: len(having)].tolist()
    return LoadedData(train=whole.train.subset(np.array(sorted(chosen))), test=whole.test)


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run; JSON values."""
    info = inspect(options.data, options.data_root)
    expected = min(options.limit or info.train_images, info.train_images)
    plan = PlanOptions(family="digits", epochs=options.epochs, expected_samples=expected, seed=seed)
    spec = plan_run("honest", info, plan)
    with mock.patch.object(workshop, "load", functools.partial(_load, options)):
        rehearsal = Watched(
            spec,
            [
                RehearsedDevice(speed=SPEED * speed, share=Share(index + 1, options.devices))
                for index, speed in enumerate([options.fast] + [1.0] * (options.devices - 1))
            ],
            source=options.data,
            root=options.data_root,
            limit=options.limit,
            seed=seed,
        )
        rehearsal.run()
    return {
        "seed": seed,
        "devices": options.devices,
        "classes": options.classes,
        "fast": options.fast,
        "tried": rehearsal.tried.total(),
        "refused": rehearsal.tried[True],
        "accused": rehearsal.accused(),
        "outvoted": rehearsal.outvoted(),
    }


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    rows = []
    for seed in map(int, options.seeds.split(",")):
        rows.append(run(options, seed))
        print(json.dumps(rows[-1]), flush=True)
    sums = {name: sum(row[name] for row in rows) for name in ("tried", "refused", "accused", "outvoted")}
    print(
        f"{len(rows)} runs: {sums['refused']} of {sums['tried']} trials refused, "
        f"{sums['accused']} accused by somebody, {sums['outvoted']} outvoted"
    )
    if options.json:
        write_atomic(options.json, (json.dumps(rows, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except P2PCollabError as error:
        sys.exit(f"error: {error}")
