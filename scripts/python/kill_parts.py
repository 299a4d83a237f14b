"""kill -9 of each part of a device at three moments; see scripts/kill-parts.

A ledger entry is lost if, after everything, some device's samples in some shard's lineage are fewer than they
were when the victim was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from p2pcollab.daemon.fleet import Fleet, LocalDevice, settled, wait_until
from p2pcollab.data import inspect
from p2pcollab.planning import PlanOptions, plan_run

PARTS = ("daemon", "trainer", "p2pd")
MOMENTS = (0.1, 0.4, 0.7)
DEVICES = 3

Seen = dict[str, dict[str, int]]


def seen(device: LocalDevice) -> Seen:
    """Samples by shard and device, as a device's ledger has them."""
    status = device.status()
    if status is None:
        return {}
    return {row["shard"]: dict(row["samples_by"]) for row in status["shards"]}


def lost(before: Seen, after: Seen) -> list[str]:
    """What `after` lacks of `before`."""
    return [
        f"{shard}/{device}: {after.get(shard, {}).get(device, 0)} < {count}"
        for shard, counts in before.items()
        for device, count in counts.items()
        if after.get(shard, {}).get(device, 0) < count
    ]


def progress(device: LocalDevice) -> float:
    status = device.status()
    return float(status["progress"]) if status else 0.0


def reached(device: LocalDevice, moment: float) -> bool:
    return progress(device) >= moment


def resumed(victim: LocalDevice, part: str, before: dict[str, int]) -> bool:
    """Whether the killed part is back: another process id, and a daemon that works."""
    now = {name: process.pid for name, process in victim.processes().items()}
    status = victim.status()
    return bool(
        status
        and part in now
        and now[part] != before[part]
        and (status["phase"] in ("training", "idle", "complete"))
        and (status["peers"] or status["complete"])
    )


def one_run(part: str, epochs: float, seed: int) -> dict[str, Any]:
    """A run in which one part of one device is killed at each moment."""
    info = inspect("digits", None)
    spec = plan_run("kills", info, PlanOptions(epochs=epochs, expected_samples=info.train_images, seed=seed))
    kills: list[dict[str, Any]] = []
    snapshots: list[Seen] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="p2pcollab-kills-") as folder, Fleet() as fleet:
        for index in range(DEVICES):
            fleet.add(
                f"device-{index + 1}",
                Path(folder) / str(index),
                data="digits",
                share=f"{index + 1}/{DEVICES}",
                threads=1,
            )
        first, *others = fleet.devices
        first.start(mode="new", spec=spec.encode().decode(), secret_hex=secrets.token_hex(16))
        status = first.status()
        assert status is not None
        code = status["run"]["join_code"]
        for device in others:
            device.start(mode="join", code=code)
        victim = others[0]
        for moment in MOMENTS:
            wait_until(partial(reached, victim, moment), timeout_s=300, what=f"progress {moment:.0%}")
            before = {name: process.pid for name, process in victim.processes().items()}
            snapshot = seen(victim)
            at = progress(victim)
            victim.kill(part)
            killed_at = time.monotonic()
            if part == "daemon":
                victim.start(mode="resume", code=None)
            wait_until(
                partial(resumed, victim, part, before),
                timeout_s=60,
                what=f"{part} of {victim.name} to be back",
            )
            snapshots.append(snapshot)
            kills.append(
                {
                    "part": part,
                    "at_progress": at,
                    "back_after_s": round(time.monotonic() - killed_at, 2),
                    "lost_after_restart": lost(snapshot, seen(victim)),
                }
            )
        wait_until(lambda: settled(fleet.devices), timeout_s=300, what="the run to complete")
        for kill, snapshot in zip(kills, snapshots, strict=True):
            kill["lost_at_end"] = [
                entry for device in fleet.devices for entry in lost(snapshot, seen(device))
            ]
            kill["run_complete"] = True
        digests = {hashlib.sha256(device.assemble().data).hexdigest() for device in fleet.devices}
    for kill in kills:
        kill["digests_equal"] = len(digests) == 1
        kill["run_s"] = round(time.monotonic() - start, 1)
    return {"kills": kills}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="which of daemon,trainer,p2pd (default: all)"
    )
    parser.add_argument("--epochs", type=float, default=16, help="length of each run (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in options.parts.split(","):
        if part not in PARTS:
            parser.error(f"no part {part!r}: one of {', '.join(PARTS)}")
        print(f"killing the {part} at {', '.join(f'{moment:.0%}' for moment in MOMENTS)} ...", flush=True)
        rows += one_run(part, options.epochs, options.seed)["kills"]
        for row in rows[-len(MOMENTS) :]:
            print(
                f"  {row['part']:8} at {row['at_progress']:4.0%}: back after {row['back_after_s']:5.1f} s, "
                f"run complete: {row['run_complete']}, entries lost: "
                f"{len(row['lost_after_restart']) + len(row['lost_at_end'])}, "
                f"digests equal: {row['digests_equal']}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "kills": rows}, indent=2) + "\n")
    bad = [r for r in rows if r["lost_after_restart"] or r["lost_at_end"] or not r["digests_equal"]]
    print("nothing lost" if not bad else f"{len(bad)} kills lost something")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
