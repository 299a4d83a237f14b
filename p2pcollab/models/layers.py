"""The two building blocks of every network: a convolution stage, and a classifier made of stages and a head.

Shape legend: B examples, C classes, F channels, H x W pixels, G groups, K logits of one branch.
"""

from __future__ import annotations

from torch import Tensor, nn

from .stages import ConvPlan, Plan


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
        self.pool = nn.MaxPool2d(2) if plan.pool else nn.Identity()

    def forward(self, features_BFHW: Tensor) -> Tensor:
        # Pooling before ReLU gives the same values, and ReLU then has a quarter of the work.
        features: Tensor = self.pool(self.norm(self.conv(features_BFHW)))
        return features.relu()


class Stem(nn.Sequential):
    """The shared stages: images [B, F, H, W] -> feature maps."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(*(ConvStage(conv) for conv in plan.convs))


class Classifier(nn.Module):
    """Stages, averaging to a grid, a hidden layer and logits: [B, F, H, W] -> [B, K].

    A branch, the stem's auxiliary head and the dense network are all of this form.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        head = plan.head
        assert head is not None
        self.stages = nn.Sequential(*(ConvStage(conv) for conv in plan.convs))
        self.grid = nn.AdaptiveAvgPool2d(head.grid)
        self.hidden = nn.Linear(head.features, head.hidden) if head.hidden else None
        self.head = nn.Linear(head.hidden or head.features, head.logits)

    def forward(self, features_BFHW: Tensor) -> Tensor:
        flat: Tensor = self.grid(self.stages(features_BFHW)).flatten(1)
        if self.hidden is not None:
            flat = self.hidden(flat).relu()
        logits_BK: Tensor = self.head(flat)
        return logits_BK
