"""What a simulated run consists of, as data: its spec, its devices, and the troubles that befall them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ..plans import CoordinatorSettings
from ..run import STEM, InputSpec, ModelSpec, RunSpec, Schedule, ShardId, TaskSpec

#: No two clocks may differ by more than calls tolerate, 300 s.
_SKEW_S: Final = 140.0


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
class Stop:
    """A device stands still, as under SIGSTOP or in a suspended machine, and then goes on."""

    start: float
    length_s: float
    #: Whether the trainer stands still as well.
    trainer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """One device, and what happens to it."""

    #: Cost units per second; a sample costs 3 on the stem, and 1 plus 1 per branch in a bundle.
    speed: float = 300.0
    class_counts: tuple[int, ...] = (100,) * 10
    tasks: frozenset[ShardId] | None = None
    prefer: frozenset[ShardId] = frozenset()
    joins_at: float = 0.0
    #: SIGKILL, or a power cut.
    killed_at: float | None = None
    #: The same in the middle of this write of what it has trained: the first is number 1.
    killed_in_write: int | None = None
    power_cut: bool = False
    #: Started again on what its disk holds, so long after it was killed.
    restarts_after_s: float | None = None
    #: Part of what its disk holds that is damaged when it starts again.
    decay: float = 0.0
    #: Its trainer hangs from here on, while the daemon goes on beating.
    hangs_at: float | None = None
    #: In order, and apart.
    stops: tuple[Stop, ...] = ()
    #: Its wall clock minus the true time; and by how much it is set, and when.
    clock_s: float = 0.0
    clock_sets: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """From `start` to `end`, what one side sends does not reach the other side, nor the other way round."""

    start: float
    end: float
    #: Indices of the devices of one side.
    side: frozenset[int]
    #: What the others send does reach this side.
    one_way: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A run, its devices and their troubles."""

    name: str
    devices: tuple[DevicePlan, ...]
    spec: RunSpec = field(default_factory=run_spec)
    settings: CoordinatorSettings = field(default_factory=CoordinatorSettings)
    latency_s: tuple[float, float] = (0.005, 0.05)
    loss: float = 0.0
    duplication: float = 0.0
    #: Part of the messages that come up to `straggle_s` too late.
    straggling: float = 0.0
    straggle_s: float = 30.0
    #: In the end, let every device assemble the model, and compare. That is work where training is real.
    compares_models: bool = True
    #: What a reading of the board shows may be this old.
    staleness_s: float = 0.3
    #: A device needs up to this long to find the others; 0: it knows them from the start.
    discovery_s: float = 0.0
    #: A durable write takes up to this long; 0: none of the events' time.
    write_s: float = 0.0
    cuts: tuple[Cut, ...] = ()
    #: No lease ends for this long after the last cut has healed, so that ledgers can become equal.
    quiet_s: float = 0.0
    limit_s: float = 3000.0


def sixteen(**changes: Any) -> tuple[DevicePlan, ...]:
    """Sixteen equal devices with everybody's classes."""
    return tuple(replace(DevicePlan(), **changes) for _ in range(16))


# --- random troubles ---


def random_scenario(seed: int) -> Scenario:
    """Two to sixteen devices of all kinds, and troubles of all kinds. One device has all, and stays."""
    rng = random.Random(seed)
    count = rng.choice([2, 3, 4, 5, 6, 8, 10, 12, 16])
    speeds = [rng.choice([100.0, 300.0])]
    speeds += [300.0 * rng.choice([0.1, 0.3, 1.0, 1.0, 1.0, 3.0]) for _ in range(count - 1)]
    # Work for less than a minute, so that slow groups do not take all the time of a sweep; at least three
    # leases of each shard. Troubles are for the time that it takes.
    lease_s = expected_s(run_spec(leases=1), speeds)
    lease_samples = 1000 if lease_s < 12.0 else 300
    leases = max(3, min(8, round(40.0 / (lease_s * lease_samples / 1000))))
    spec = run_spec(leases=leases, lease_samples=lease_samples)
    length_s = 10.0 + expected_s(spec, speeds)
    devices = [DevicePlan(speed=speeds[0], clock_s=_skew(rng), stops=_stops(rng, length_s))]
    devices += [_random_device(rng, speed, length_s) for speed in speeds[1:]]
    return Scenario(
        name="random",
        devices=tuple(devices),
        spec=spec,
        latency_s=(0.005, 0.3),
        loss=rng.choice([0.0, 0.1, 0.2]),
        duplication=0.1,
        straggling=rng.choice([0.0, 0.05]),
        staleness_s=rng.choice([0.1, 2.0]),
        discovery_s=2.0,
        write_s=0.2,
        cuts=tuple(_random_cut(rng, count, length_s) for _ in range(rng.choice([0, 0, 1, 1, 2]))),
        limit_s=6000.0,
    )


