"""Join to first training step; see scripts/bench-join.

A first device creates a run and holds still (it takes no data, so it trains nothing); the measured device
joins it. The clock starts before the joining daemon's process does.
"""

from __future__ import annotations

import argparse
import json
import platform
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hivemind
import torch

from p2pcollab.daemon.fleet import Fleet, wait_until
from p2pcollab.data import inspect
from p2pcollab.planning import PlanOptions, plan_run

PARTS = ("imports", "p2pd", "discovery", "allotment", "first_step")


def measure(seed: int) -> dict[str, float]:
    """One join; seconds in total and by part."""
    info = inspect("digits", None)
    spec = plan_run(
        "bench-join", info, PlanOptions(epochs=100, expected_samples=info.train_images, seed=seed)
    )
    with tempfile.TemporaryDirectory(prefix="p2pcollab-bench-") as folder, Fleet() as fleet:
        waiting = fleet.add("waiting", Path(folder) / "waiting", threads=1)
        waiting.start(mode="new", spec=spec.encode().decode(), secret_hex=secrets.token_hex(16))
        status = waiting.status()
        assert status is not None
        joining = fleet.add("joining", Path(folder) / "joining", data="digits", threads=1)
        start = time.monotonic()
        joining.start(mode="join", code=status["run"]["join_code"])

        def timings() -> dict[str, Any]:
            status = joining.status()
            return status["timings"] if status else {}

        wait_until(lambda: "seconds_to_first_training_step" in timings(), timeout_s=60, what="the first step")
        outside = time.monotonic() - start
        found = timings()
        return {
            "total": found["seconds_to_first_training_step"],
            "seen_from_outside": outside,
            **{part: found[part] for part in PARTS},
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    rows = []
    for index in range(options.runs):
        rows.append(measure(index))
        parts = ", ".join(f"{part} {rows[-1][part]:.2f}" for part in PARTS)
        print(f"run {index + 1}: {rows[-1]['total']:.2f} s ({parts})", flush=True)
    result = {
        "median_s": statistics.median(row["total"] for row in rows),
        "parts": {part: statistics.median(row[part] for row in rows) for part in PARTS},
        "runs": rows,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hivemind": hivemind.__version__,
    }
    print(f"median {result['median_s']:.2f} s of {options.runs}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
