"""How good a model is class by class: counted from its scores, with no framework behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    """What a model made of the images of one class."""

    name: str
    images: int
    right: int
    #: The class that its images were taken for most often, if they were.
    mistaken_for: str | None
    #: How often.
    mistaken: int

    @property
    def accuracy(self) -> float | None:
        """Fraction of the images that were told right; None without images."""
        return self.right / self.images if self.images else None


def class_reports(
    classes: Sequence[str], predicted_N: npt.NDArray[np.int64], labels_N: npt.NDArray[np.int64]
) -> tuple[ClassReport, ...]:
    """One report per class, in the order of the classes.

    Args:
        predicted_N: the class index that the model chose for each image.
        labels_N: the right ones.
    """
    number = len(classes)
    confusion_CC = np.bincount(labels_N * number + predicted_N, minlength=number * number).reshape(
        number, number
    )
    reports = []
    for index, name in enumerate(classes):
        row = confusion_CC[index].copy()
        images, right = int(row.sum()), int(row[index])
        row[index] = 0
        other = int(row.argmax())
        mistaken = int(row[other])
        reports.append(
            ClassReport(
                name=name,
                images=images,
                right=right,
                mistaken_for=classes[other] if mistaken else None,
                mistaken=mistaken,
            )
        )
    return tuple(reports)