def expected_s(spec: RunSpec, speeds: list[float]) -> float:
    """How long a run takes without troubles, if all devices are busy all the time."""
    cost = sum((3.0 if shard == STEM else 1.5) * spec.budget(shard) for shard in spec.shards)
    return cost / sum(speeds)


def _random_device(rng: random.Random, speed: float, length_s: float) -> DevicePlan:
    holdings = [0, 50, 100] if rng.random() < 0.5 else [100]
    death = rng.random()
    comes_back = death < 0.5 and rng.random() < 0.6
    return DevicePlan(
        speed=speed,
        class_counts=tuple(rng.choice(holdings) for _ in range(10)),
        tasks=_some_tasks(rng, 3) if rng.random() < 0.2 else None,
        prefer=_some_tasks(rng, 2) if rng.random() < 0.2 else frozenset(),
        joins_at=rng.uniform(0.0, 0.4 * length_s) if rng.random() < 0.3 else 0.0,
        killed_at=rng.uniform(0.1, 0.9) * length_s if death < 0.25 else None,
        killed_in_write=rng.randint(1, 8) if 0.25 <= death < 0.5 else None,
        power_cut=rng.random() < 0.5,
        restarts_after_s=rng.uniform(0.5, 30.0) if comes_back else None,
        decay=rng.choice([0.0, 0.0, 0.2]),
        hangs_at=rng.uniform(0.1, 0.6) * length_s if rng.random() < 0.05 else None,
        stops=_stops(rng, length_s),
        clock_s=_skew(rng),
        clock_sets=((rng.uniform(0.1, 0.9) * length_s, _skew(rng)),) if rng.random() < 0.1 else (),
    )


def _random_cut(rng: random.Random, count: int, length_s: float) -> Cut:
    start = rng.uniform(0.05, 0.8) * length_s
    return Cut(
        start=start,
        end=start + rng.uniform(3.0, 40.0),
        side=frozenset(rng.sample(range(count), rng.randint(1, max(1, count // 2)))),
        one_way=rng.random() < 0.3,
    )


def _stops(rng: random.Random, length_s: float) -> tuple[Stop, ...]:
    if rng.random() < 0.75:
        return ()
    # Half of them shorter than a lease's term, the others so long that the leases are lost.
    lengths = [rng.uniform(0.5, 4.0) if rng.random() < 0.5 else rng.uniform(4.0, 25.0) for _ in range(3)]
    return _apart(rng, lengths, length_s)


def _apart(rng: random.Random, lengths: list[float], length_s: float) -> tuple[Stop, ...]:
    """Stops of these lengths at random times of which no two touch."""
    stops: list[Stop] = []
    for start, length in zip(sorted(rng.uniform(2.0, length_s) for _ in lengths), lengths, strict=True):
        if not stops or start > stops[-1].start + stops[-1].length_s + 0.5:
            stops.append(Stop(start=start, length_s=length, trainer=rng.random() < 0.5))
    return tuple(stops)


def _skew(rng: random.Random) -> float:
    return rng.uniform(-_SKEW_S, _SKEW_S)


def _some_tasks(rng: random.Random, count: int) -> frozenset[ShardId]:
    return frozenset(ShardId(f"t{index}") for index in rng.sample(range(10), count))
