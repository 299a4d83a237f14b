"""The loop that all training shares: some independent modules, each with its own progress and rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor, nn

from . import cost
from .errors import RunError
from .optimiser import MeanMomentumSGD, learning_rate
from .run import RunSpec, ShardId
from .shards import Momentum

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images float32 [B, F, H, W] and labels int64 [B]."""
OnStep = Callable[[int, Mapping[ShardId, float]], bool]
"""Called after each batch with the samples done and each shard's loss in it; False ends the lease early."""
Losses = Callable[[Tensor, Tensor], list[Tensor]]
"""Images and labels of a batch -> one loss for each module."""

#: A lease's loss is the mean over this last part of it.
_LOSS_TAIL: Final = 0.1
#: Below this many forward MACs per example of the dense network, bf16 is not worth its rounding. On one Zen 4
#: core, branches of digits (1.6 M) train 10 % slower in it, those of AlexNet (171 M) 1.3 to 1.4 times faster.
BF16_MACS_MIN: Final = 10_000_000


class Lease:
    """One lease's training of some modules that share no parameter."""

    def __init__(
        self,
        spec: RunSpec,
        modules: Mapping[ShardId, nn.Module],
        start_progress: Mapping[ShardId, float],
        samples: int,
        device: torch.device | str,
        batch_offered: int | None = None,
        momentum: Momentum | None = None,
    ) -> None:
        self.spec = spec
        self.shards = tuple(modules)
        #: Those that are a task's, not the stem or an undivided network.
        self.branches = {ShardId(task.id) for task in spec.tasks}.intersection(modules)
        self.start_progress = dict(start_progress)
        self.samples = samples
        self.batch_offered = batch_offered
        #: Examples trained on: fewer than were offered where batches are thinned.
        self.trained = 0
        self.device = torch.device(device)
        for module in modules.values():
            module.to(self.device).to(memory_format=torch.channels_last).train()
        self.optimizer = MeanMomentumSGD(spec.schedule, list(modules.values()), momentum)
        self.history: list[tuple[int, tuple[float, ...]]] = []

    def run(
        self,
        batches: Batches,
        losses: Losses,
        on_step: OnStep | None,
        autocast: AbstractContextManager[object],
    ) -> int:
        """Train until the samples or the batches end, or `on_step` says so; the samples that count."""
        done = 0
        for images, labels in batches:
            offered = self.batch_offered or len(labels)
            images = images.to(self.device, memory_format=torch.channels_last)
            labels = labels.to(self.device)
            with autocast:
                by_shard = losses(images, labels)
            values = tuple(torch.stack([loss.detach() for loss in by_shard]).tolist())
            if not all(map(math.isfinite, values)):
                raise RunError(
                    "training diverged: the loss is not finite", "start a run with a lower learning rate"
                )
            # The losses share no parameter, so one pass backward over their sum gives each its own gradient.
            self.optimizer.zero_grad()
            torch.autograd.backward(by_shard)
            self.optimizer.step(self._rates(done + offered / 2))
            done += offered
            self.trained += len(labels)
            self.history.append((len(labels), values))
            go_on = on_step is None or on_step(done, dict(zip(self.shards, values, strict=True)))
            if done >= self.samples or not go_on:
                break
        return done

    @property
    def momentum(self) -> Momentum:
        """Mean gradients by parameter, as they are now."""
        return self.optimizer.momentum

    def tail_losses(self) -> dict[ShardId, float]:
        """Mean losses over the last tenth of what was trained; 0 where nothing was."""
        wanted = _LOSS_TAIL * sum(size for size, _ in self.history)
        total, sums = 0, [0.0] * len(self.shards)
        for size, values in reversed(self.history):
            total += size
            sums = [value_sum + size * value for value_sum, value in zip(sums, values, strict=True)]
            if total >= wanted:
                break
        return {shard: value_sum / max(total, 1) for shard, value_sum in zip(self.shards, sums, strict=True)}

    def _rates(self, done: float) -> list[float]:
        """Learning rates in the middle of a batch, so that neither the first nor the last step is wasted."""
        return [
            learning_rate(
                self.spec.schedule,
                self.start_progress[shard] + done / self.spec.budget(shard),
                branch=shard in self.branches,
            )
            for shard in self.shards
        ]


def native_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies bf16 in hardware. Emulated, it is several times slower than fp32."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if torch.device(device).type != "cpu":
        return False
    # Private in PyTorch and not in every version of it; without an answer, fp32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def autocast_for(device: torch.device | str, spec: RunSpec) -> AbstractContextManager[object]:
    """Autocast to bf16 where it is native and the network large enough to gain; otherwise float32.

    The choice does not depend on the bundle, or branches trained together and apart would differ.
    """
    if cost.macs_dense(spec) < BF16_MACS_MIN or not native_bf16(device):
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
