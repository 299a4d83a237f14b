"""Who trains what, and when; see scripts/bench-schedule."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2pcollab import cost, limits
from p2pcollab.coordinator import JobPlan
from p2pcollab.daemon.judge import Judge, State
from p2pcollab.data import ArrayDataset, Source, SourceInfo
from p2pcollab.errors import P2PCollabError
from p2pcollab.files import write_atomic
from p2pcollab.lease import Batches
from p2pcollab.ledger import Contribution, states_digest
from p2pcollab.models import initial_shard
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.plans import Trial
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.shards import ShardTensors, restore_stem
from p2pcollab.simulation import Device, DevicePlan, PretendedTraining, Scenario, Simulation


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="alexnet", help="network family")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--test-images", type=int, default=10_000, help="on which others' work is tried")
    parser.add_argument(
        "--input", type=_shape, default=(3, 32, 32), help="channels, height and width of an image: 3x32x32"
    )
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
    parser.add_argument(
        "--positives", type=int, help="the same: how often a branch trains on its own examples in a pass"
    )
    parser.add_argument(
        "--features",
        type=int,
        default=limits.TRIED_FEATURES_BYTES_MAX // limits.MIB,
        help="MiB for what a device remembers of stems' features that it tries others' work on",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, help="put the figures into this file, beside those of other runs"
    )
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int, int]:
    channels, height, width = map(int, text.split("x"))
    return channels, height, width


class PricedJudge(Judge):
    """Counts what trying costs: as the real one, but all tensors are alike."""

    def _state(
        self, shard: ShardId, frontier: Sequence[Contribution], decode: Callable[[Contribution], ShardTensors]
    ) -> State:
        del shard, decode
        return State(states_digest(frontier), {})

    def _losses_of(
        self, shard: ShardId, state: State, features_N: Tensor, labels: npt.NDArray[np.int64]
    ) -> Tensor:
        del shard, state, features_N
        return torch.ones(len(labels), dtype=torch.float64)


class Weightless:
    """Features that have a size, and take no memory."""

    def __init__(self, spec: RunSpec) -> None:
        one = torch.zeros(1, spec.input.channels, spec.input.height, spec.input.width)
        self._shape = restore_stem(spec, initial_shard(spec, STEM)).frozen()(one).shape[1:]

    def __call__(
        self, spec: RunSpec, stem_tensors: Mapping[str, Tensor], batches: Batches, *, device: torch.device
    ) -> Tensor:
        del spec, stem_tensors, device
        count = sum(len(labels) for _, labels in batches)
        return torch.empty(count, *self._shape, dtype=torch.bfloat16, device="meta")


class Priced(PretendedTraining):
    """Pretended training that takes as long as the network's MACs, and remembers the leases."""

    def __init__(self, spec: RunSpec, options: argparse.Namespace, devices: int) -> None:
        self._spec = spec
        self._classes = np.arange(len(spec.classes))
        super().__init__(spec, random.Random(options.seed), devices, self._macs)
        labels = np.resize(self._classes, options.test_images)
        images = np.broadcast_to(np.uint8(0), (len(labels), *options.input))
        test, features = ArrayDataset(images=images, labels=labels), Weightless(spec)
        self._judges = [
            PricedJudge(
                spec, test, torch.device("cpu"), index, options.features * limits.MIB, make_features=features
            )
            for index in range(devices)
        ]
        #: MACs by device, and for each lease on a branch, where it began.
        self.macs: Counter[int] = Counter()
        self.tried_macs: Counter[int] = Counter()
        self.begun: list[tuple[ShardId, int]] = []

    def _macs(self, shards: Sequence[ShardId]) -> float:
        return cost.offered_macs(self._spec, shards, self._classes)

    def train(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        """See `simulation.Training`."""
        shards = [job.shard for job in plan.shards]
        self.macs[device.index] += round(plan.samples * self._macs(shards))
        self.begun += [(job.shard, job.samples) for job in plan.shards if job.shard != STEM]
        return super().train(device, plan)

    def check(self, device: Device, trial: Trial) -> None:
        """See `simulation.Training`: it costs, and nothing is wrong."""
        judge = self._judges[device.index]
        before = judge.macs
        judge.compare(trial, {}, _never_decoded)
        self.tried_macs[device.index] += judge.macs - before

    def discard(self, device: Device, plan: JobPlan, fraction: float) -> None:
        """See `simulation.Training`."""
        shards = [job.shard for job in plan.shards]
        self.macs[device.index] += round(fraction * plan.samples * self._macs(shards))


def _never_decoded(contribution: Contribution) -> ShardTensors:
    raise AssertionError(contribution.tensors_digest)


def measure(options: argparse.Namespace, speeds: Sequence[float]) -> dict[str, Any]:
    """Simulate the run; the figures."""
    per_class = options.images // options.classes
    channels, height, width = options.input
    info = SourceInfo(
        source=Source("folder", "images"),
        classes=tuple(f"class {index}" for index in range(options.classes)),
        class_counts=(per_class,) * options.classes,
        channels=channels, height=height, width=width,
        mean=(0.5,) * channels, std=(0.25,) * channels,
        augment="crop-flip",
    )  # fmt: skip
    spec = plan_run("schedule", info, PlanOptions(family=options.model, epochs=options.epochs))
    wished: dict[str, float | None] = {}
    if options.negatives is not None:
        wished["negatives"] = options.negatives
    if options.positives is not None:
        wished["positives"] = options.positives if options.positives > 1 else None
    spec = spec.model_copy(update={"schedule": spec.schedule.model_copy(update=wished)})
    spec = RunSpec.decode(spec.encode())  # validated as a whole
    plans = tuple(DevicePlan(speed=options.mac_s * speed, class_counts=info.class_counts) for speed in speeds)
    training = Priced(spec, options, len(plans))
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
        "classes": options.classes,
        "test_images": options.test_images,
        "input": list(options.input),
        "features_mib": options.features,
        "epochs": options.epochs,
        "negatives": spec.schedule.negatives,
        "positives": spec.schedule.positives,
        "seed": options.seed,
        "seconds": outcome.finished_at,
        "stem_samples": [stem.get(device.id, 0) for device in simulation.devices],
        "branch_leases": len(training.begun),
        # Begun where another one had begun: the mean of the two is worth about one of them.
        "branch_leases_doubled": len(training.begun) - len(set(training.begun)),
        "savings": [
            dense / (training.macs[index] + training.tried_macs[index]) for index in range(len(plans))
        ],
        "savings_without_trials": [dense / training.macs[index] for index in range(len(plans))],
        "trying_share": training.tried_macs.total() / (training.tried_macs + training.macs).total(),
    }


def main() -> int:
    options = parse()
    made = measure(options, [float(text) for text in options.speeds.split(",")])
    stem, total = made["stem_samples"], sum(made["stem_samples"])
    print(f"complete after {made['seconds']:.0f} simulated seconds")
    print("the stem's samples by device: " + ", ".join(f"{100 * one / total:.0f} %" for one in stem))
    print(f"leases on branches begun twice: {made['branch_leases_doubled']} of {made['branch_leases']}")
    print(f"trying others' work takes {100 * made['trying_share']:.0f} % of all computation")
    print("savings: " + ", ".join(f"{one:.1f}x" for one in made["savings"]))
    print("savings without trials: " + ", ".join(f"{one:.1f}x" for one in made["savings_without_trials"]))
    if options.json:
        keys = (
            "model", "speeds", "mac_s", "images", "classes", "test_images", "input", "features_mib",
            "epochs", "negatives", "positives", "seed",
        )  # fmt: skip
        runs = json.loads(options.json.read_text())["runs"] if options.json.exists() else []
        runs = [run for run in runs if any(run.get(key) != made[key] for key in keys)] + [made]
        write_atomic(options.json, (json.dumps({"runs": runs}, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except P2PCollabError as error:
        sys.exit(f"error: {error}")
