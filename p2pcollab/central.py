"""Central training, to compare with: what the collaboration gives up is told apart in three steps.

(A) the dense network under one softmax; (B) the grouped network, which is what is assembled, trained as a
whole under one softmax; (C) the grouped network with the decoupled losses, on all the data in one place.
A - B is the price of grouping, B - C that of the losses; what is assembled from devices falls short of C by
the price of decentralisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import cost
from .lease import Batches, Lease, OnStep, autocast_for
from .models.build import build_aux_head, build_branch, build_dense, build_stem
from .models.layers import Classifier, Stem
from .models.submodel import SubModel
from .run import STEM, RunSpec, ShardId
from .training import BranchObjective, RowLots

#: The undivided network's name in `on_step`.
DENSE: Final = ShardId("dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class Central:
    """A network that was trained in one place, in evaluation mode, and the MACs that it took."""

    model: nn.Module
    macs: int


def train_dense(
    spec: RunSpec,
    batches: Batches,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Central:
    """(A): train the undivided network for the run's whole budget.

    Raises:
        RunError: training diverged.
    """
    dense = build_dense(spec)
    lease = _whole(spec, dense, device)

    def losses(images: Tensor, labels: Tensor) -> list[Tensor]:
        return [functional.cross_entropy(dense(images).float(), labels)]

    lease.run(batches, losses, on_step, autocast_for(device, spec))
    return Central(model=dense.eval(), macs=lease.trained * cost.training_macs_dense(spec))


def train_grouped(
    spec: RunSpec,
    batches: Batches,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Central:
    """(B): train stem and branches as one network under one softmax for the run's whole budget.

    Raises:
        RunError: training diverged.
    """
    model = _Joint(spec, build_stem(spec), _branches(spec))
    lease = _whole(spec, model, device)

    def losses(images: Tensor, labels: Tensor) -> list[Tensor]:
        return [functional.cross_entropy(model(images).float(), labels)]

    lease.run(batches, losses, on_step, autocast_for(device, spec))
    per_sample = cost.TRAINED * (
        cost.macs_stem(spec) + sum(cost.macs_branch(spec, ShardId(task.id)) for task in spec.tasks)
    )
    return Central(model=model.eval(), macs=lease.trained * per_sample)


def train_decoupled(
    spec: RunSpec,
    batches: Batches,
    *,
    repeats: Sequence[Batches] = (),
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Central:
    """(C): train the stem under its own head and each branch under its own loss, side by side.

    As in the run, branches see the stem in evaluation mode, the stem is sealed on the way, and examples of
    other classes are thinned.

    Args:
        repeats: where branches train on their own examples more than once in a pass (`Schedule.positives`),
            the batches of each further time.

    Raises:
        RunError: training diverged.
    """
    stem, aux_head = build_stem(spec), build_aux_head(spec)
    branches = _branches(spec)
    objectives = {shard: BranchObjective(spec, shard, device) for shard in branches}
    thinned = {shard: _Thinned(spec, shard, device) for shard in branches}
    source, further = iter(batches), [iter(one) for one in repeats]
    seal, budget = spec.budget(STEM), spec.schedule.budget_samples
    modules: dict[ShardId, nn.Module] = {STEM: nn.Sequential(stem, aux_head), **branches}
    macs = cost.MacCount(spec)

    def of_branches(images: Tensor, labels: Tensor) -> list[Tensor]:
        offered = len(labels)
        for more_images, more_labels in [next(one) for one in further]:
            images = torch.cat([images, more_images.to(device, memory_format=torch.channels_last)])
            labels = torch.cat([labels, more_labels.to(device)])
        stem.eval()
        with torch.no_grad():
            features = stem(images)
        stem.train()
        losses = []
        for shard, branch in branches.items():
            rows = thinned[shard].rows(labels, offered)
            macs.branch(shard, len(rows))
            losses.append(objectives[shard](branch(features[rows]), labels[rows]))
        macs.forward(len(labels))
        return losses

    def of_all(images: Tensor, labels: Tensor) -> list[Tensor]:
        others = of_branches(images, labels)
        macs.stem(len(labels))
        return [functional.cross_entropy(aux_head(stem(images)).float(), labels), *others]

    first = Lease(spec, modules, dict.fromkeys(modules, 0.0), min(seal, budget), device)
    done = first.run(source, of_all, on_step, autocast_for(device, spec))
    if done < budget:
        second = Lease(spec, branches, dict.fromkeys(branches, done / budget), budget - done, device)
        second.run(source, of_branches, on_step, autocast_for(device, spec))
    return Central(model=SubModel(spec, stem, branches).eval(), macs=macs.total)


class _Thinned:
    """Chooses the rows of a batch that a branch trains on: its own examples, and some others.

    Of further batches, for examples that are trained on more than once, only own ones.
    """

    def __init__(self, spec: RunSpec, shard: ShardId, device: torch.device | str) -> None:
        self._whole = spec.schedule.rarity == 1.0
        self._own_C = torch.zeros(len(spec.classes), device=device)
        self._own_C[list(spec.task(shard).classes)] = 1.0
        self._kept_C = self._own_C.clamp(min=spec.schedule.negatives)
        self._lots = RowLots(spec, shard)

    def rows(self, labels: Tensor, offered: int) -> Tensor:
        """Indices into the batch and its further ones, int64.

        Args:
            offered: size of the batch without the further ones.
        """
        if self._whole:
            return torch.arange(offered, device=labels.device)
        first, further = labels[:offered], labels[offered:]
        return self._lots.draw(torch.cat([self._kept_C[first], self._own_C[further]]))


class _Joint(nn.Module):
    """Stem and branches under one softmax: images [B, F, H, W] -> logits [B, C]. "Other" is left out."""

    columns: Tensor

    def __init__(self, spec: RunSpec, stem: Stem, branches: Mapping[ShardId, Classifier]) -> None:
        super().__init__()
        self.stem = stem
        self.branches = nn.ModuleList(branches.values())
        columns = [index for shard in branches for index in spec.task(shard).classes]
        self.classes = len(spec.classes)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, images_BFHW: Tensor) -> Tensor:
        features = self.stem(images_BFHW)
        own = torch.cat([branch(features)[:, :-1].float() for branch in self.branches], dim=1)
        return own.new_zeros(len(own), self.classes).index_add(1, self.columns, own)


def _branches(spec: RunSpec) -> dict[ShardId, Classifier]:
    return {ShardId(task.id): build_branch(spec, task) for task in spec.tasks}


def _whole(spec: RunSpec, module: nn.Module, device: torch.device | str) -> Lease:
    return Lease(spec, {DENSE: module}, {DENSE: 0.0}, spec.schedule.budget_samples, device)
