"""Who trains what, and when; see scripts/bench-schedule."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from p2pcollab import cost
from p2pcollab.coordinator import JobPlan
from p2pcollab.data import Source, SourceInfo
from p2pcollab.data.batches import Thinning
from p2pcollab.errors import P2PCollabError
from p2pcollab.files import write_atomic
from p2pcollab.ledger import Contribution
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.simulation import Device, DevicePlan, PretendedTraining, Scenario, Simulation


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="alexnet", help="network family")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=50_000, help="training images, 3x32x32")
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument(
        "--speeds",
        default="8,1,1,1,1,1,1,1,1,1,1",
        help="speed of each device, in units of --mac-s",
    )
    parser.add_argument("--mac-s", type=float, default=1e10, help="training MAC/s of a device of speed 1")
    parser.add_argument(
        "--negatives", type=float, help="as in the run spec's schedule; default: the family's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, help="put the figures into this file, beside those of other runs"
    )
    return parser.parse_args()


class Priced(PretendedTraining):
    """Pretended training that takes as long as the network's MACs, and remembers the leases."""

    def __init__(self, spec: RunSpec, seed: int, devices: int) -> None:
        self._spec = spec
        self._classes = np.arange(len(spec.classes))
        super().__init__(spec, random.Random(seed), devices, self._macs)
        #: MACs by device, and for each lease on a branch, where it began.
        self.macs: Counter[int] = Counter()
        self.begun: list[tuple[ShardId, int]] = []

    def _macs(self, shards: Sequence[ShardId]) -> float:
        trained = Thinning.of(self._spec, shards).probabilities(self._classes).mean()
        return float(trained * cost.training_macs(self._spec, shards))

    def train(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        """See `simulation.Training`."""
        shards = [job.shard for job in plan.shards]
        self.macs[device.index] += round(plan.samples * self._macs(shards))
        self.begun += [(job.shard, job.samples) for job in plan.shards if job.shard != STEM]
        return super().train(device, plan)


def measure(options: argparse.Namespace, speeds: Sequence[float]) -> dict[str, Any]:
    """Simulate the run; the figures."""
    per_class = options.images // options.classes
    info = SourceInfo(
        source=Source("folder", "images"),
        classes=tuple(f"class {index}" for index in range(options.classes)),
        class_counts=(per_class,) * options.classes,
        channels=3, height=32, width=32,
        mean=(0.5,) * 3, std=(0.25,) * 3,
        augment="crop-flip",
    )  # fmt: skip
    spec = plan_run("schedule", info, PlanOptions(family=options.model, epochs=options.epochs))
    if options.negatives is not None:
        schedule = spec.schedule.model_copy(update={"negatives": options.negatives})
        spec = RunSpec.decode(spec.model_copy(update={"schedule": schedule}).encode())
    plans = tuple(DevicePlan(speed=options.mac_s * speed, class_counts=info.class_counts) for speed in speeds)
    training = Priced(spec, options.seed, len(plans))
    simulation = Simulation(
        Scenario(name="schedule", spec=spec, devices=plans, limit_s=float("inf"), compares_models=False),
        options.seed,
        training,
    )
    outcome = simulation.run()
    stem = simulation.devices[0].coordinator.ledger.seen(STEM)
    dense = cost.training_macs_dense(spec) * spec.schedule.budget_samples
    return {
        "model": options.model,
        "speeds": list(speeds),
        "mac_s": options.mac_s,
        "images": options.images,
        "epochs": options.epochs,
        "negatives": spec.schedule.negatives,
        "seed": options.seed,
        "seconds": outcome.finished_at,
        "stem_samples": [stem.get(device.id, 0) for device in simulation.devices],
        "branch_leases": len(training.begun),
        # Begun where another one had begun: the mean of the two is worth about one of them.
        "branch_leases_doubled": len(training.begun) - len(set(training.begun)),
        "savings_without_trials": [dense / training.macs[index] for index in range(len(plans))],
    }


def main() -> int:
    options = parse()
    made = measure(options, [float(text) for text in options.speeds.split(",")])
    stem, total = made["stem_samples"], sum(made["stem_samples"])
    print(f"complete after {made['seconds']:.0f} simulated seconds")
    print("the stem's samples by device: " + ", ".join(f"{100 * one / total:.0f} %" for one in stem))
    print(f"leases on branches begun twice: {made['branch_leases_doubled']} of {made['branch_leases']}")
    print("savings without trials: " + ", ".join(f"{one:.1f}x" for one in made["savings_without_trials"]))
    if options.json:
        keys = ("model", "speeds", "mac_s", "images", "epochs", "negatives", "seed")
        runs = json.loads(options.json.read_text())["runs"] if options.json.exists() else []
        runs = [run for run in runs if any(run[key] != made[key] for key in keys)] + [made]
        write_atomic(options.json, (json.dumps({"runs": runs}, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except P2PCollabError as error:
        sys.exit(f"error: {error}")
