"""One lease of training, and evaluation.

The loss of a branch is its own: cross-entropy over {its classes, "other"}. The stem under a bundle of
branches runs forward only, in evaluation mode, so branches never influence each other: trained together
or apart, on equal examples they become equal. The stem itself trains under an all-class head of its own.

Results depend on the tensors, the batches and the progress only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import cost
from .lease import Batches, Lease, OnStep, autocast_for
from .models.build import AUX_PREFIX, STEM_PREFIX
from .run import STEM, RunSpec, ShardId
from .shards import (
    ShardTensors,
    cut_branch,
    cut_stem,
    restore_aux_head,
    restore_branch,
    restore_momentum,
    restore_stem,
)

#: Batch normalisation has no variance to work with in one row.
_ROWS_MIN: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseResult:
    """What one lease made."""

    tensors: dict[ShardId, ShardTensors]
    #: Mean training loss over the last tenth of the samples.
    losses: dict[ShardId, float]
    samples: int
    #: MACs spent: 3x what was trained, 1x what was only run forward.
    macs: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardScore:
    """How good one shard is on validation data."""

    #: Mean loss, as in training: of a branch over {own classes, "other"}, of the stem over all classes.
    loss: float
    #: Branch: mean recall over {own classes, "other"}, so that a branch which always says "other" scores low.
    #: Stem: accuracy of its auxiliary head.
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of some shards on the same examples, and what they cost."""

    scores: dict[ShardId, ShardScore]
    samples: int
    macs: int


