"""The demo over several seeds and both partitions; see scripts/bench-demo."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PARTITIONS = ("iid", "shared")


def run_demo(result: Path, partition: str, seed: int, more: list[str]) -> None:
    """One demo; its log goes beside its result."""
    command = [sys.executable, "-m", "p2pcollab.cli", "demo", "--partition", partition, "--seed", str(seed)]
    with result.with_suffix(".log").open("w") as log:
        # Not in the checkout: its folder p2pcollab/ would shadow what is installed.
        subprocess.run(
            [*command, "--json", str(result), *more], check=True, stdout=log, stderr=log, cwd=result.parent
        )


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What several runs have in common, and how they differ."""
    assembled = [100 * result["assembled_accuracy"] for result in results]
    central = [100 * result["central_accuracy"] for result in results]
    differences = [one - other for one, other in zip(assembled, central, strict=True)]
    savings = [
        statistics.median(
            result["central_training_macs"] / max(1, device["training_macs"]) for device in result["devices"]
        )
        for result in results
    ]
    devices = [device for result in results for device in result["devices"]]
    busiest = [
        result["central_training_macs"] / max(device["training_macs"] for device in result["devices"])
        for result in results
    ]
    together = [
        sum(device["training_macs"] for device in result["devices"]) / result["central_training_macs"]
        for result in results
    ]
    return {
        "seeds": [result["seed"] for result in results],
        "assembled_mean": statistics.fmean(assembled),
        "assembled_sd": statistics.stdev(assembled) if len(assembled) > 1 else 0.0,
        "central_mean": statistics.fmean(central),
        "central_sd": statistics.stdev(central) if len(central) > 1 else 0.0,
        "difference_mean": statistics.fmean(differences),
        "coverage_min": min(result["coverage"] for result in results),
        "digests_equal": all(len(set(result["digests"])) == 1 for result in results),
        "takeover_finished": all(
            all(result["takeover"]["finished_by"].values()) for result in results if result["takeover"]
        ),
        "median_device_saving_min": min(savings),
        "median_device_saving_mean": statistics.fmean(savings),
        "busiest_device_saving_min": min(busiest),
        "network_macs_ratio_mean": statistics.fmean(together),
        "bytes_sent_median": statistics.median(device["bytes_sent"] for device in devices),
        "peak_rss_bytes_max": max(device["peak_rss_bytes"] for device in devices),
        "wall_s_mean": statistics.fmean(result["wall_s"] for result in results),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--results", type=Path, default=Path("build/bench-demo"), help="where each run's JSON goes"
    )
    parser.add_argument("--json", type=Path, help="write the summary here as well")
    parser.add_argument("more", nargs="*", help="options of the demo, after --")
    options = parser.parse_args()
    results_folder = options.results.absolute()
    results_folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for partition in PARTITIONS:
        results = []
        for seed in range(options.seeds):
            path = results_folder / f"{partition}-{seed}.json"
            if not path.exists():
                print(f"{partition}, seed {seed} ...", flush=True)
                run_demo(path, partition, seed, options.more)
            results.append(json.loads(path.read_text()))
        row = rows[partition] = summary(results)
        print(
            f"{partition:7} assembled {row['assembled_mean']:.1f} ± {row['assembled_sd']:.1f} %, "
            f"central {row['central_mean']:.1f} ± {row['central_sd']:.1f} %, "
            f"difference {row['difference_mean']:+.2f} points; "
            f"median device {row['median_device_saving_mean']:.1f}x "
            f"less computation (least {row['median_device_saving_min']:.1f}x); {row['wall_s_mean']:.0f} s"
        )
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(f"on {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "machine": machine}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
