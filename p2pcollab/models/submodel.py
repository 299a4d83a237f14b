"""From the branches' logits to scores of the classes, and the network of one device.

The score of class c is log p(c|x) under the softmax of its branch over {its classes, "other"}, or the
mean over its branches where tasks overlap. Where the stem's own head has a vote (`ModelSpec.stem_vote`), its
log-probability is one more, of that weight: the head was trained for the stem's sake, and costs nothing more.
A class whose branches are all missing scores minus infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..run import RunSpec, ShardId
from .layers import Classifier, Stem


class ClassScores(nn.Module):
    """Logits of some branches, each [B, k + 1] -> log-probabilities per class [B, C].

    Logits [B, C] of the stem's own head, if they are given, count with the weight `vote`.
    """

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
        self.vote = spec.model.stem_vote or 0.0

    def forward(self, logits: Sequence[Tensor], images: Tensor, of_stem: Tensor | None = None) -> Tensor:
        total_BC = torch.zeros(len(images), self.classes, device=images.device)
        if logits:
            own = [branch.float().log_softmax(1)[:, :-1] for branch in logits]
            total_BC = total_BC.index_add(1, self.columns, torch.cat(own, dim=1))
        voters = self.holders.clamp(min=1)
        if of_stem is not None:
            total_BC = total_BC + self.vote * of_stem.float().log_softmax(1)
            voters = voters + self.vote
        return torch.where(self.holders > 0, total_BC / voters, -torch.inf)


class SubModel(nn.Module):
    """Stem and some branches, one after the other: images [B, F, H, W] -> log-probabilities [B, C].

    It shares the given modules. `GlobalModel` computes the same with grouped convolutions.
    """

    def __init__(
        self,
        spec: RunSpec,
        stem: Stem,
        branches: Mapping[ShardId, Classifier],
        aux_head: Classifier | None = None,
    ) -> None:
        """
        Args:
            aux_head: the stem's own, where it has a vote.
        """
        super().__init__()
        self.stem = stem
        self.aux_head = voting_head(spec, aux_head)
        self.branches = nn.ModuleDict({str(shard): branch for shard, branch in branches.items()})
        self.scores = ClassScores(spec, tuple(branches))

    def forward(self, images_BFHW: Tensor) -> Tensor:
        features = self.stem(images_BFHW)
        of_stem = self.aux_head(features) if self.aux_head is not None else None
        logits = [branch(features) for branch in self.branches.values()]
        scores_BC: Tensor = self.scores(logits, images_BFHW, of_stem)
        return scores_BC


def voting_head(spec: RunSpec, aux_head: Classifier | None) -> Classifier | None:
    """The stem's own head, if it has a vote.

    Raises:
        ValueError: it has one, and there is no head.
    """
    if spec.model.stem_vote is None:
        return None
    if aux_head is None:
        raise ValueError("the stem's own head has a vote, and is missing")
    return aux_head


def probabilities(scores_BC: Tensor) -> Tensor:
    """Log-probabilities per class, normalised across branches: rows sum to 1, classes without a branch get 0.

    A model without any branch knows nothing: all zeros.
    """
    return scores_BC.softmax(1).nan_to_num(0.0)
