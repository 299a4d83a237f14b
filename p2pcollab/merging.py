"""Merging: the state of a shard as a pure function of the contributions in its frontier.

The result is the weighted mean, to the bit the same on every device: contributions in device order,
accumulated in float64, one rounding to float32 at the end. Multiplication and addition are separate
operations, because a fused one rounds once instead of twice, and only some processors have it.

One contribution can draw a mean wherever it likes. Where there are three or more of about the same age, the
mean is trimmed: of every value, the greatest and the smallest third are left out (of three, the median is
left), so that a minority of liars cannot leave the range of what the others have made. Weights do not protect
what is trimmed: a liar chooses its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from .ledger import VOTE_STALENESS_MAX, Contribution, Ledger, states_digest
from .run import ShardId

#: Weight of a contribution per generation that it is behind. Nearer to 1, late work pulls the state back by
#: as many leases as it is behind; nearer to 0, slow devices train for nothing.
STALENESS_DISCOUNT: Final = 0.5
#: No contribution is discounted for more generations than this, so that an absurd generation cannot make all
#: other weights vanish.
STALENESS_MAX: Final = 10

#: From this many contributions on, the mean is trimmed.
ROBUST_MIN: Final = 3

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
    """The weighted mean of the contributions of one shard's frontier, trimmed where there are three or more.

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
    voters = _voters(ordered)
    trimmed = max(1, len(voters) // 3) if len(voters) >= ROBUST_MIN else 0
    ordered = voters if trimmed else ordered
    weight = weights([contribution for contribution, _ in ordered])
    parts = [tensors for _, tensors in ordered]
    assert all(part.keys() == parts[0].keys() for part in parts)
    return {name: _merged(name, parts, weight, trimmed) for name in parts[0]}


def _voters(
    ordered: list[tuple[Contribution, dict[str, Tensor]]],
) -> list[tuple[Contribution, dict[str, Tensor]]]:
    """Those that have a vote in a trimmed mean."""
    newest = max(contribution.generation for contribution, _ in ordered)
    return [pair for pair in ordered if newest - pair[0].generation <= VOTE_STALENESS_MAX]


def merged_digest(ledger: Ledger, shard: ShardId) -> str:
    """Name of a shard's merged state: equal names, equal tensors."""
    return states_digest(ledger.frontier(shard))


def _merged(name: str, parts: Sequence[dict[str, Tensor]], weight: Sequence[float], trimmed: int) -> Tensor:
    values = [part[name] for part in parts]
    if len(values) == 1:
        return values[0].clone()
    if not values[0].is_floating_point():
        return torch.stack(values).amax(dim=0)
    mean_name = name.removesuffix(_VARIANCE) + _MEAN
    if not name.endswith(_VARIANCE) or mean_name not in parts[0]:
        return _mean(values, weight, trimmed).float()
    means = [part[mean_name].double() for part in parts]
    mean = _mean(means, weight, trimmed)
    # The textbook form, mean of squares minus square of the mean, cancels where |mean| >> deviation.
    spread = [value.double() + (own - mean).square() for value, own in zip(values, means, strict=True)]
    return _mean(spread, weight, trimmed).float()


def _mean(values: Sequence[Tensor], weight: Sequence[float], trimmed: int) -> Tensor:
    """Weighted mean in float64, value by value without so many of the smallest and of the greatest."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    if not trimmed:
        for value, factor in zip(values, weight, strict=True):
            total += value.double() * factor
        return total / sum(weight)
    # A stable sort: among equal values the order, and so the weights that are left, follows the devices.
    sorted_N, order_N = torch.sort(torch.stack([value.double() for value in values]), dim=0, stable=True)
    weight_N = torch.tensor(weight, dtype=torch.float64)[order_N]
    weights_total = torch.zeros_like(total)
    for place in range(trimmed, len(values) - trimmed):
        total += sorted_N[place] * weight_N[place]
        weights_total += weight_N[place]
    return total / weights_total
