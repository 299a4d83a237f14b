"""One lease of training, and evaluation.

The loss of a branch is its own: cross-entropy over {its classes, "other"}. The stem under a bundle of
branches runs forward only, in evaluation mode, so branches never influence each other: trained together
or apart, on equal batches they become equal. The stem itself trains under an all-class head of its own.

Results depend on the tensors, the batches and the progress only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import cost
from .errors import RunError
from .models.build import build_dense
from .models.layers import Classifier
from .optimiser import MeanMomentumSGD, learning_rate
from .run import STEM, RunSpec, ShardId
from .shards import ShardTensors, cut_branch, cut_stem, restore_aux_head, restore_branch, restore_stem

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images float32 [B, F, H, W] and labels int64 [B]."""
OnStep = Callable[[int, Mapping[ShardId, float]], bool]
"""Called after each batch with the samples done and each shard's loss in it; False ends the lease early."""

#: The dense network's name in `on_step`.
DENSE: Final = ShardId("dense")
#: A lease's loss is the mean over this last part of it.
_LOSS_TAIL: Final = 0.1
#: Below this many forward MACs per example of the dense network, bf16 is not worth its rounding. On one Zen 4
#: core, branches of digits (1.6 M) train 10 % slower in it, those of AlexNet (171 M) 1.3 to 1.4 times faster.
BF16_MACS_MIN: Final = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseResult:
    """What one lease made."""

    tensors: dict[ShardId, ShardTensors]
    #: Mean training loss over the last tenth of the samples.
    losses: dict[ShardId, float]
    samples: int
    #: MACs spent: 3x what was trained, 1x what was only run forward.
    macs: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardScore:
    """How good one shard is on validation data."""

    #: Mean loss, as in training: of a branch over {own classes, "other"}, of the stem over all classes.
    loss: float
    #: Branch: mean recall over {own classes, "other"}, so that a branch which always says "other" scores low.
    #: Stem: accuracy of its auxiliary head.
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of some shards on the same examples, and what they cost."""

    scores: dict[ShardId, ShardScore]
    samples: int
    macs: int


def train_stem(
    spec: RunSpec,
    tensors: Mapping[str, Tensor],
    batches: Batches,
    *,
    start_progress: float,
    samples: int,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LeaseResult:
    """Train the stem under its all-class head for one lease.

    Args:
        start_progress: the stem's progress when the lease begins, in 0..1.
        samples: ends the lease; it also ends when the batches do.

    Raises:
        RunError: training diverged.
    """
    stem, aux_head = restore_stem(spec, tensors), restore_aux_head(spec, tensors)
    lease = _Lease(spec, {STEM: nn.Sequential(stem, aux_head)}, {STEM: start_progress}, samples, device)

    def losses(images: Tensor, labels: Tensor) -> list[Tensor]:
        return [functional.cross_entropy(aux_head(stem(images)).float(), labels)]

    started = clock()
    done = lease.run(batches, losses, on_step, autocast_for(device, spec))
    return LeaseResult(
        tensors={STEM: cut_stem(stem, aux_head)},
        losses=lease.tail_losses(),
        samples=done,
        macs=done * cost.training_macs(spec, (STEM,)),
        seconds=clock() - started,
    )


def train_branches(
    spec: RunSpec,
    stem_tensors: Mapping[str, Tensor],
    branch_tensors: Mapping[ShardId, Mapping[str, Tensor]],
    batches: Batches,
    *,
    start_progress: Mapping[ShardId, float],
    samples: int,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LeaseResult:
    """Train a bundle of branches for one lease, on one stem that stays as it is.

    Args:
        start_progress: each branch's progress when the lease begins, in 0..1.
        samples: ends the lease; it also ends when the batches do.

    Raises:
        RunError: training diverged.
    """
    stem = restore_stem(spec, stem_tensors).to(device).to(memory_format=torch.channels_last).eval()
    branches = {
        shard: restore_branch(spec, spec.task(shard), tensors) for shard, tensors in branch_tensors.items()
    }
    local = {shard: local_labels(spec, shard).to(device) for shard in branches}
    lease = _Lease(spec, branches, start_progress, samples, device)

    def losses(images: Tensor, labels: Tensor) -> list[Tensor]:
        with torch.no_grad():
            features = stem(images)
        return [
            functional.cross_entropy(branch(features).float(), local[shard][labels])
            for shard, branch in branches.items()
        ]

    started = clock()
    done = lease.run(batches, losses, on_step, autocast_for(device, spec))
    return LeaseResult(
        tensors={shard: cut_branch(branch) for shard, branch in branches.items()},
        losses=lease.tail_losses(),
        samples=done,
        macs=done * cost.training_macs(spec, branches),
        seconds=clock() - started,
    )


def train_dense(
    spec: RunSpec,
    batches: Batches,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> tuple[Classifier, int]:
    """Train the undivided network for the run's whole budget, the central baseline; it, and the MACs spent.

    Raises:
        RunError: training diverged.
    """
    dense = build_dense(spec)
    lease = _Lease(spec, {DENSE: dense}, {DENSE: 0.0}, spec.schedule.budget_samples, device)

    def losses(images: Tensor, labels: Tensor) -> list[Tensor]:
        return [functional.cross_entropy(dense(images).float(), labels)]

    done = lease.run(batches, losses, on_step, autocast_for(device, spec))
    return dense.eval(), done * cost.training_macs_dense(spec)


def local_labels(spec: RunSpec, shard: ShardId) -> Tensor:
    """A branch's label for each class, int64 [C]: the place in its task, or the last for "other"."""
    classes = spec.task(shard).classes
    local_C = torch.full((len(spec.classes),), len(classes), dtype=torch.int64)
    local_C[list(classes)] = torch.arange(len(classes))
    return local_C


