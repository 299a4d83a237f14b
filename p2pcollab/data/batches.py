"""From a data set to batches of tensors: shuffled, augmented and normalised, the same for the same seed.

Shapes: B samples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from ..errors import DataError
from ..run import STEM, InputSpec, RunSpec, ShardId
from .arrays import ArrayDataset
from .augment import Augmentation

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
Batch = tuple[torch.Tensor, torch.Tensor]

#: Batch normalisation has no variance to work with in a batch of 1.
_BATCH_MIN: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinning:
    """How often batches for some branches have each example of a data set: those of their tasks more often.

    A branch sees ten times as many examples of other classes as of its own where there are ten tasks. Every
    pass over the data draws other ones, so that all of them are seen in the end.
    """

    #: Classes of which every example is kept.
    own: frozenset[int]
    #: Probability that an example of another class is kept in a pass.
    kept: float
    #: How often each example of an own class is in a pass.
    repeats: int = 1

    @classmethod
    def of(cls, spec: RunSpec, shards: Iterable[ShardId]) -> Thinning:
        """Batches for a bundle of branches; the stem trains on everything."""
        tasks = [spec.task(shard) for shard in shards if shard != STEM]
        own = frozenset(index for task in tasks for index in task.classes)
        if not tasks:
            return cls(own=own, kept=1.0)
        return cls(own=own, kept=spec.schedule.negatives, repeats=spec.schedule.positives or 1)

    def times(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """How often a pass has each example in expectation, float64 [N]."""
        return np.where(np.isin(labels, list(self.own)), float(self.repeats), self.kept)

    def trained_per_offered(self, labels: npt.NDArray[np.int64]) -> float:
        """How many examples a pass has for each of the data's, whose labels these are."""
        return float(self.times(labels).mean()) if len(labels) else 1.0

    def one_pass(
        self, order: Indices, labels: npt.NDArray[np.int64], generator: np.random.Generator
    ) -> Indices:
        """Indices of a pass in their order, int64: of one over all examples, what is kept, and repeated."""
        own_N = np.isin(labels[order], list(self.own))
        more = np.repeat(order[own_N], self.repeats - 1)
        if self.kept < 1.0:
            order = order[own_N | (generator.random(len(order)) < self.kept)]
        return generator.permutation(np.concatenate([order, more])) if len(more) else order


def batches(
    dataset: ArrayDataset,
    spec: RunSpec,
    *,
    seed: int,
    samples: int,
    augment: bool = True,
    thinning: Thinning | None = None,
) -> Iterator[Batch]:
    """Training batches: passes over the data, each in a new order, cut into batches of one size.

    The size is the run's batch size, or the whole data set where that is smaller, and never 1: a data set
    of one image is seen twice in each batch. As many batches come as it takes to reach `samples`, so their
    sum exceeds it by less than one batch. A batch may reach from one pass into the next.

    With a thinning as many batches come, each smaller by what is left out, or larger by what is repeated.

    Returns:
        Pairs of images, float32 [B, C, H, W], normalised, and labels, int64 [B].

    Raises:
        DataError: the data set is empty.
    """
    if len(dataset) == 0:
        raise DataError("there are no training images on this device", "give it data with --data")
    return _batches(dataset, spec, seed, samples, augment, thinning)


def offered_batch(dataset: ArrayDataset, spec: RunSpec) -> int:
    """Samples that each training batch stands for."""
    return max(_BATCH_MIN, min(spec.schedule.batch_size, len(dataset)))


def _batches(
    dataset: ArrayDataset,
    spec: RunSpec,
    seed: int,
    samples: int,
    augment: bool,
    thinning: Thinning | None,
) -> Iterator[Batch]:
    generator = np.random.default_rng(seed)
    offered = size = offered_batch(dataset, spec)
    if thinning is not None:
        size = max(_BATCH_MIN, round(offered * thinning.trained_per_offered(dataset.labels)))
    normalise = _Normaliser(spec.input)
    augmentation = Augmentation(spec.input, dataset.noise, generator) if augment else None
    queue = np.empty(0, dtype=np.int64)
    for _ in range(-(-samples // offered)):
        while len(queue) < size:
            order = generator.permutation(len(dataset))
            if thinning is not None:
                order = thinning.one_pass(order, dataset.labels, generator)
            queue = np.concatenate([queue, order])
        chosen, queue = queue[:size], queue[size:]
        images = dataset.images[chosen]
        if augmentation is not None:
            images = augmentation(images)
        yield normalise(images), torch.from_numpy(dataset.labels[chosen])


def eval_batches(dataset: ArrayDataset, spec: RunSpec, batch_size: int = 512) -> Iterator[Batch]:
    """The whole data set once, in its order, without augmentation; the last batch may be smaller."""
    normalise = _Normaliser(spec.input)
    for start in range(0, len(dataset), batch_size):
        part = slice(start, start + batch_size)
        yield normalise(dataset.images[part]), torch.from_numpy(dataset.labels[part].copy())


def normalised(images: Pixels, spec: RunSpec) -> torch.Tensor:
    """Pixels, uint8 [B, C, H, W], as the network sees them: float32, mean 0 and deviation 1 per channel."""
    return _Normaliser(spec.input)(images)


class _Normaliser:
    """Pixels to float32, with the constants made once."""

    def __init__(self, spec: InputSpec) -> None:
        self._mean = torch.tensor(spec.mean, dtype=torch.float32).mul_(255.0).view(1, -1, 1, 1)
        self._scale = torch.tensor(spec.std, dtype=torch.float32).mul_(255.0).reciprocal_().view(1, -1, 1, 1)

    def __call__(self, images: Pixels) -> torch.Tensor:
        return torch.from_numpy(images).to(torch.float32).sub_(self._mean).mul_(self._scale)
