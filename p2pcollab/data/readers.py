"""Reading the public sets: the digits from scikit-learn's file, the others through torchvision."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .images import Pixels
from .known import KnownSet
from .partition import Labels, split_by_name
from .words import shown


@dataclass(frozen=True, slots=True, eq=False)
class PublicArrays:
    """Images as a public set has them, uint8 [N, C, H, W], and labels into its own classes."""

    images: Pixels
    labels: Labels


def relabelled(arrays: PublicArrays, run_label: npt.NDArray[np.int64]) -> PublicArrays:
    """Labels of the run instead of the set's; images of classes that the run does not know are left out."""
    labels = run_label[arrays.labels]
    keep = labels >= 0
    return (
        PublicArrays(arrays.images, labels) if keep.all() else PublicArrays(arrays.images[keep], labels[keep])
    )


def read_digits() -> tuple[PublicArrays, PublicArrays]:
    """Straight from scikit-learn's file: importing scikit-learn takes 1.4 s, reading the file 10 ms."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError(
            "the digits come with scikit-learn, which is not installed", "pip install scikit-learn"
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(file, "rt", encoding="ascii") as lines:
            rows = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"the digits cannot be read from {file}", "reinstall scikit-learn") from error
    labels = rows[:, 64]
    # 17 shades, 0..16.
    images = np.round(rows[:, :64] * (255.0 / 16.0)).astype(np.uint8).reshape(-1, 1, 8, 8)
    # The row is the name: the test set is the same everywhere, for ever.
    train, test = split_by_name(labels, [str(row) for row in range(len(rows))])
    return PublicArrays(images[train], labels[train]), PublicArrays(images[test], labels[test])


def read_torchvision(known: KnownSet, root: Path, download: bool) -> tuple[PublicArrays, PublicArrays]:
    # Not fetched, and not there: found out before torchvision is imported, which takes seconds.
    if not download and not (root / known.folder).is_dir():
        raise not_found(known, root)
    try:
        from torchvision import datasets
    except Exception as error:  # a torchvision that does not fit torch fails in many ways
        raise DataError(
            f"torchvision cannot be imported: {error}", "install the torchvision that belongs to your torch"
        ) from error
    try:
        # torchvision compares the files with the published MD5 sums.
        sets = [
            getattr(datasets, known.title)(str(root), train=part, download=download) for part in (True, False)
        ]
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if download:
            raise DataError(
                f"{known.title} cannot be fetched to {root}: {error}",
                "check the connection to the internet, or copy the data from another device",
            ) from error
        raise not_found(known, root) from error
    train, test = (
        PublicArrays(_channels_first(np.asarray(part.data)), _labels(part.targets)) for part in sets
    )
    return train, test


def _channels_first(images: Pixels) -> Pixels:
    """A view as [N, C, H, W] of [N, H, W, C] or [N, H, W]."""
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def _labels(targets: npt.ArrayLike) -> Labels:
    return np.asarray(targets, dtype=np.int64)


def not_found(known: KnownSet, root: Path) -> DataError:
    return DataError(
        f"{known.title} is not in {shown(root)} (no intact {known.folder})",
        "fetch it with --download, or name the folder above it with --data-root",
    )
