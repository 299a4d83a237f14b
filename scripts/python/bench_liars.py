"""Lying devices and the defence against them; see scripts/bench-liars."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_demo import processor
from liars import report
from liars.attacks import ATTACKS
from liars.runs import Data, Setting, read, run
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from p2pcollab.data import inspect
from p2pcollab.errors import P2PCollabError
from p2pcollab.files import write_atomic
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import RunSpec


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="digits", help="where the data come from, as `p2pcollab new --data`"
    )
    parser.add_argument("--data-root", type=Path, help="where torchvision's sets are kept")
    parser.add_argument("--model", default="digits", help="network family")
    parser.add_argument("--side", type=int, default=16, help="images are scaled to this many pixels a side")
    parser.add_argument("--limit", type=int, default=5000, help="training images of all devices together")
    parser.add_argument("--samples", type=int, default=5120, help="of each branch: its budget")
    parser.add_argument("--lease-batches", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--negatives", type=float, default=0.5)
    parser.add_argument("--branch-width", type=float, default=0.25)
    parser.add_argument("--classes-per-task", type=int, default=2)
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--liars", default="3,7", help="the devices that lie, counted from 0")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas; all attacks with each in turn")
    parser.add_argument(
        "--results", type=Path, default=Path("build/bench-liars"),
        help="where each result goes; one that is there is not made again",
    )  # fmt: skip
    parser.add_argument("--without-plain", action="store_true", help="leave plain averaging out")
    parser.add_argument("--json", type=Path, help="write all rows into this file, and the table beside it")
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    attacks = options.attacks.split(",")
    unknown = set(attacks) - set(ATTACKS)
    if unknown:
        raise SystemExit(
            f"error: no attack is called {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}"
        )
    options.results.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    ) as progress:
        for seed in map(int, options.seeds.split(",")):
            setting = _setting(options, seed)
            data: Data | None = None
            for attack, defended, absent in _plan(attacks, plain=not options.without_plain):
                path = options.results / f"{_key(setting, attack, defended, absent)}.json"
                told = f"seed {seed}: {report.name(attack, defended, absent)}"
                task = progress.add_task(told, total=1.0)
                if not path.exists():
                    data = data or read(setting)
                    found = run(
                        setting, data, attack, defended=defended, absent=absent,
                        on_lease=partial(_show, progress, task),
                    )  # fmt: skip
                    found |= {"spec": setting.spec.model_dump(mode="json"), "machine": _machine()}
                    write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
                progress.update(task, completed=1.0)
                results.append(json.loads(path.read_text()))
                if options.json:
                    _write(options, setting, results)
    print(report.table(results))
    return 0


def _plan(attacks: list[str], *, plain: bool) -> list[tuple[str | None, bool, bool]]:
    """Attack, whether the defence is on, and whether the liars are left out; in this order."""
    defences = (True, False) if plain else (True,)
    plan: list[tuple[str | None, bool, bool]] = [(None, defended, False) for defended in defences]
    plan.append((None, True, True))
    return plan + [(attack, defended, False) for attack in attacks for defended in defences]


def _setting(options: argparse.Namespace, seed: int) -> Setting:
    info = inspect(options.data, options.data_root)
    plan = PlanOptions(
        family=options.model,
        epochs=1,
        expected_samples=min(options.limit, info.train_images),
        seed=seed,
        classes_per_task=options.classes_per_task,
    )
    spec = plan_run("liars", info, plan)
    schedule = spec.schedule.model_copy(
        update={
            "budget_samples": options.samples,
            "lease_samples": options.lease_batches * options.batch,
            "batch_size": options.batch,
            "peak_lr": options.rate,
            "negatives": options.negatives,
        }
    )
    model = spec.model.model_copy(update={"branch_width": options.branch_width})
    side = min(options.side, info.height)
    sized = spec.input.model_copy(update={"height": side, "width": side})
    changed = spec.model_copy(update={"schedule": schedule, "model": model, "input": sized})
    return Setting(
        spec=RunSpec.decode(changed.encode()),  # validated as a whole
        source=options.data,
        root=options.data_root,
        limit=options.limit,
        devices=options.devices,
        liars=tuple(map(int, options.liars.split(","))),
    )


def _key(setting: Setting, attack: str | None, defended: bool, absent: bool) -> str:
    """Name of a result: equal for equal work."""
    described = {
        "spec": setting.spec.model_dump(mode="json"),
        "source": setting.source,
        "limit": setting.limit,
        "devices": setting.devices,
        "liars": setting.liars,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    column = "absent" if absent else "defended" if defended else "plain"
    return f"{attack or 'none'}-{column}-{setting.spec.seed}-{digest}"


def _write(options: argparse.Namespace, setting: Setting, results: list[dict[str, Any]]) -> None:
    rows = [
        {key: value for key, value in one.items() if key not in ("spec", "machine", "comparisons")}
        for one in results
    ]
    content = {
        "rows": rows,
        "setting": {
            "source": setting.source,
            "limit": setting.limit,
            "devices": setting.devices,
            "liars": list(setting.liars),
            "spec": setting.spec.model_dump(mode="json"),
        },
        "machine": _machine(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.json, (json.dumps(content, indent=1) + "\n").encode())
    write_atomic(options.json.with_suffix(".table.md"), (report.table(results) + "\n").encode())


def _show(progress: Progress, task: TaskID, done: float) -> None:
    progress.update(task, completed=done)


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except P2PCollabError as error:
        sys.exit(f"error: {error}")
