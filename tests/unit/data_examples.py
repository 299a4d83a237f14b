"""Small runs and class folders for the tests of `p2pcollab.data`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from p2pcollab.run import InputSpec, ModelSpec, RunSpec, Schedule, TaskSpec


def run_spec(
    classes: tuple[str, ...] = ("cat", "dog"),
    *,
    channels: int = 3,
    size: int = 16,
    batch_size: int = 8,
    augment: str = "none",
) -> RunSpec:
    """A run with one task per class and inputs of `size` x `size`, normalised from 0..1 to -1..1."""
    return RunSpec(
        name="example",
        classes=classes,
        tasks=tuple(TaskSpec(id=f"t{index}", classes=(index,)) for index in range(len(classes))),
        model=ModelSpec(family="alexnet", stem_stages=1, branch_width=0.25),
        input=InputSpec.model_validate(
            {
                "channels": channels,
                "height": size,
                "width": size,
                "mean": (0.5,) * channels,
                "std": (0.5,) * channels,
                "augment": augment,
            }
        ),
        schedule=Schedule(budget_samples=100, lease_samples=10, batch_size=batch_size, peak_lr=0.1),
        seed=3,
    )


def write_image(path: Path, *, shade: int = 100, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Path:
    """An image of one shade, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, shade // 2, 255 - shade)).save(path)
    return path


def write_classes(root: Path, **counts: int) -> Path:
    """Class folders with so many images each; the red channel of an image is its number."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(root / name / f"{number:03}.png", shade=number)
    return root


def numbers(images: np.ndarray) -> list[int]:
    """The numbers of images that `write_classes` made."""
    return sorted(images[:, 0, 0, 0].tolist())
