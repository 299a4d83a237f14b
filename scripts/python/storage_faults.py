"""Power cuts, flipped bytes and refusing disks, all of them; see scripts/storage-faults and tests/node."""

from __future__ import annotations

import argparse
import errno
import json
import platform
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "node"))

from recorded_disk import sqlite_library
from storage_sweeps import Tally, flips, power_cuts, refusals


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="lives of a state folder (default: 5)")
    parser.add_argument("--leases", type=int, default=6, help="leases in each (default: 6)")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    if sqlite_library() is None:
        print("this Python's SQLite is linked statically and cannot be recorded", file=sys.stderr)
        return 2
    seeds, leases = range(1, options.seeds + 1), options.leases
    sweeps: list[tuple[str, Callable[[int], Tally]]] = [
        (
            "power cut",
            lambda seed: power_cuts(seed, leases, leaves=("all", "nothing", "some", "some", "some")),
        ),
        ("disk full", lambda seed: refusals(seed, leases, errno.ENOSPC)),
        ("disk error", lambda seed: refusals(seed, leases, errno.EIO)),
    ]
    rows = [one_sweep(name, [lambda s=seed, f=sweep: f(s) for seed in seeds]) for name, sweep in sweeps]
    rows += [
        one_sweep("byte flipped, daemon closed", [lambda: flips(1, closed=True)]),
        one_sweep("byte flipped, daemon killed", [lambda: flips(1, closed=False)]),
    ]
    wrong = sum(len(row["problems"]) for row in rows)
    if options.json:
        versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
        result = {"seeds": options.seeds, "leases": leases, "versions": versions, "sweeps": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print("nothing lost in silence" if not wrong else f"{wrong} cases went wrong")
    return 1 if wrong else 0


def one_sweep(name: str, parts: list[Callable[[], Tally]]) -> dict[str, Any]:
    """Run a sweep's parts; its row of the table, which is printed."""
    began = time.monotonic()
    total = Tally()
    for part in parts:
        tally = part()
        total.outcomes.update(tally.outcomes)
        total.problems += tally.problems
    outcomes = dict(sorted(total.outcomes.items()))
    seconds = time.monotonic() - began
    print(
        f"{name:28} {total.cases:7} cases in {seconds:5.0f} s: "
        + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()),
        flush=True,
    )
    for problem in total.problems[:5]:
        print(f"    {problem}", flush=True)
    return {
        "fault": name,
        "cases": total.cases,
        "outcomes": outcomes,
        "problems": total.problems[:100],
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
