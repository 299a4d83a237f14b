"""The optimiser of a lease, and its learning rate.

Optimiser state never travels, so every lease starts without momentum. Kept as a plain running sum,
momentum would make the first steps of a lease a tenth as long as the later ones; as a bias-corrected mean
of the gradients it has its full length of step from the first batch on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
    Written out, because making any `torch.optim` optimiser imports PyTorch's compiler: 1.1 s and 150 MB on
    every device, for a few lines of arithmetic.
    """

    def __init__(self, schedule: Schedule, modules: Sequence[nn.Module]) -> None:
        self._momentum = schedule.momentum
        self._decay = schedule.weight_decay
        self._parameters: list[list[Tensor]] = [list(module.parameters()) for module in modules]
        self._means: list[list[Tensor]] = [[] for _ in modules]
        self._steps = 0

    def zero_grad(self) -> None:
        """Forget the gradients of the last batch."""
        for parameters in self._parameters:
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Args: rates: one per module, in their order."""
        self._steps += 1
        m, t = self._momentum, self._steps
        # How much of the mean so far stays in it: 0 in the first step.
        keep = m * (1.0 - m ** (t - 1)) / (1.0 - m**t)
        for index, (parameters, rate) in enumerate(zip(self._parameters, rates, strict=True)):
            gradients = [self._gradient(parameter) for parameter in parameters]
            means = self._means[index]
            if means:
                torch._foreach_lerp_(means, gradients, 1.0 - keep)
            else:
                self._means[index] = means = gradients
            torch._foreach_add_(parameters, means, alpha=-rate / (1.0 - m))

    def _gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        # Decaying batch norm's scales and the biases only costs accuracy.
        decay = self._decay if parameter.ndim >= 2 else 0.0
        return parameter.grad.add(parameter, alpha=decay)
