"""The optimiser of a lease, and its learning rate.

Optimiser state never travels, so every lease starts without momentum. Kept as a plain running sum,
momentum would make the first steps of a lease a tenth as long as the later ones; as a bias-corrected mean
of the gradients it has its full length of step from the first batch on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .run import Schedule


def learning_rate(schedule: Schedule, progress: float) -> float:
    """One cycle over a shard's progress in 0..1: a linear rise, then a cosine to 0."""
    if progress < schedule.warmup_fraction:
        return schedule.peak_lr * progress / schedule.warmup_fraction
    falling = (min(progress, 1.0) - schedule.warmup_fraction) / (1.0 - schedule.warmup_fraction)
    return schedule.peak_lr * 0.5 * (1.0 + math.cos(math.pi * falling))


class MeanMomentumSGD:
    """SGD along the bias-corrected exponential mean of the gradients; one learning rate per module.

    `peak_lr` has the meaning that it has for SGD with momentum m, whose steps are 1 / (1 - m) times as long.
    """

    def __init__(self, schedule: Schedule, modules: Sequence[nn.Module]) -> None:
        self.momentum = schedule.momentum
        self.steps = 0
        groups = []
        for module in modules:
            weights = [tensor for tensor in module.parameters() if tensor.ndim >= 2]
            vectors = [tensor for tensor in module.parameters() if tensor.ndim < 2]
            # Decaying batch norm's scales and the biases only costs accuracy.
            groups.append({"params": weights, "weight_decay": schedule.weight_decay})
            groups.append({"params": vectors, "weight_decay": 0.0})
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, rates: Sequence[float]) -> None:
        """Args: rates: one per module, in their order."""
        self.steps += 1
        keep = self._keep()
        for index, group in enumerate(self.optimizer.param_groups):
            group["momentum"] = group["dampening"] = keep
            group["lr"] = rates[index // 2] / (1.0 - self.momentum)
        self.optimizer.step()

    def _keep(self) -> float:
        """How much of the mean so far stays in it: a_t = m (1 - m^(t-1)) / (1 - m^t)."""
        m, t = self.momentum, self.steps
        if t == 1:
            # a_1 is 0, but PyTorch keeps no mean at momentum 0. With any other value it starts as
            # the gradient, which is the same.
            return m
        return m * (1.0 - m ** (t - 1)) / (1.0 - m**t)
