"""Power cuts, flipped bytes and refusing disks, all of them; see scripts/storage-faults and tests/node."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "node"))

import digits_runs as runs
from recorded_disk import sqlite_library
from storage_sweeps import Tally, flips, power_cuts, refusals

from p2pcollab.daemon.fleet import Fleet


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="lives of a state folder (default: 5)")
    parser.add_argument("--leases", type=int, default=6, help="leases in each (default: 6)")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    if sqlite_library() is None:
        print("this Python hides its SQLite, which cannot be recorded", file=sys.stderr)
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
    rows = [one_sweep(name, [partial(sweep, seed) for seed in seeds]) for name, sweep in sweeps]
    rows += [
        one_sweep("byte flipped, daemon closed", [lambda: flips(1, closed=True)]),
        one_sweep("byte flipped, daemon killed", [lambda: flips(1, closed=False)]),
    ]
    rows.append(one_sweep("every file, a real device", [rotten_device]))
    wrong = sum(len(row["problems"]) for row in rows)
    if options.json:
        versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
        result = {"seeds": options.seeds, "leases": leases, "versions": versions, "sweeps": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print("nothing lost in silence" if not wrong else f"{wrong} cases went wrong")
    return 1 if wrong else 0


def rotten_device() -> Tally:
    """Flip a byte in every file of a device that has left, but in the second copies: it must come back as the
    same device, lose nothing, and end with the other one's model."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="p2pcollab-rot-") as name, Fleet() as fleet:
        folder = Path(name)
        one, two = (runs.add_digits(fleet, str(index), folder, f"{index}/2") for index in (1, 2))
        code = runs.create(one, runs.digits_spec("rot", epochs=8))
        two.start(mode="join", code=code)
        for device in (one, two):
            runs.eventually(partial(runs.contributed, device), "both devices to contribute")
        before, was = runs.seen(two), runs.device_id(two)
        two.leave()
        flipped = [path for path in sorted(two.state.rglob("*")) if path.is_file() and is_first(path)]
        for path in flipped:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        two.start(mode="join", code=None)
        runs.complete(one, two)
        models = {hashlib.sha256(device.assemble().data).hexdigest() for device in (one, two)}
        for problem in (
            "it is another device" if runs.device_id(two) != was else None,
            f"it lost {runs.lost(before, runs.seen(two))}" if runs.lost(before, runs.seen(two)) else None,
            "the models differ" if len(models) > 1 else None,
        ):
            tally.add(f"right, {len(flipped)} files flipped", problem, "two devices")
    return tally


def is_first(path: Path) -> bool:
    """Whether a file of a state folder has no other that it is a copy of."""
    copies = (".copy", ".previous", ".lock", ".log")
    return path.parent.name != "headers" and not path.name.endswith(copies)


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
