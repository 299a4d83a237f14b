"""The global model: stem and all branches as a single network with grouped convolutions.

The weights are the branches' own, concatenated along the output channels, so the scores are those of
`SubModel` up to the rounding of another order of summation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..run import RunSpec, ShardId
from .build import filled
from .layers import Classifier, ConvStage, Stem, to_grid
from .stages import branch_plan
from .submodel import ScoringNetwork


class GroupedBranches(nn.Module):
    """Branches beside each other: features [B, F, H, W] -> logits per branch, each [B, k + 1].

    Heads stay apart, because tasks may differ in their number of classes; all before them is of one shape.
    """

    def __init__(self, spec: RunSpec, branches: Sequence[Classifier]) -> None:
        super().__init__()
        plan = branch_plan(spec, 1)
        assert branches and plan.head is not None
        self.copies = len(branches)
        with torch.device("meta"):
            stages = nn.Sequential(
                *(
                    ConvStage(conv, copies=self.copies, shared_input=index == 0)
                    for index, conv in enumerate(plan.convs)
                )
            )
        states = [branch.stages.state_dict() for branch in branches]
        self.stages = filled(stages, {name: _beside([state[name] for state in states]) for name in states[0]})
        self.shared = not plan.convs
        self.grid = plan.head.grid
        hidden = [branch.hidden for branch in branches if branch.hidden is not None]
        self.hidden_weight_GKF = nn.Parameter(torch.stack([layer.weight.detach() for layer in hidden]))
        self.hidden_bias_GK = nn.Parameter(torch.stack([layer.bias.detach() for layer in hidden]))
        self.heads = nn.ModuleList(copy.deepcopy(branch.head) for branch in branches)

    def forward(self, features_BFHW: Tensor) -> list[Tensor]:
        maps = to_grid(self.stages(features_BFHW), self.grid)
        if self.shared:
            flat_GBF = maps.flatten(1).expand(self.copies, -1, -1)
        else:
            features = maps.shape[1:].numel() // self.copies
            flat_GBF = maps.reshape(len(maps), self.copies, features).transpose(0, 1)
        hidden_GBK = torch.baddbmm(
            self.hidden_bias_GK.unsqueeze(1), flat_GBF, self.hidden_weight_GKF.transpose(1, 2)
        ).relu()
        return [head(hidden_BK) for head, hidden_BK in zip(self.heads, hidden_GBK, strict=True)]


class GlobalModel(ScoringNetwork):
    """Stem and branches as one network.

    Copies the given modules' values. Branches may be missing: their classes score minus infinity.
    """

    def __init__(
        self,
        spec: RunSpec,
        stem: Stem,
        branches: Mapping[ShardId, Classifier],
    ) -> None:
        super().__init__(spec, copy.deepcopy(stem), tuple(branches))
        self.branches = GroupedBranches(spec, tuple(branches.values())) if branches else None

    def branch_logits(self, features_BFHW: Tensor) -> list[Tensor]:
        return self.branches(features_BFHW) if self.branches is not None else []


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenated along the channels; counters, which all advance together, by their maximum."""
    return torch.cat(list(tensors)) if tensors[0].ndim else torch.stack(list(tensors)).amax(0)
