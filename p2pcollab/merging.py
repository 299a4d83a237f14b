"""Merging: the state of a shard as a pure function of the contributions in its frontier.

The result is the weighted mean, to the bit the same on every device: contributions in device order,
accumulated in float64, one rounding to float32 at the end. Multiplication and addition are separate
operations, because a fused one rounds once instead of twice, and only some processors have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from .ledger import Contribution, Ledger, states_digest
from .run import ShardId

#: Weight of a contribution per generation that it is behind. Nearer to 1, late work pulls the state back by
#: as many leases as it is behind; nearer to 0, slow devices train for nothing.
STALENESS_DISCOUNT: Final = 0.5
#: No contribution is discounted for more generations than this, so that an absurd generation cannot make all
#: other weights vanish.
STALENESS_MAX: Final = 10

_MEAN: Final = "running_mean"
_VARIANCE: Final = "running_var"


def weights(frontier: Sequence[Contribution]) -> tuple[float, ...]:
    """Weight of each contribution: its lease's samples, discounted by its staleness."""
    newest = max((entry.generation for entry in frontier), default=0)
    return tuple(
        entry.lease_samples * STALENESS_DISCOUNT ** min(newest - entry.generation, STALENESS_MAX)
        for entry in frontier
    )


def merge(contributions: Sequence[tuple[Contribution, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The weighted mean of the contributions of one shard's frontier.

    Batch-norm statistics merge as those of the union: the variance is the mean of the variances plus the
    variance of the means (law of total variance). Counters take the maximum.

    Args:
        contributions: at least one, in any order, each with its tensors: equal names, shapes and dtypes;
            float32 or integers.

    Returns:
        New tensors, float32 or as they were if integers; a single contribution comes back unchanged.
    """
    assert contributions
    ordered = sorted(contributions, key=lambda pair: (pair[0].device, pair[0].version))
    weight = weights([contribution for contribution, _ in ordered])
    parts = [tensors for _, tensors in ordered]
    assert all(part.keys() == parts[0].keys() for part in parts)
    return {name: _merged(name, parts, weight) for name in parts[0]}


def merged_digest(ledger: Ledger, shard: ShardId) -> str:
    """Name of a shard's merged state: equal names, equal tensors."""
    return states_digest(ledger.frontier(shard))


def _merged(name: str, parts: Sequence[dict[str, Tensor]], weight: Sequence[float]) -> Tensor:
    values = [part[name] for part in parts]
    if len(values) == 1:
        return values[0].clone()
    if not values[0].is_floating_point():
        return torch.stack(values).amax(dim=0)
    mean_name = name.removesuffix(_VARIANCE) + _MEAN
    if not name.endswith(_VARIANCE) or mean_name not in parts[0]:
        return _mean(values, weight).float()
    means = [part[mean_name].double() for part in parts]
    mean = _mean(means, weight)
    # The textbook form, mean of squares minus square of the mean, cancels where |mean| >> deviation.
    spread = [value.double() + (own - mean).square() for value, own in zip(values, means, strict=True)]
    return _mean(spread, weight).float()


def _mean(values: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Weighted mean in float64."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, factor in zip(values, weight, strict=True):
        total += value.double() * factor
    return total / sum(weight)
