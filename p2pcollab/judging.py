"""Judging: is a contribution clearly worse than what it would replace, on this device's own examples?

A device tries the tensors that it has fetched on examples that nobody trains on, and compares the loss,
example by example, with that of the state that it would go on from without them. Honest leases make it
better most of the time and worse sometimes: at a high learning rate, or on data that are unlike this
device's. So there is a margin, and the mean must exceed it by more than chance explains.

A device builds on nothing that it refuses. That is its own affair: two devices may differ in it. Who makes
what is *gross*, so much worse that hardly an honest lease comes near it, is not relied on soon (`trust`).

A device can only judge what it has examples of. Without some of a task's own classes and some of others it
accepts what is within the bounds of `screen`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from .lease import Batches, autocast_for
from .run import STEM, RunSpec, ShardId
from .shards import restore_aux_head, restore_branch, restore_stem
from .training import local_labels
from .trust import Verdict

#: Examples of a task's own classes, and of others, that one contribution is tried on. The others weigh most,
#: nine tenths where there are ten tasks: with 160 of them in place of 64, standard errors were a quarter to a
#: third smaller.
OWN_MAX: Final = 64
OTHERS_MAX: Final = 192
#: With fewer of either, chance decides.
OWN_MIN: Final = 4
OTHERS_MIN: Final = 4
#: Part of its budget up to which a shard may be worse than guessing where nothing is to compare it with. In a
#: run on CIFAR-10, 6 of 106 honest contributions were clearly worse, all of them first leases.
EARLY: Final = 0.25
#: How much worse than the reference a contribution may be that a device builds on: so much, and this part of
#: its loss, beyond so many standard errors.
MARGIN: Final = 0.05
MARGIN_PART: Final = 0.1
ERRORS: Final = 2.5
#: For a stem: it brings the head that it is tried with, so that nothing has moved on under it.
STEM_MARGIN: Final = 0.02
STEM_MARGIN_PART: Final = 0.04
#: The same for what is gross.
GROSS_MARGIN: Final = 1.0
GROSS_MARGIN_PART: Final = 2.0
GROSS_ERRORS: Final = 4.0
#: Late work counts for little in a merge, so that it may be as much worse; but not for more than this many
#: times the margin.
LEAST_WEIGHT: Final = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """Examples that contributions to one shard are tried on."""

    #: Indices into the data.
    indices: npt.NDArray[np.intp]
    #: Of each, float64, in sum 1: the classes weigh as they do in the data.
    weights: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Mean losses of a contribution and of its reference on the same examples."""

    candidate: float
    reference: float
    #: Standard error of the difference of the two.
    error: float


def draw(
    spec: RunSpec,
    shard: ShardId,
    labels: npt.NDArray[np.int64],
    order: npt.NDArray[np.intp],
    class_counts: Sequence[int] | None = None,
) -> Sample | None:
    """Examples to try contributions to a shard on; None if these data cannot judge it.

    Many of the task's own classes, which are a tenth of the data where there are ten tasks: they are what
    tells a good branch from one that always says "other". For the stem, all classes alike.

    Args:
        labels: of this device's held-out examples.
        order: of these examples, a permutation: the first that fit are taken, so that the samples of all
            shards have as many examples in common as can be, whose features need to be computed only once.
        class_counts: of the device whose contribution it is: on classes that it has no examples of, its work
            may be worse. None: unknown.
    """
    usable = order
    if class_counts is not None and len(class_counts) == len(spec.classes) and any(class_counts):
        usable = order[np.asarray(class_counts)[labels[order]] > 0]
    if shard == STEM:
        chosen = usable[: OWN_MAX + OTHERS_MAX]
        if len(chosen) < OWN_MIN + OTHERS_MIN or len(np.unique(labels[chosen])) < 2:
            return None
        return Sample(chosen, np.full(len(chosen), 1 / len(chosen)))
    own = np.isin(labels[usable], spec.task(shard).classes)
    mine, others = usable[own], usable[~own]
    if len(mine) < OWN_MIN or len(others) < OTHERS_MIN:
        return None
    part = len(mine) / (len(mine) + len(others))
    mine, others = mine[:OWN_MAX], others[:OTHERS_MAX]
    weights = [np.full(len(mine), part / len(mine)), np.full(len(others), (1 - part) / len(others))]
    return Sample(np.concatenate([mine, others]), np.concatenate(weights))


