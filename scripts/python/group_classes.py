"""Which classes to train together; see scripts/group-classes."""

from __future__ import annotations

import argparse
import csv
import random
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from p2pcollab.data import SourceInfo, inspect, load
from p2pcollab.errors import P2PCollabError, UsageError
from p2pcollab.files import write_atomic
from p2pcollab.grouping import format_groups
from p2pcollab.planning import PlanOptions, plan_run

_ROUNDS = 100


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="as `p2pcollab new --data`")
    parser.add_argument("--data-root", type=Path, help="where torchvision's sets are kept")
    parser.add_argument("--by", choices=("table", "likeness", "chance"), required=True)
    parser.add_argument(
        "--table", type=Path, help="CSV file with columns `fine` and `coarse`, for --by table"
    )
    parser.add_argument("--size", type=int, default=5, help="classes in a group, unless a table says it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if (options.by == "table") != (options.table is not None):
        parser.error("--by table and --table FILE belong together")
    if options.size < 1:
        parser.error("--size: at least one class")
    return options


def by_table(table: Path, classes: tuple[str, ...]) -> list[list[str]]:
    """The classes under each coarser label, both in alphabetical order.

    Raises:
        UsageError: it is no such table, or says nothing, or two things, of a class.
    """
    coarse_of: dict[str, str] = {}
    try:
        rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        if not {"fine", "coarse"} <= set(rows.fieldnames or ()):
            raise UsageError(f"{table} has no columns `fine` and `coarse`", "name them in its first line")
        for row in rows:
            if coarse_of.setdefault(row["fine"], row["coarse"]) != row["coarse"]:
                raise UsageError(f"{table} has {row['fine']!r} under two coarser labels")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table} cannot be read as CSV: {error}") from error
    lacking = [name for name in classes if name not in coarse_of]
    if lacking:
        raise UsageError(f"{table} says nothing of {lacking[0]!r}")
    coarse = sorted({coarse_of[name] for name in classes})
    return [[name for name in classes if coarse_of[name] == label] for label in coarse]


def by_chance(classes: tuple[str, ...], size: int, seed: int) -> list[list[str]]:
    """Groups of a size, of classes drawn at random."""
    drawn = random.Random(seed).sample(classes, len(classes))
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]


def by_likeness(
    classes: tuple[str, ...], means: npt.NDArray[np.float64], size: int, seed: int
) -> list[list[str]]:
    """Groups of a size, of classes whose mean images are near each other: k-means with places.

    Args:
        means: [classes, values]
    """
    rng = np.random.default_rng(seed)
    count = -(-len(classes) // size)
    centres = means[rng.permutation(len(classes))[:count]]
    # A group has as many places as it may have classes.
    group_of_place = np.repeat(np.arange(count), size)
    group = np.full(len(classes), -1)
    for _ in range(_ROUNDS):
        distances = ((means[:, None] - centres[None]) ** 2).sum(-1)
        _, places = linear_sum_assignment(distances[:, group_of_place])
        before, group = group, group_of_place[places]
        if (before == group).all():
            break
        centres = np.stack(
            [
                means[group == index].mean(0) if (group == index).any() else centres[index]
                for index in range(count)
            ]
        )
    found = [[name for name, of in zip(classes, group, strict=True) if of == index] for index in range(count)]
    return [names for names in found if names]


def mean_images(options: argparse.Namespace, info: SourceInfo) -> npt.NDArray[np.float64]:
    """The mean training image of each class, [classes, values]."""
    spec = plan_run("groups", info, PlanOptions())
    train = load(options.data, spec, options.data_root).train
    return np.stack(
        [train.images[train.labels == index].mean(0).ravel() for index in range(len(info.classes))]
    ).astype(np.float64)


def main() -> int:
    options = parse()
    info = inspect(options.data, options.data_root)
    if options.by == "table":
        groups = by_table(options.table, info.classes)
    elif options.by == "chance":
        groups = by_chance(info.classes, options.size, options.seed)
    else:
        groups = by_likeness(info.classes, mean_images(options, info), options.size, options.seed)
    write_atomic(options.out, format_groups(groups).encode())
    print(f"{len(groups)} groups of {len(info.classes)} classes are in {options.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (P2PCollabError, OSError) as error:
        sys.exit(f"group-classes: {error}")
