"""From a data set to batches of tensors: shuffled, augmented and normalised, the same for the same seed.

Shapes: B samples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from ..errors import DataError
from ..run import InputSpec, RunSpec
from .arrays import ArrayDataset
from .augment import Augmentation

Pixels = npt.NDArray[np.uint8]
Batch = tuple[torch.Tensor, torch.Tensor]

#: Batch normalisation has no variance to work with in a batch of 1.
_BATCH_MIN: Final = 2


def batches(
    dataset: ArrayDataset, spec: RunSpec, *, seed: int, samples: int, augment: bool = True
) -> Iterator[Batch]:
    """Training batches: passes over the data, each in a new order, cut into batches of one size.

    The size is the run's batch size, or the whole data set where that is smaller, and never 1: a data set
    of one image is seen twice in each batch. As many batches come as it takes to reach `samples`, so their
    sum exceeds it by less than one batch. A batch may reach from one pass into the next.

    Returns:
        Pairs of images, float32 [B, C, H, W], normalised, and labels, int64 [B].

    Raises:
        DataError: the data set is empty.
    """
    if len(dataset) == 0:
        raise DataError("there are no training images on this device", "give it data with --data")
    return _batches(dataset, spec, seed, samples, augment)


def _batches(dataset: ArrayDataset, spec: RunSpec, seed: int, samples: int, augment: bool) -> Iterator[Batch]:
    generator = np.random.default_rng(seed)
    size = max(_BATCH_MIN, min(spec.schedule.batch_size, len(dataset)))
    normalise = _Normaliser(spec.input)
    augmentation = Augmentation(spec.input, dataset.noise, generator) if augment else None
    queue = np.empty(0, dtype=np.int64)
    for _ in range(-(-samples // size)):
        while len(queue) < size:
            queue = np.concatenate([queue, generator.permutation(len(dataset))])
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
