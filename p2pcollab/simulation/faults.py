"""Named scenarios: one kind of fault each, on sixteen devices. The seed decides who and when."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from ..plans import CoordinatorSettings
from .scenarios import Cut, DevicePlan, Scenario, Stop, random_scenario, run_spec, sixteen

_TERM_S: Final = CoordinatorSettings().lease_term_s
#: A cut of a minute, and then a minute in which nothing new comes, until the ledgers are equal.
_CUT_S: Final = (15.0, 75.0)
_QUIET_S: Final = 60.0


def takeover(seed: int) -> Scenario:
    """Leases of a few seconds; four of sixteen devices are killed one after the other, and come back."""
    rng = random.Random(seed)
    calm = _short_leases("takeover")
    devices = [
        replace(device, killed_at=rng.uniform(10.0, 20.0) + 15.0 * index, restarts_after_s=14.0)
        for index, device in enumerate(calm.devices[:4])
    ]
    return replace(calm, devices=(*devices, *calm.devices[4:]))


def standstill(seed: int) -> Scenario:
    """Leases of a few seconds; four of sixteen devices stand still again and again, and nobody dies.

    Each standstill is shorter than a lease's term, half of them only just.
    """
    rng = random.Random(seed)
    calm = _short_leases("standstill")
    devices = [replace(device, stops=_short_stops(rng)) for device in calm.devices[:4]]
    return replace(calm, devices=(*devices, *calm.devices[4:]))


def _short_leases(name: str) -> Scenario:
    """As many shards as devices, so that each has one holder and a freed device looks for just that."""
    return Scenario(
        name=name,
        devices=(DevicePlan(speed=60.0, class_counts=(100,) * 15),) * 16,
        spec=run_spec(15, leases=12, lease_samples=100, seal=0.9),
        write_s=0.05,
    )


def _short_stops(rng: random.Random) -> tuple[Stop, ...]:
    stops: list[Stop] = []
    at = rng.uniform(3.0, 8.0)
    while at < 120.0:
        length_s = _TERM_S * (0.999 if rng.random() < 0.5 else rng.uniform(0.1, 0.999))
        stops.append(Stop(start=at, length_s=length_s, trainer=rng.random() < 0.5))
        at += length_s + rng.uniform(0.5, 4.0)
    return tuple(stops)


def _parted(name: str, side: range, *, one_way: bool = False) -> Callable[[int], Scenario]:
    def scenario(seed: int) -> Scenario:
        del seed  # it decides the events, not what befalls whom
        start, end = _CUT_S
        return Scenario(
            name=name,
            spec=run_spec(leases=12),
            devices=sixteen(speed=100.0),
            write_s=0.05,
            cuts=(Cut(start=start, end=end, side=frozenset(side), one_way=one_way),),
            quiet_s=_QUIET_S,
        )

    return scenario


def torn_writes(seed: int) -> Scenario:
    """Fifteen of sixteen devices lose their power in the middle of a write; of some, sectors are damaged."""
    rng = random.Random(seed)
    devices = [DevicePlan()]
    for _ in range(15):
        devices.append(
            DevicePlan(
                killed_in_write=rng.randint(1, 12),
                power_cut=True,
                restarts_after_s=rng.uniform(1.0, 20.0),
                decay=rng.choice([0.0, 0.3]),
            )
        )
    return Scenario(name="torn-writes", devices=tuple(devices), spec=run_spec(leases=12), write_s=0.5)


def reordered(seed: int) -> Scenario:
    """A fifth of the messages comes up to a minute too late, half of them twice, a fifth never."""
    del seed
    return Scenario(
        name="reordered",
        devices=sixteen(),
        spec=run_spec(leases=12),
        latency_s=(0.005, 1.0),
        loss=0.2,
        duplication=0.5,
        straggling=0.2,
        straggle_s=60.0,
        staleness_s=2.0,
    )


def clocks(seed: int) -> Scenario:
    """No clock is right; half of them are set in the middle, and so are those of devices that start again."""
    rng = random.Random(seed)

    def skew() -> float:
        return rng.uniform(-140.0, 140.0)

    devices = [
        DevicePlan(
            clock_s=skew(),
            clock_sets=((30.0, skew()),) if index % 2 else (),
            killed_at=28.0 if index % 4 == 3 else None,
            restarts_after_s=10.0,
        )
        for index in range(16)
    ]
    return Scenario(name="clocks", devices=tuple(devices), spec=run_spec(leases=16))


SCENARIOS: Final[Mapping[str, Callable[[int], Scenario]]] = {
    "random": random_scenario,
    "takeover": takeover,
    "standstill": standstill,
    "parted-8-8": _parted("parted-8-8", range(8)),
    "parted-1-15": _parted("parted-1-15", range(1)),
    "one-way-8-8": _parted("one-way-8-8", range(8), one_way=True),
    "one-way-1-15": _parted("one-way-1-15", range(1), one_way=True),
    "one-way-15-1": _parted("one-way-15-1", range(15), one_way=True),
    "torn-writes": torn_writes,
    "reordered": reordered,
    "clocks": clocks,
}
