"""From the branches' logits to scores of the classes, and the network of one device.

The score of class c is log p(c|x) under the softmax of its branch over {its classes, "other"}, or the
mean over its branches where tasks overlap. A class whose branches are all missing scores minus infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..run import RunSpec, ShardId
from .layers import Classifier, Stem


class ClassScores(nn.Module):
    """Logits of some branches, each [B, k + 1] -> log-probabilities per class [B, C]."""

    columns: Tensor
    holders: Tensor

    def __init__(self, spec: RunSpec, shards: Sequence[ShardId]) -> None:
        super().__init__()
        self.classes = len(spec.classes)
        columns = [index for shard in shards for index in spec.task(shard).classes]
        # Not persistent: a model's state is its shards' tensors and nothing else.
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        holders = torch.bincount(self.columns, minlength=self.classes)
        self.register_buffer("holders", holders.to(torch.float32), persistent=False)

    def forward(self, logits: Sequence[Tensor], images: Tensor) -> Tensor:
        total_BC = torch.zeros(len(images), self.classes, device=images.device)
        if logits:
            own = [branch.float().log_softmax(1)[:, :-1] for branch in logits]
            total_BC = total_BC.index_add(1, self.columns, torch.cat(own, dim=1))
        return torch.where(self.holders > 0, total_BC / self.holders.clamp(min=1), -torch.inf)


class ScoringNetwork(nn.Module):
    """A stem and what follows it: images [B, F, H, W] -> log-probabilities per class [B, C]."""

    def __init__(self, spec: RunSpec, stem: Stem, shards: Sequence[ShardId]) -> None:
        """
        Args:
            shards: the branches' tasks, in the order of their logits.
        """
        super().__init__()
        self.stem = stem
        self.scores = ClassScores(spec, shards)

    def branch_logits(self, features_BFHW: Tensor) -> Sequence[Tensor]:
        """Logits of each branch, [B, k + 1]."""
        raise NotImplementedError

    def forward(self, images_BFHW: Tensor) -> Tensor:
        features = self.stem(images_BFHW)
        scores_BC: Tensor = self.scores(self.branch_logits(features), images_BFHW)
        return scores_BC


class SubModel(ScoringNetwork):
    """Stem and some branches, one after the other.

    It shares the given modules. `GlobalModel` computes the same with grouped convolutions.
    """

    def __init__(
        self,
        spec: RunSpec,
        stem: Stem,
        branches: Mapping[ShardId, Classifier],
    ) -> None:
        super().__init__(spec, stem, tuple(branches))
        self.branches = nn.ModuleDict({str(shard): branch for shard, branch in branches.items()})

    def branch_logits(self, features_BFHW: Tensor) -> list[Tensor]:
        return [branch(features_BFHW) for branch in self.branches.values()]


def probabilities(scores_BC: Tensor) -> Tensor:
    """Log-probabilities per class, normalised across branches: rows sum to 1, classes without a branch get 0.

    A model without any branch knows nothing: all zeros.
    """
    return scores_BC.softmax(1).nan_to_num(0.0)
