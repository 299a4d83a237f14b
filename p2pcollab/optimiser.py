"""The optimiser of a lease, and its learning rate.

Momentum travels with its shard from lease to lease: started anew in each, it costs points where leases are
short (docs/results/method-trials.md). It is kept as a mean of the gradients, bias-corrected where a shard is
new, so that steps have their full length from the first batch on. What comes from another device is a
direction and no more: it is cut to the length of the first gradient that is computed here, so that nobody
can throw a lease off with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .run import Schedule


def learning_rate(schedule: Schedule, progress: float, *, branch: bool = False) -> float:
    """One cycle over a shard's progress in 0..1: a linear rise, then a cosine to 0.

    Args:
        branch: the shard is one, not the stem, and may have a peak rate of its own.
    """
    peak = schedule.branch_lr if branch and schedule.branch_lr is not None else schedule.peak_lr
    if progress < schedule.warmup_fraction:
        return peak * progress / schedule.warmup_fraction
    falling = (min(progress, 1.0) - schedule.warmup_fraction) / (1.0 - schedule.warmup_fraction)
    return peak * 0.5 * (1.0 + math.cos(math.pi * falling))


class MeanMomentumSGD:
    """SGD along the bias-corrected exponential mean of the gradients; one learning rate per module.

    `peak_lr` has the meaning that it has for SGD with momentum m, whose steps are 1 / (1 - m) times as long.
    Written out, because making any `torch.optim` optimiser imports PyTorch's compiler: 1.1 s and 150 MB on
    every device, for a few lines of arithmetic.
    """

    def __init__(
        self,
        schedule: Schedule,
        modules: Sequence[nn.Module],
        momentum: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        """
        Args:
            momentum: mean gradients to go on with, by parameter; all zero, or none of a module: it is new.
        """
        self._momentum = schedule.momentum
        self._decay = schedule.weight_decay
        self._parameters: list[list[nn.Parameter]] = [list(module.parameters()) for module in modules]
        self._means: list[list[Tensor]] = [
            _brought(parameters, momentum or {}) for parameters in self._parameters
        ]
        self._brought = [bool(means) for means in self._means]
        self._steps = 0

    @property
    def momentum(self) -> dict[nn.Parameter, Tensor]:
        """Mean gradients by parameter; none before the first step."""
        return {
            parameter: mean
            for parameters, means in zip(self._parameters, self._means, strict=True)
            for parameter, mean in zip(parameters, means, strict=bool(means))
        }

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
        # How much of the mean so far stays in it: 0 in the first step of a new shard.
        corrected = m * (1.0 - m ** (t - 1)) / (1.0 - m**t)
        for index, (parameters, rate) in enumerate(zip(self._parameters, rates, strict=True)):
            gradients = [self._gradient(parameter) for parameter in parameters]
            means, brought = self._means[index], self._brought[index]
            if means and brought and t == 1:
                _cut_to_length(means, gradients)
            if means:
                torch._foreach_lerp_(means, gradients, 1.0 - (m if brought else corrected))
            else:
                self._means[index] = means = gradients
            weights: list[Tensor] = [*parameters]
            torch._foreach_add_(weights, means, alpha=-rate / (1.0 - m))

    def _gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        # Decaying batch norm's scales and the biases only costs accuracy.
        decay = self._decay if parameter.ndim >= 2 else 0.0
        return parameter.grad.add(parameter, alpha=decay)


@torch.no_grad()
def _brought(parameters: Sequence[nn.Parameter], momentum: Mapping[nn.Parameter, Tensor]) -> list[Tensor]:
    """Copies of a module's momentum, laid out as its parameters are; empty if it is new."""
    means = [
        torch.empty_like(parameter).copy_(momentum[parameter])
        for parameter in parameters
        if parameter in momentum
    ]
    return means if means and any(bool(mean.any()) for mean in means) else []


def _cut_to_length(means: list[Tensor], gradients: list[Tensor]) -> None:
    """Scale the means, together, to be at most as long as the gradients together."""
    longest, length = (
        float(torch.stack(torch._foreach_norm(tensors)).norm()) for tensors in (gradients, means)
    )
    if length > longest:
        torch._foreach_mul_(means, longest / length)
