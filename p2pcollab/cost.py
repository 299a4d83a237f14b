"""What training costs: multiply-accumulate operations (MACs) per example, from the same plans that are built.

Convolutions and fully connected layers are counted; batch normalisation, ReLU and pools are not, which is
the usual way to count and under 1 % of the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from .data.batches import Thinning
from .models.stages import Plan, aux_plan, branch_plan, dense_plan, stem_plan
from .run import STEM, RunSpec, ShardId

#: Forward, gradient of the inputs, gradient of the weights: each as much work as the forward pass.
TRAINED: Final = 3


def macs_stem(spec: RunSpec) -> int:
    """Forward MACs of the stem for one example, without its auxiliary head."""
    return _macs(stem_plan(spec))


def macs_aux(spec: RunSpec) -> int:
    """Forward MACs of the stem's auxiliary head for one example."""
    return _macs(aux_plan(spec))


def macs_branch(spec: RunSpec, shard: ShardId) -> int:
    """Forward MACs of one task's branch for one example, without the stem's."""
    return _macs(branch_plan(spec, len(spec.task(shard).classes)))


def macs_dense(spec: RunSpec) -> int:
    """Forward MACs of the undivided network for one example."""
    return _macs(dense_plan(spec))


def training_macs(spec: RunSpec, shards: Iterable[ShardId]) -> int:
    """MACs of one training example in a lease: 3x what is trained and 1x what is only run forward.

    Args:
        shards: either the stem alone, or the tasks of a bundle.
    """
    shards = tuple(shards)
    if shards == (STEM,):
        return TRAINED * (macs_stem(spec) + macs_aux(spec))
    return macs_stem(spec) + TRAINED * sum(macs_branch(spec, shard) for shard in shards)


def offered_macs(spec: RunSpec, shards: Iterable[ShardId], labels: npt.NDArray[np.int64]) -> float:
    """MACs of a lease for each sample that it offers, in expectation.

    Args:
        shards: either the stem alone, or the tasks of a bundle.
        labels: those of the data, int64 [N]. The stem runs forward on what any branch trains on, and
            each branch trains on its own part (`training.BundleRows`).
    """
    shards = tuple(shards)
    if shards == (STEM,):
        return float(training_macs(spec, shards))
    branches = sum(
        macs_branch(spec, one) * Thinning.of(spec, [one]).trained_per_offered(labels) for one in shards
    )
    return macs_stem(spec) * Thinning.of(spec, shards).trained_per_offered(labels) + TRAINED * branches


def evaluation_macs(spec: RunSpec, shards: Iterable[ShardId]) -> int:
    """MACs of scoring one example with these shards, the stem's forward pass included."""
    return macs_stem(spec) + sum(head_macs(spec, shard) for shard in shards)


def head_macs(spec: RunSpec, shard: ShardId) -> int:
    """Forward MACs of what follows the stem for one example: of a branch, or of the stem's own head."""
    return macs_aux(spec) if shard == STEM else macs_branch(spec, shard)


def training_macs_dense(spec: RunSpec) -> int:
    """MACs of one training example in the undivided network."""
    return TRAINED * macs_dense(spec)


class MacCount:
    """MACs of training as they are spent."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._branch = {ShardId(task.id): macs_branch(spec, ShardId(task.id)) for task in spec.tasks}
        self._forward = macs_stem(spec)
        self.total = 0

    def branch(self, shard: ShardId, examples: int) -> None:
        """A branch has been trained on so many examples, without the stem's forward pass."""
        self.total += TRAINED * examples * self._branch[shard]

    def forward(self, examples: int) -> None:
        """The stem has been run forward."""
        self.total += examples * self._forward

    def stem(self, examples: int) -> None:
        """The stem and its head have been trained."""
        self.total += examples * training_macs(self._spec, (STEM,))


def _macs(plan: Plan) -> int:
    macs = sum(conv.kernel**2 * conv.inputs * conv.outputs * conv.height * conv.width for conv in plan.convs)
    if plan.head is None:
        return macs
    head = plan.head
    if not head.hidden:
        return macs + head.features * head.logits
    return macs + head.features * head.hidden + head.hidden * head.logits