def train_stem(
    spec: RunSpec,
    tensors: Mapping[str, Tensor],
    batches: Batches,
    *,
    start_progress: float,
    samples: int,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LeaseResult:
    """Train the stem under its all-class head for one lease.

    Args:
        start_progress: the stem's progress when the lease begins, in 0..1.
        samples: ends the lease; it also ends when the batches do.

    Raises:
        RunError: training diverged.
    """
    stem, aux_head = restore_stem(spec, tensors), restore_aux_head(spec, tensors)
    lease = Lease(
        spec,
        {STEM: nn.Sequential(stem, aux_head)},
        {STEM: start_progress},
        samples,
        device,
        momentum=restore_momentum(tensors, {STEM_PREFIX: stem, AUX_PREFIX: aux_head}),
    )

    def losses(images: Tensor, labels: Tensor) -> list[Tensor]:
        return [functional.cross_entropy(aux_head(stem(images)).float(), labels)]

    started = clock()
    done = lease.run(batches, losses, on_step, autocast_for(device, spec))
    return LeaseResult(
        tensors={STEM: cut_stem(stem, aux_head, lease.momentum)},
        losses=lease.tail_losses(),
        samples=done,
        macs=lease.trained * cost.training_macs(spec, (STEM,)),
        seconds=clock() - started,
    )


def train_branches(
    spec: RunSpec,
    stem_tensors: Mapping[str, Tensor],
    branch_tensors: Mapping[ShardId, Mapping[str, Tensor]],
    batches: Batches,
    *,
    start_progress: Mapping[ShardId, float],
    samples: int,
    batch_offered: int | None = None,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LeaseResult:
    """Train a bundle of branches for one lease, on one stem that stays as it is.

    Args:
        start_progress: each branch's progress when the lease begins, in 0..1.
        samples: ends the lease; it also ends when the batches do.
        batch_offered: samples that each batch counts for, where batches are thinned (`data.Thinning`);
            None: as many as it holds.

    Raises:
        RunError: training diverged.
    """
    stem = restore_stem(spec, stem_tensors).frozen().to(device).to(memory_format=torch.channels_last)
    branches = {
        shard: restore_branch(spec, spec.task(shard), tensors) for shard, tensors in branch_tensors.items()
    }
    objectives = {shard: BranchObjective(spec, shard, device) for shard in branches}
    rows = {shard: BundleRows(spec, shard, branches, device) for shard in branches}
    spent = cost.MacCount(spec)
    momentum = {
        parameter: mean
        for shard, branch in branches.items()
        for parameter, mean in restore_momentum(branch_tensors[shard], {"": branch}).items()
    }
    lease = Lease(spec, branches, start_progress, samples, device, batch_offered, momentum)

    def losses(images: Tensor, labels: Tensor) -> list[Tensor]:
        with torch.no_grad():
            features = stem(images)
        spent.forward(len(labels))
        made = []
        for shard, branch in branches.items():
            own_features, own_labels = rows[shard](features, labels)
            made.append(objectives[shard](branch(own_features), own_labels))
            spent.branch(shard, len(own_labels))
        return made

    started = clock()
    done = lease.run(batches, losses, on_step, autocast_for(device, spec))
    return LeaseResult(
        tensors={shard: cut_branch(branch, lease.momentum) for shard, branch in branches.items()},
        losses=lease.tail_losses(),
        samples=done,
        macs=spent.total,
        seconds=clock() - started,
    )


class RowLots:
    """Draws by lot which rows of a batch a branch trains on; the same branch the same lots in every lease."""

    def __init__(self, spec: RunSpec, shard: ShardId) -> None:
        self._generator = torch.Generator().manual_seed(spec.seed + spec.shards.index(shard))

    def draw(self, kept_B: Tensor) -> Tensor:
        """Indices of rows, int64: each by its probability, and two at least if there are any two."""
        lots_B = torch.rand(len(kept_B), generator=self._generator).to(kept_B.device) / kept_B
        return lots_B.argsort()[: max(_ROWS_MIN, int((lots_B < 1.0).sum()))]


class BundleRows:
    """Which examples of a batch a branch trains on.

    A batch has the examples of all tasks of a bundle as often as their branches need them. To one of the
    branches the other tasks' are "other" like the rest, and it takes so many that they are as rare: what it
    learns, and costs, does not depend on what else is in its bundle.
    """

    def __init__(
        self, spec: RunSpec, shard: ShardId, bundle: Iterable[ShardId], device: torch.device | str
    ) -> None:
        """
        Args:
            bundle: all branches that are trained on the same batches.
        """
        beside = {index for other in bundle for index in spec.task(other).classes}
        beside -= set(spec.task(shard).classes)
        self._kept_C = torch.ones(len(spec.classes), device=device)
        self._kept_C[sorted(beside)] = spec.schedule.rarity
        self._whole = spec.schedule.rarity == 1.0 or not beside
        self._lots = RowLots(spec, shard)

    def __call__(self, features_BFHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the branch trains on, of the stem's features for a batch and the labels."""
        if self._whole:
            return features_BFHW, labels_B
        rows = self._lots.draw(self._kept_C[labels_B])
        return features_BFHW[rows], labels_B[rows]


class BranchObjective:
    """A branch's own loss: cross-entropy over {its classes, "other"}.

    Where examples of other classes are thinned, or own ones repeated, "other" is as much rarer in training.
    Its logit is trained with the logarithm of that fraction added, so that without it the branch gives the
    probabilities of the data as they are (the correction of sampled softmax, Jean et al. 2015).
    """

    def __init__(self, spec: RunSpec, shard: ShardId, device: torch.device | str) -> None:
        self._local_C = local_labels(spec, shard).to(device)
        self._shift_K = torch.zeros(len(spec.task(shard).classes) + 1, device=device)
        self._shift_K[-1] = math.log(spec.schedule.rarity)

    def __call__(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """The mean loss of a batch; labels are of the run's classes."""
        return functional.cross_entropy(logits_BK.float() + self._shift_K, self._local_C[labels_B])


def local_labels(spec: RunSpec, shard: ShardId) -> Tensor:
    """A branch's label for each class, int64 [C]: the place in its task, or the last for "other"."""
    classes = spec.task(shard).classes
    local_C = torch.full((len(spec.classes),), len(classes), dtype=torch.int64)
    local_C[list(classes)] = torch.arange(len(classes))
    return local_C


def log_probabilities(
    model: nn.Module, batches: Batches, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A model's outputs float32 [N, C] for the images, and the labels int64 [N], both on the CPU."""
    model = model.to(device).eval()
    outputs, targets = [], []
    with torch.inference_mode():
        for images, labels in batches:
            outputs.append(model(images.to(device)).float().cpu())
            targets.append(labels)
    return torch.cat(outputs), torch.cat(targets)


def accuracy(
    model: nn.Module,
    batches: Batches,
    device: torch.device | str = "cpu",
    autocast: AbstractContextManager[object] | None = None,
) -> float:
    """Fraction of the images whose highest score is their class's; 0 without images.

    Args:
        autocast: arithmetic to use, as in training (`lease.autocast_for`); None: float32.
    """
    right = total = 0
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    with torch.inference_mode(), autocast or nullcontext():
        for images, labels in batches:
            scores = model(images.to(device, memory_format=torch.channels_last))
            right += int((scores.argmax(1).cpu() == labels).sum())
            total += len(labels)
    return right / total if total else 0.0


def evaluate_shards(
    spec: RunSpec,
    stem_tensors: Mapping[str, Tensor],
    branch_tensors: Mapping[ShardId, Mapping[str, Tensor]],
    batches: Batches,
    *,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Score some branches on the same examples, with the stem's features computed once; or the stem alone.

    Without examples every score is 0, and the losses are too.
    """
    stem = restore_stem(spec, stem_tensors).frozen()
    heads = {
        shard: restore_branch(spec, spec.task(shard), tensors) for shard, tensors in branch_tensors.items()
    }
    targets = {shard: local_labels(spec, shard) for shard in branch_tensors}
    if not branch_tensors:
        heads, targets = {STEM: restore_aux_head(spec, stem_tensors)}, {STEM: torch.arange(len(spec.classes))}
    for module in (stem, *heads.values()):
        module.to(device).to(memory_format=torch.channels_last).eval()
    logits: dict[ShardId, list[Tensor]] = {shard: [] for shard in heads}
    labels: list[Tensor] = []
    with torch.inference_mode(), autocast_for(device, spec):
        for images, batch_labels in batches:
            features = stem(images.to(device, memory_format=torch.channels_last))
            for shard, head in heads.items():
                logits[shard].append(head(features).float().cpu())
            labels.append(batch_labels)
    if not labels:
        return Evaluation(
            scores={shard: ShardScore(loss=0.0, accuracy=0.0) for shard in heads}, samples=0, macs=0
        )
    all_labels = torch.cat(labels)
    scores = {
        shard: _score(torch.cat(logits[shard]), targets[shard][all_labels], balanced=shard != STEM)
        for shard in heads
    }
    return Evaluation(
        scores=scores, samples=len(all_labels), macs=len(all_labels) * cost.evaluation_macs(spec, heads)
    )


def _score(logits_NK: Tensor, targets_N: Tensor, *, balanced: bool) -> ShardScore:
    loss = float(functional.cross_entropy(logits_NK, targets_N))
    right_N = (logits_NK.argmax(1) == targets_N).float()
    if not balanced:
        return ShardScore(loss=loss, accuracy=float(right_N.mean()))
    present = [targets_N == label for label in range(logits_NK.shape[1])]
    recalls = [right_N[those].mean() for those in present if bool(those.any())]
    return ShardScore(loss=loss, accuracy=float(torch.stack(recalls).mean()))
