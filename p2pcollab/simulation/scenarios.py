"""What a simulated run consists of: its spec, its devices, and the troubles that befall them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from ..run import InputSpec, ModelSpec, RunSpec, Schedule, ShardId, TaskSpec


def run_spec(classes: int = 10, *, leases: int = 24, lease_samples: int = 1000, seal: float = 0.7) -> RunSpec:
    """One class per task; each shard needs `leases` leases."""
    return RunSpec(
        name="simulated",
        classes=tuple(f"class {index}" for index in range(classes)),
        tasks=tuple(TaskSpec(id=f"t{index}", classes=(index,)) for index in range(classes)),
        model=ModelSpec(family="digits", stem_stages=1, branch_width=0.25),
        input=InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), augment="none"),
        schedule=Schedule(
            budget_samples=leases * lease_samples,
            lease_samples=lease_samples,
            batch_size=100,
            peak_lr=0.1,
            stem_seal_fraction=seal,
        ),
        seed=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """One device, and what happens to it."""

    #: Cost units per second; a sample costs 3 on the stem, and 1 plus 1 per branch in a bundle.
    speed: float = 300.0
    class_counts: tuple[int, ...] = (100,) * 10
    tasks: frozenset[ShardId] | None = None
    prefer: frozenset[ShardId] = frozenset()
    joins_at: float = 0.0
    #: SIGKILL.
    killed_at: float | None = None
    #: Started again on what its disk holds.
    restarts_at: float | None = None
    #: Its trainer hangs from here on, while the daemon goes on beating.
    hangs_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """From `start` to `end`, devices reach only those of their own side."""

    start: float
    end: float
    #: Indices of the devices of one side.
    side: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A run, its devices and their troubles."""

    name: str
    devices: tuple[DevicePlan, ...]
    spec: RunSpec = field(default_factory=run_spec)
    latency_s: tuple[float, float] = (0.005, 0.05)
    loss: float = 0.0
    duplication: float = 0.0
    #: A reading of the board may be this old.
    staleness_s: float = 0.3
    partition: Partition | None = None
    limit_s: float = 3000.0


def sixteen(**changes: Any) -> tuple[DevicePlan, ...]:
    """Sixteen equal devices with everybody's classes."""
    return tuple(replace(DevicePlan(), **changes) for _ in range(16))


def random_scenario(seed: int) -> Scenario:
    """Two to sixteen devices of all kinds, and troubles of all kinds. One device has all, and stays."""
    rng = random.Random(seed)
    count = rng.randint(2, 16)
    devices = [DevicePlan(speed=rng.choice([100.0, 300.0]))]
    for _ in range(count - 1):
        killed_at = rng.uniform(65.0, 210.0) if rng.random() < 0.4 else None
        comes_back = killed_at is not None and rng.random() < 0.5
        holdings = [0, 50, 100] if rng.random() < 0.5 else [100]
        devices.append(
            DevicePlan(
                speed=300.0 * rng.choice([0.1, 0.3, 1.0, 1.0, 1.0, 3.0]),
                class_counts=tuple(rng.choice(holdings) for _ in range(10)),
                tasks=_some_tasks(rng, 3) if rng.random() < 0.2 else None,
                prefer=_some_tasks(rng, 2) if rng.random() < 0.2 else frozenset(),
                joins_at=rng.uniform(0.0, 60.0) if rng.random() < 0.3 else 0.0,
                killed_at=killed_at,
                restarts_at=killed_at + rng.uniform(1.0, 60.0) if killed_at and comes_back else None,
                hangs_at=rng.uniform(20.0, 100.0) if rng.random() < 0.05 else None,
            )
        )
    start = rng.uniform(10.0, 100.0)
    side = frozenset(rng.sample(range(count), count // 2))
    return Scenario(
        name="random",
        devices=tuple(devices),
        spec=run_spec(leases=rng.choice([8, 12])),
        latency_s=(0.005, 0.3),
        loss=rng.choice([0.0, 0.1, 0.2]),
        duplication=0.1,
        staleness_s=rng.choice([0.1, 2.0]),
        partition=Partition(start=start, end=start + rng.uniform(10.0, 80.0), side=side)
        if rng.random() < 0.5
        else None,
        limit_s=6000.0,
    )


def _some_tasks(rng: random.Random, count: int) -> frozenset[ShardId]:
    return frozenset(ShardId(f"t{index}") for index in rng.sample(range(10), count))