def features_by_example(
    spec: RunSpec, stem_tensors: Mapping[str, Tensor], batches: Batches, *, device: torch.device | str = "cpu"
) -> Tensor:
    """What a stem makes of each image: [N, channels, height, width] in the arithmetic of training, on the
    device.
    """
    stem = restore_stem(spec, stem_tensors).frozen().to(device).to(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast_for(device, spec):
        made = [stem(images.to(device, memory_format=torch.channels_last)) for images, _ in batches]
    return torch.cat(made)


def losses_by_example(
    spec: RunSpec,
    shard: ShardId,
    tensors: Mapping[str, Tensor],
    features_N: Tensor,
    labels: npt.NDArray[np.int64],
    *,
    settled: bool = False,
) -> Tensor:
    """The loss of each example, as in training: of a branch over {own classes, "other"}. float64 [N].

    Args:
        tensors: of the branch, or of the stem, whose own head is tried.
        features_N: `features_by_example`; for the stem, of itself.
        settled: normalise by the statistics of these examples, not by the running ones of the tensors.
    """
    device = features_N.device
    if shard == STEM:
        head, targets = restore_aux_head(spec, tensors), torch.arange(len(spec.classes))
    else:
        head, targets = restore_branch(spec, spec.task(shard), tensors), local_labels(spec, shard)
    head.to(device).to(memory_format=torch.channels_last).eval()
    for module in head.modules():
        if settled and isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.inference_mode(), autocast_for(device, spec):
        logits = head(features_N).float().cpu()
    return functional.cross_entropy(logits, targets[torch.from_numpy(labels)], reduction="none").double()


def guesses(spec: RunSpec, shard: ShardId, labels: npt.NDArray[np.int64], sample: Sample) -> Tensor:
    """The loss of each example for who always gives the shares of the classes: float64 [N].

    A branch that has never seen the stem that it is tried on may be far worse than that, so the initial state
    is no reference.
    """
    targets = torch.arange(len(spec.classes)) if shard == STEM else local_labels(spec, shard)
    target_N = targets[torch.from_numpy(labels[sample.indices])]
    share_K = torch.zeros(int(targets.max()) + 1, dtype=torch.float64)
    share_K.index_add_(0, target_N, torch.from_numpy(sample.weights))
    return -share_K.log()[target_N]


def compare(candidate_N: Tensor, reference_N: Tensor, sample: Sample) -> Comparison:
    """The two mean losses, and how sure their difference is."""
    weight_N = torch.from_numpy(sample.weights)
    difference_N = candidate_N - reference_N
    mean = float((weight_N * difference_N).sum())
    spread = (weight_N * (difference_N - mean)).square().sum()
    return Comparison(
        candidate=float((weight_N * candidate_N).sum()),
        reference=float((weight_N * reference_N).sum()),
        error=float(spread.sqrt()),
    )


def is_gross(found: Comparison) -> bool:
    """Whether a contribution is so much worse that honest work hardly ever is."""
    return _worse(found, GROSS_MARGIN, GROSS_MARGIN_PART, GROSS_ERRORS)


def judge_loss(
    found: Comparison, weight: float, *, stem: bool = False, settled: Comparison | None = None
) -> Verdict | None:
    """Why a contribution is too bad to be built on, if it is, and whether grossly so.

    Args:
        weight: what it counts for in a merge against the reference, 0..1.
        stem: whether it is one, and no branch.
        settled: with statistics that do not hang on the last few batches, where the contribution's own may
            be far off though its weights are honest: it is gross only if it is so with these, too.
    """
    gross = is_gross(found) and (settled is None or is_gross(settled))
    weight = max(weight, LEAST_WEIGHT)
    margin, margin_part = (STEM_MARGIN, STEM_MARGIN_PART) if stem else (MARGIN, MARGIN_PART)
    if not gross and not _worse(found, margin / weight, margin_part / weight, ERRORS):
        return None
    return Verdict(
        reason=f"it is {'far ' if gross else ''}worse than what it would replace: a loss of "
        f"{found.candidate:.3g} instead of {found.reference:.3g} on this device's own examples",
        gross=gross,
    )


def _worse(found: Comparison, margin: float, margin_part: float, errors: float) -> bool:
    if not math.isfinite(found.candidate):
        return True
    if not math.isfinite(found.reference):
        return False
    excess = found.candidate - found.reference - errors * found.error
    return excess > margin + margin_part * found.reference