def log_probabilities(
    model: nn.Module, batches: Batches, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A model's outputs float32 [N, C] for the images, and the labels int64 [N], both on the CPU."""
    model = model.to(device).eval()
    outputs, targets = [], []
    with torch.inference_mode():
        for images, labels in batches:
            outputs.append(model(images.to(device)).float().cpu())
            targets.append(labels)
    return torch.cat(outputs), torch.cat(targets)


def accuracy(model: nn.Module, batches: Batches, device: torch.device | str = "cpu") -> float:
    """Fraction of the images whose highest score is their class's; 0 without images."""
    right = total = 0
    model = model.to(device).eval()
    with torch.inference_mode():
        for images, labels in batches:
            right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return right / total if total else 0.0


def evaluate_shards(
    spec: RunSpec,
    stem_tensors: Mapping[str, Tensor],
    branch_tensors: Mapping[ShardId, Mapping[str, Tensor]],
    batches: Batches,
    *,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Score some branches on the same examples, with the stem's features computed once; or the stem alone.

    Without examples every score is 0, and the losses are too.
    """
    stem = restore_stem(spec, stem_tensors).to(device).eval()
    heads = {
        shard: restore_branch(spec, spec.task(shard), tensors) for shard, tensors in branch_tensors.items()
    }
    targets = {shard: local_labels(spec, shard) for shard in branch_tensors}
    if not branch_tensors:
        heads, targets = {STEM: restore_aux_head(spec, stem_tensors)}, {STEM: torch.arange(len(spec.classes))}
    for head in heads.values():
        head.to(device).eval()
    logits: dict[ShardId, list[Tensor]] = {shard: [] for shard in heads}
    labels: list[Tensor] = []
    with torch.inference_mode():
        for images, batch_labels in batches:
            features = stem(images.to(device))
            for shard, head in heads.items():
                logits[shard].append(head(features).float().cpu())
            labels.append(batch_labels)
    if not labels:
        return Evaluation(
            scores={shard: ShardScore(loss=0.0, accuracy=0.0) for shard in heads}, samples=0, macs=0
        )
    all_labels = torch.cat(labels)
    scores = {
        shard: _score(torch.cat(logits[shard]), targets[shard][all_labels], balanced=shard != STEM)
        for shard in heads
    }
    return Evaluation(
        scores=scores, samples=len(all_labels), macs=len(all_labels) * cost.evaluation_macs(spec, heads)
    )


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


class _Lease:
    """The loop that all training shares: some independent modules, each with its own progress and rate."""

    def __init__(
        self,
        spec: RunSpec,
        modules: Mapping[ShardId, nn.Module],
        start_progress: Mapping[ShardId, float],
        samples: int,
        device: torch.device | str,
    ) -> None:
        self.spec = spec
        self.shards = tuple(modules)
        self.start_progress = dict(start_progress)
        self.samples = samples
        self.device = torch.device(device)
        for module in modules.values():
            module.to(self.device).to(memory_format=torch.channels_last).train()
        self.optimizer = MeanMomentumSGD(spec.schedule, list(modules.values()))
        self.history: list[tuple[int, tuple[float, ...]]] = []

    def run(
        self,
        batches: Batches,
        losses: Callable[[Tensor, Tensor], list[Tensor]],
        on_step: OnStep | None,
        autocast: AbstractContextManager[object],
    ) -> int:
        """Train until the samples or the batches end, or `on_step` says so; the samples trained."""
        done = 0
        for images, labels in batches:
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
            self.optimizer.step(self._rates(done + len(labels) / 2))
            done += len(labels)
            self.history.append((len(labels), values))
            go_on = on_step is None or on_step(done, dict(zip(self.shards, values, strict=True)))
            if done >= self.samples or not go_on:
                break
        return done

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
            learning_rate(self.spec.schedule, self.start_progress[shard] + done / self.spec.budget(shard))
            for shard in self.shards
        ]


def _score(logits_NK: Tensor, targets_N: Tensor, *, balanced: bool) -> ShardScore:
    loss = float(functional.cross_entropy(logits_NK, targets_N))
    right_N = (logits_NK.argmax(1) == targets_N).float()
    if not balanced:
        return ShardScore(loss=loss, accuracy=float(right_N.mean()))
    present = [targets_N == label for label in range(logits_NK.shape[1])]
    recalls = [right_N[those].mean() for those in present if bool(those.any())]
    return ShardScore(loss=loss, accuracy=float(torch.stack(recalls).mean()))
