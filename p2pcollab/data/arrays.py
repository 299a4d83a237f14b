"""Data sets as arrays in memory: what every source is turned into before training sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayDataset:
    """Images and labels, in a fixed order. Not changed after it is made; a subset is a copy.

    Fields:
        images: uint8 [N, C, H, W], of the run's input shape.
        labels: int64 [N], indices into the run's classes.
        noise: uint8 [M, C, H, W], backgrounds for the augmentation of clips; None: there are none.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    noise: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4, "images must be uint8 [N, C, H, W]"
        assert self.labels.dtype == np.int64 and self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: npt.NDArray[np.intp] | npt.NDArray[np.int64]) -> ArrayDataset:
        """The samples at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def where(self, kept: npt.NDArray[np.bool_]) -> ArrayDataset:
        """The samples at which `kept`, bool [N], is true; this very data set if that is all of them."""
        return self if kept.all() else self.subset(np.flatnonzero(kept))

    def counts(self, num_classes: int) -> tuple[int, ...]:
        """Samples of each class."""
        return tuple(np.bincount(self.labels, minlength=num_classes).tolist())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedData:
    """What one device trains on and measures with, and what a person should know about how it was read."""

    train: ArrayDataset
    #: Never divided by a share; may be empty where there are too few images.
    test: ArrayDataset
    #: One sentence each, for people: the split that was used, what was skipped, named and counted.
    notes: tuple[str, ...] = ()
