"""The method against central training; see scripts/bench-method."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_demo import processor
from method import report
from method.columns import measure, run_column
from method.configuration import Configuration
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from p2pcollab.errors import P2PCollabError
from p2pcollab.files import write_atomic


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits", help="name of the data set in the tables")
    parser.add_argument("--data", help="where it comes from, as `p2pcollab new --data`; default: the name")
    parser.add_argument("--data-root", type=Path, help="where torchvision's sets are kept")
    parser.add_argument("--model", default="alexnet", help="network family")
    parser.add_argument("--devices", type=int, help="equally fast ones; default: one for each task, and one")
    parser.add_argument(
        "--speeds",
        type=_speeds,
        help="devices that are not equally fast: the speed of each in units of the slowest, as 6,1,1,1",
    )
    parser.add_argument(
        "--partition",
        choices=("iid", "shared"),
        default="iid",
        help="each device has its own equal part of the data, or everybody all of them",
    )
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--limit", type=int, help="training images, the classes in proportion; default: all")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--columns", default="ABCD", help="which of the four to train")
    parser.add_argument(
        "--price-seeds",
        help="those of --seeds with which (B) and (C) are trained, too, which say where points are lost; "
        "default: all",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=NUMBER",
        dest="settings",
        help="a field of the run spec's model or schedule (0: no branch_squeeze, branch_lr or positives), "
        "classes_per_task, branches_per_class or lease_batches",
    )
    parser.add_argument(
        "--set-dense",
        action="append",
        default=[],
        metavar="FIELD=NUMBER",
        dest="dense_settings",
        help="the same for the dense network (A) alone, so that it is trained as well as can be",
    )
    parser.add_argument("--groups", type=Path, help="the tasks' classes, as `p2pcollab new --groups`")
    parser.add_argument("--name", default="default", help="name of these settings in the tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("build/bench-method"),
        help="where each result goes; one that is there is not made again",
    )
    parser.add_argument("--json", type=Path, help="put the row into this file, in place of an older one")
    parser.add_argument("--plot", type=Path, help="plot all rows of --json into this SVG file")
    return parser.parse_args()


def main() -> int:
    options = parse()
    settings = dict(_setting(text) for text in options.settings)
    dense_settings = dict(_setting(text) for text in options.dense_settings)
    source = options.data or options.dataset
    probe = Configuration(
        dataset=options.dataset, source=source, root=options.data_root, model=options.model,
        name=options.name, epochs=options.epochs, limit=options.limit, speeds=(),
        partition=options.partition, groups=options.groups, settings=settings,
        dense_settings=dense_settings,
    )  # fmt: skip
    equal = (1.0,) * (options.devices or len(probe.spec(0).tasks) + 1)
    configuration = replace(probe, speeds=options.speeds or equal)
    options.results.mkdir(parents=True, exist_ok=True)
    seeds = _seeds(options.seeds)
    price_seeds = seeds if options.price_seeds is None else _seeds(options.price_seeds)
    if not set(price_seeds) <= set(seeds):
        raise SystemExit(f"--price-seeds {options.price_seeds} has others than --seeds {options.seeds}")
    columns: dict[str, list[dict[str, Any]]] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    ) as progress:  # fmt: skip
        for seed in seeds:
            for column in options.columns:
                if column in "BC" and seed not in price_seeds:
                    continue
                path = options.results / f"{configuration.key(column, seed)}.json"
                task = progress.add_task(f"{options.model} {options.name} {column}, seed {seed}", total=1.0)
                result = _kept(
                    path,
                    partial(
                        run_column, configuration, column, seed, options.threads,
                        partial(_show, progress, task), path.with_suffix(".safetensors"),
                    ),
                )  # fmt: skip
                progress.update(task, completed=1.0)
                columns.setdefault(column, []).append(result)
        measured = None
        if "D" in columns:
            task = progress.add_task(f"{options.model} {options.name}, seconds and memory", total=None)
            path = options.results / f"{configuration.measured_key}.json"
            measured = _kept(path, partial(measure, configuration))
            progress.update(task, completed=1.0, total=1.0)
    row = report.row(options.dataset, options.model, options.name, options.epochs, columns, measured)
    row["partition"] = options.partition
    row["speeds"] = configuration.speeds
    row["machine"] = next(result["machine"] for results in columns.values() for result in results)
    # Results are kept, so that one row's may come from different machines.
    row["processors"] = {
        column: sorted({result["machine"]["processor"] for result in results})
        for column, results in columns.items()
    }
    print(report.line(row))
    if options.json:
        _put(options.json, row)
        rows = json.loads(options.json.read_text())["rows"]
        options.json.with_suffix(".table.md").write_text(report.markdown(rows))
        if options.plot:
            report.plot(rows, options.plot)
    return 0


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result, made now unless it is there already."""
    if not path.exists():
        write_atomic(path, (json.dumps(make() | {"machine": _machine()}, indent=1) + "\n").encode())
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def _speeds(text: str) -> tuple[float, ...]:
    speeds = tuple(float(part) for part in text.split(","))
    if not all(speed > 0 for speed in speeds):
        raise argparse.ArgumentTypeError("speeds are greater than 0")
    return speeds


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise SystemExit(f"--set takes FIELD=NUMBER, not {text!r}") from None


def _put(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file, in place of one of the same data set, model, configuration and size."""
    keys = ("dataset", "model", "config", "epochs", "train_images")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [other for other in rows if any(other[key] != row[key] for key in keys)] + [row]
    rows.sort(key=lambda one: tuple(str(one[key]) for key in keys))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def _show(progress: Progress, task: TaskID, done: float) -> None:
    progress.update(task, completed=done)


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except P2PCollabError as error:
        sys.exit(f"error: {error}")
