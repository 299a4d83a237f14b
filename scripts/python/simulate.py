"""Whole simulated runs under random or named troubles, held to every invariant; see docs/simulation.md."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "sim"))

import pytest
from planted import PLANTS
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2pcollab.simulation import INVARIANTS, SCENARIOS, Broken, Simulation

#: The file is written anew after so many runs, so that what is done is kept when a long sweep is interrupted.
_KEEP_EVERY = 100


@dataclass(frozen=True, slots=True)
class Report:
    """What one seed did."""

    seed: int
    #: The broken invariant, or the program's own error; None: all held.
    broken: str | None
    cpu_s: float
    simulated_s: float = 0.0
    device_s: float = 0.0
    messages: int = 0
    leases: int = 0
    kills: int = 0
    stops: int = 0
    false_alarms: int = 0
    false_takeovers: int = 0
    takeovers: tuple[dict[str, Any], ...] = ()
    healings: tuple[dict[str, Any], ...] = field(default=())
    digest: str = ""


def run(scenario_name: str, seed: int) -> Report:
    """One run. The seed replays it to the last event."""
    started = time.process_time()
    scenario = SCENARIOS[scenario_name](seed)
    try:
        outcome = Simulation(scenario, seed).run()
    except Broken as error:
        return Report(seed, str(error), time.process_time() - started)
    except Exception as error:  # whatever it is, the seed that shows it must be told
        return Report(seed, f"{type(error).__name__}: {error}", time.process_time() - started)
    return Report(
        seed,
        None,
        time.process_time() - started,
        outcome.finished_at,
        outcome.alive_s,
        sum(outcome.messages.values()),
        outcome.leases,
        outcome.kills,
        outcome.stops,
        outcome.false_alarms,
        outcome.false_takeovers,
        tuple(asdict(takeover) for takeover in outcome.takeovers),
        tuple(asdict(healing) for healing in outcome.healings),
        outcome.digest,
    )


def reports(scenario: str, seeds: range, jobs: int) -> Iterator[Report]:
    """All of them, in the order in which they are done."""
    # Short-lived objects without cycles: looking for cycles costs a tenth of the time.
    collect_seldom = partial(gc.set_threshold, 200_000)
    with multiprocessing.get_context("spawn").Pool(jobs, collect_seldom) as pool:
        yield from pool.imap_unordered(partial(run, scenario), seeds, chunksize=4)


def spread(values: list[float]) -> dict[str, float] | None:
    """Count, median, 99th percentile and maximum."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {
        "count": len(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def summary(done: list[Report], wall_s: float) -> dict[str, Any]:
    """Figures over all seeds."""
    good = [report for report in done if report.broken is None]
    takeovers = [takeover for report in good for takeover in report.takeovers]
    healings = [healing for report in good for healing in report.healings]
    killed = [takeover for takeover in takeovers if takeover["cause"] == "kill"]
    cpu_s = sum(report.cpu_s for report in done)
    simulated_s = sum(report.simulated_s for report in good)
    return {
        "seeds": len(done),
        "first": min(report.seed for report in done),
        "broken": {report.seed: report.broken for report in done if report.broken is not None},
        "simulated_s": simulated_s,
        "device_s": sum(report.device_s for report in good),
        "messages": sum(report.messages for report in good),
        "leases": sum(report.leases for report in good),
        "kills": sum(report.kills for report in good),
        "stops": sum(report.stops for report in good),
        "false_alarms": sum(report.false_alarms for report in good),
        "false_takeovers": sum(report.false_takeovers for report in good),
        "kill_noticed_s": spread([one["noticed_s"] for one in killed if one["noticed_s"] is not None]),
        "kill_to_new_lease_s": spread([one["lease_s"] for one in killed]),
        "hang_to_new_lease_s": spread([one["lease_s"] for one in takeovers if one["cause"] == "hang"]),
        "rounds_until_all_heard": spread([one["heard_rounds"] for one in healings if one["heard_rounds"]]),
        "rounds_until_digests_equal": spread(
            [one["equal_rounds"] for one in healings if one["equal_rounds"]]
        ),
        "healings": len(healings),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "times_real_time": simulated_s / cpu_s if cpu_s else None,
    }


def keep(file: Path | None, name: str, figures: dict[str, Any]) -> None:
    """Write one scenario's figures into the file, beside those of the others."""
    if file is None:
        return
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[name] = figures
    file.write_text(json.dumps(kept, indent=1) + "\n")


def sweep(options: argparse.Namespace) -> int:
    """Many seeds of one scenario."""
    seeds = range(options.first, options.first + options.seeds)
    done: list[Report] = []
    started = time.monotonic()
    with Progress(
        TextColumn(f"{options.scenario} runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task("", total=len(seeds))
        for report in reports(options.scenario, seeds, options.jobs):
            done.append(report)
            progress.advance(task)
            if report.broken is not None:
                progress.console.print(f"seed {report.seed}: {report.broken}", markup=False)
            if len(done) % _KEEP_EVERY == 0:
                keep(options.json, options.scenario, summary(done, time.monotonic() - started))
    figures = summary(done, time.monotonic() - started)
    keep(options.json, options.scenario, figures)
    print(
        f"{figures['seeds']} runs, {figures['device_s'] / 3600:.0f} device-hours simulated, "
        f"{len(figures['broken'])} broken"
    )
    for what in ("kill_noticed_s", "kill_to_new_lease_s", "hang_to_new_lease_s"):
        if figures[what]:
            print("{0}: {count} of them, median {median:.1f}, p99 {p99:.1f}".format(what, **figures[what]))
    for what in ("rounds_until_all_heard", "rounds_until_digests_equal"):
        if figures[what]:
            print("{0}: median {median:.0f}, at most {max}".format(what, **figures[what]))
    print(
        f"{figures['stops']} standstills: {figures['false_alarms']} false alarms, "
        f"{figures['false_takeovers']} false takeovers"
    )
    return 1 if figures["broken"] else 0


def hunt(options: argparse.Namespace) -> int:
    """Seeds of one scenario with a bug planted, until it is found."""
    plant = PLANTS[options.plant]
    name = f"planted {options.plant}"
    figures = {"planted": plant.what, "scenario": options.scenario, "first": options.first}
    print(f"planted: {plant.what}", flush=True)
    with pytest.MonkeyPatch.context() as patch:
        plant.apply(patch)
        for seed in range(options.first, options.first + options.seeds):
            report = run(options.scenario, seed)
            if report.broken is not None:
                needed = seed - options.first + 1
                print(f"found after {needed} seeds: {report.broken}")
                expected = report.broken.startswith(f"{plant.breaks}:")
                figures |= {"seeds_needed": needed, "found_by": report.broken, "as_expected": expected}
                keep(options.json, name, figures)
                return 0
    print(f"not found in {options.seeds} seeds")
    keep(options.json, name, {**figures, "not_found_in_seeds": options.seeds})
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="invariants:\n" + "\n".join(f"  {name}: {what}" for name, what in INVARIANTS.items()),
    )
    parser.add_argument("--scenario", choices=SCENARIOS, default="random", help="kind of troubles")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one; with --seeds 1 it is replayed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--plant", choices=PLANTS, help="plant a bug, and look for it seed after seed")
    parser.add_argument("--trace", action="store_true", help="print every event of the first seed")
    parser.add_argument(
        "--json", type=Path, help="write the figures into this file, under the scenario's name"
    )
    options = parser.parse_args()
    if options.trace:
        scenario = SCENARIOS[options.scenario](options.first)
        try:
            outcome = Simulation(scenario, options.first, trace=lambda line: print(line, end="")).run()
        except Broken as error:
            print(error)
            return 1
        print(f"complete, digest of all events {outcome.digest}")
        return 0
    return hunt(options) if options.plant else sweep(options)


if __name__ == "__main__":
    sys.exit(main())
