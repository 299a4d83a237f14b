"""Whole simulated runs under random troubles; see scripts/simulate."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2pcollab.simulation import Broken, Simulation, random_scenario


@dataclass(frozen=True, slots=True)
class Report:
    """What one seed did."""

    seed: int
    #: The broken promise, or the program's own error; None: all held.
    broken: str | None
    simulated_s: float = 0.0
    devices: int = 0
    messages: int = 0
    takeover_s: tuple[float, ...] = ()


def run(seed: int) -> Report:
    """One run. The seed replays it to the last event."""
    scenario = random_scenario(seed)
    try:
        outcome = Simulation(scenario, seed).run()
    except Broken as error:
        return Report(seed, str(error))
    except Exception as error:  # whatever it is, the seed that shows it must be told
        return Report(seed, f"{type(error).__name__}: {error}")
    return Report(
        seed,
        None,
        outcome.finished_at,
        len(scenario.devices),
        sum(outcome.messages.values()),
        tuple(outcome.takeover_s),
    )


def reports(seeds: range, jobs: int) -> Iterator[Report]:
    """All of them, in the order in which they are done."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(run, seeds, chunksize=4)


def summary(done: list[Report], wall_s: float) -> dict[str, Any]:
    """Figures over all seeds."""
    good = [report for report in done if report.broken is None]
    takeovers = sorted(seconds for report in good for seconds in report.takeover_s)
    simulated = sum(report.simulated_s for report in good)
    return {
        "seeds": len(done),
        "broken": {report.seed: report.broken for report in done if report.broken is not None},
        "simulated_s": simulated,
        "device_seconds": sum(report.simulated_s * report.devices for report in good),
        "messages": sum(report.messages for report in good),
        "takeovers": len(takeovers),
        "takeover_median_s": statistics.median(takeovers) if takeovers else None,
        "takeover_p99_s": takeovers[int(0.99 * (len(takeovers) - 1))] if takeovers else None,
        "wall_s": wall_s,
        "times_real_time": simulated / wall_s if wall_s else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one; with --seeds 1 it is replayed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    done: list[Report] = []
    started = time.monotonic()
    with Progress(
        TextColumn("simulated runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task("", total=len(seeds))
        for report in reports(seeds, options.jobs):
            done.append(report)
            progress.advance(task)
            if report.broken is not None:
                progress.console.print(f"seed {report.seed}: {report.broken}", markup=False)
    figures = summary(done, time.monotonic() - started)
    print(
        f"{figures['seeds']} runs, {figures['device_seconds'] / 3600:.0f} device-hours simulated, "
        f"{len(figures['broken'])} broken"
    )
    if figures["takeovers"]:
        print(
            f"{figures['takeovers']} takeovers: median {figures['takeover_median_s']:.1f} s, "
            f"99 % within {figures['takeover_p99_s']:.1f} s, simulated"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
