"""Run specs and examples for the tests of networks and training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from p2pcollab.models import default_model
from p2pcollab.run import InputSpec, RunSpec, Schedule, TaskSpec

#: Family, channels, side of its usual input.
FAMILY_INPUTS: Final[tuple[tuple[str, Literal[1, 3], int], ...]] = (
    ("alexnet", 3, 32),
    ("vgg11", 3, 32),
    ("vgg16", 3, 32),
    ("digits", 1, 8),
)


def model_spec(
    family: str = "digits",
    *,
    channels: Literal[1, 3] = 1,
    height: int = 8,
    width: int = 8,
    tasks: Sequence[Sequence[int]] = ((0,), (1,), (2,), (3,)),
    seed: int = 0,
    schedule: Schedule | None = None,
    **divided: float | None,
) -> RunSpec:
    """A run of any family; `divided` overrides fields of the family's `ModelSpec`."""
    classes = max(max(task) for task in tasks) + 1
    return RunSpec(
        name="test",
        classes=tuple(f"class {index}" for index in range(classes)),
        tasks=tuple(TaskSpec(id=f"t{index}", classes=tuple(task)) for index, task in enumerate(tasks)),
        model=default_model(family).model_copy(update=divided),
        input=InputSpec(
            channels=channels,
            height=height,
            width=width,
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
            augment="none",
        ),
        schedule=schedule or Schedule(budget_samples=960, lease_samples=160, batch_size=16, peak_lr=0.05),
        seed=seed,
    )


def examples(
    spec: RunSpec, *, batches: int, seed: int = 0, size: int = 16
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of noisy images of one bright pattern per class: easy to learn, equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.input.channels, spec.input.height, spec.input.width)
    patterns = torch.randn(len(spec.classes), *shape, generator=torch.Generator().manual_seed(0))
    for _ in range(batches):
        labels = torch.randint(len(spec.classes), (size,), generator=generator)
        yield patterns[labels] + 0.7 * torch.randn(size, *shape, generator=generator), labels
