"""The two building blocks of every network: a convolution stage, and a classifier made of stages and a head.

Shape legend: B examples, C classes, F channels, H x W pixels, G groups, K logits of one branch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .stages import ConvPlan, Plan


class MaxPool(nn.Module):
    """2x2 max-pool of stride 2: [B, F, H, W] -> [B, F, H // 2, W // 2].

    PyTorch's own notes where each maximum was, for the way back. Where there is none, two element-wise maxima
    give the same values, on a CPU in a third of the time.
    """

    def forward(self, features_BFHW: Tensor) -> Tensor:
        if features_BFHW.requires_grad:
            return functional.max_pool2d(features_BFHW, 2)
        height, width = features_BFHW.shape[-2] // 2 * 2, features_BFHW.shape[-1] // 2 * 2
        even = features_BFHW[..., :height, :width]
        rows = torch.maximum(even[..., ::2, :], even[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def to_grid(features_BFHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Averaged down to a map of this size, unless it has it already: that would cost as much."""
    if features_BFHW.shape[-2:] == grid:
        return features_BFHW
    return functional.adaptive_avg_pool2d(features_BFHW, grid)


class ConvStage(nn.Module):
    """Convolution, batch normalisation, ReLU, and a 2x2 max-pool where planned: [B, F, H, W] -> same."""

    def __init__(self, plan: ConvPlan, *, copies: int = 1, shared_input: bool = True) -> None:
        """With `copies` > 1 so many such stages beside each other, on one shared input or each on its own."""
        super().__init__()
        groups = 1 if shared_input else copies
        self.conv = nn.Conv2d(
            plan.inputs * groups,
            plan.outputs * copies,
            plan.kernel,
            padding=plan.kernel // 2,
            bias=False,
            groups=groups,
        )
        self.norm = nn.BatchNorm2d(plan.outputs * copies)
        self.pool = MaxPool() if plan.pool else nn.Identity()

    def forward(self, features_BFHW: Tensor) -> Tensor:
        # Pooling before ReLU gives the same values, and ReLU then has a quarter of the work.
        features: Tensor = self.pool(self.norm(self.conv(features_BFHW)))
        return features.relu()


class Stem(nn.Sequential):
    """The shared stages: images [B, F, H, W] -> feature maps."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(*(ConvStage(conv) for conv in plan.convs))

    def frozen(self) -> nn.Sequential:
        """The same function in evaluation, up to rounding, for whom this stem stays as it is.

        Batch normalisation is part of the convolutions' weights then: a device that trains a branch spends
        most of its time on the stem's forward pass, and a third of that on batch normalisation.
        """
        stem = copy.deepcopy(self).eval()
        return nn.Sequential(*(FrozenStage(stage) for stage in stem if isinstance(stage, ConvStage)))


class FrozenStage(nn.Module):
    """A convolution stage in evaluation mode, batch normalisation folded into a copy of its convolution.

    Source of the folding: Jacob et al. 2018, section 3.2.
    """

    def __init__(self, stage: ConvStage) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(stage.conv, stage.norm).requires_grad_(False)
        self.pool = stage.pool

    def forward(self, features_BFHW: Tensor) -> Tensor:
        features: Tensor = self.pool(self.conv(features_BFHW))
        return features.relu_()


class Classifier(nn.Module):
    """Stages, averaging to a grid, a hidden layer and logits: [B, F, H, W] -> [B, K].

    A branch, the stem's auxiliary head and the dense network are all of this form.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        head = plan.head
        assert head is not None
        self.stages = nn.Sequential(*(ConvStage(conv) for conv in plan.convs))
        self.grid = head.grid
        self.hidden = nn.Linear(head.features, head.hidden) if head.hidden else None
        self.head = nn.Linear(head.hidden or head.features, head.logits)

    def forward(self, features_BFHW: Tensor) -> Tensor:
        flat: Tensor = to_grid(self.stages(features_BFHW), self.grid).flatten(1)
        if self.hidden is not None:
            flat = self.hidden(flat).relu()
        logits_BK: Tensor = self.head(flat)
        return logits_BK
