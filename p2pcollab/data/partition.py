"""How training data are divided: shares of devices, sub-sets, and the split into training and test.

All of it is a pure function of labels (or names) and a seed, and must come out the same on every device
of a run, whatever its numpy: so the generator is `RandomState`, whose stream numpy has frozen for good,
unlike `default_rng`'s, and names are ordered by their SHA-256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from ..errors import DataError, UsageError
from .words import counted

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
PartitionKind = Literal["iid", "skewed"]

#: One image in five is for the test where the data come without a split.
TEST_FRACTION: Final = 0.2
#: Parts are made on every device: this bounds what a mistyped share costs.
PARTS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Share:
    """The `index`-th of `of` equal parts of the training data, counted from 1; written `2/5`."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read `INDEX/OF`.

        Raises:
            UsageError: it is not two whole numbers with 1 <= INDEX <= OF.
        """
        fix = "write it as INDEX/OF, for example 2/5 for the second of five parts"
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*/\s*([0-9]{1,6})\s*", text, re.ASCII)
        if match is None:
            raise UsageError(f"the share {text!r} is not two whole numbers with a slash between them", fix)
        index, of = int(match[1]), int(match[2])
        if of < 1:
            raise UsageError(f"the share {text!r} divides the data into no parts", fix)
        if of > PARTS_MAX:
            raise UsageError(f"the share {text!r} divides the data into more than {PARTS_MAX} parts", fix)
        if index < 1:
            raise UsageError(f"the share {text!r} asks for part {index}, but parts are counted from 1", fix)
        if index > of:
            raise UsageError(f"the share {text!r} asks for part {index} of only {of}", fix)
        return cls(index, of)

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Which of the training examples this device uses."""

    share: Share | None
    #: At most so many of them all, before they are divided into shares.
    limit: int | None
    seed: int

    def choose(self, labels: Labels, noun: str) -> tuple[Indices, list[str]]:
        """Indices of the examples to use, and notes.

        Raises:
            DataError: the share is empty.
        """
        chosen: Indices = np.arange(len(labels))
        notes = []
        if self.limit is not None and self.limit < len(labels):
            chosen = stratified_subset(labels, self.limit, seed=self.seed)
            notes.append(f"limited to {self.limit} of {counted(len(labels), f'training {noun}')}")
        if self.share is None:
            return chosen, notes
        part = partition(labels[chosen], self.share.of, seed=self.seed)[self.share.index - 1]
        whole = counted(len(chosen), f"training {noun}")
        if len(part) == 0:
            raise DataError(f"share {self.share} of {whole} is empty", "divide the data into fewer parts")
        notes.append(f"share {self.share}: {len(part)} of {whole}")
        return chosen[part], notes


def partition(
    labels: Labels, parts: int, kind: PartitionKind = "iid", *, seed: int = 0
) -> tuple[Indices, ...]:
    """Divide samples into parts that are disjoint and together hold everything.

    `iid`: sizes differ by at most 1, and so do the counts of each class.
    `skewed`: each part gets two runs of the samples sorted by class, so about two classes
    (the pathological split of McMahan et al., 2017).

    Returns:
        Per part, sorted indices into `labels`.
    """
    assert 1 <= parts <= PARTS_MAX, parts
    generator = np.random.RandomState(seed)
    by_class = _shuffled_by_class(labels, generator)
    if kind == "iid":
        return tuple(np.sort(by_class[part::parts]) for part in range(parts))
    runs = np.array_split(by_class, 2 * parts)
    dealt = generator.permutation(2 * parts)
    return tuple(
        np.sort(np.concatenate([runs[dealt[2 * part]], runs[dealt[2 * part + 1]]])) for part in range(parts)
    )


def stratified_subset(labels: Labels, limit: int, *, seed: int = 0) -> Indices:
    """At most `limit` samples, the classes in proportion. A smaller limit's are among a larger one's.

    Returns:
        Sorted indices into `labels`.
    """
    by_class = _shuffled_by_class(labels, np.random.RandomState(seed))
    counts = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
    rank = np.concatenate([np.arange(count) for count in counts]) if len(counts) else counts
    # Position of a sample within its class, in 0..1: taking the smallest first keeps the proportions.
    position = (rank + 0.5) / np.repeat(counts, counts)
    return np.sort(by_class[np.argsort(position, kind="stable")[:limit]])


def split_by_name(labels: Labels, names: Sequence[str]) -> tuple[Indices, Indices]:
    """A fixed, stratified split into training and test: in each class, the names whose digest is smallest.

    It depends on names alone, so it is the same in every run and on every device that has the same files,
    and adding images moves hardly any other from one side to the other. Classes of one or two samples
    have no test samples; larger ones have at least one.

    Returns:
        (training, test), sorted indices.
    """
    assert len(labels) == len(names)
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    test: list[int] = []
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=digests.__getitem__)
        share = round(len(members) * TEST_FRACTION)
        test.extend(members[: max(1, share) if len(members) >= 3 else 0])
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[test] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _shuffled_by_class(labels: Labels, generator: np.random.RandomState) -> Indices:
    """All indices, class after class, shuffled within each class."""
    order = generator.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]
