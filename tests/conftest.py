"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Networks of tests are small: more threads only wait for each other, for minutes where the cores are busy.
torch.set_num_threads(1)
# A deadline asserts a timing, which a busy machine breaks.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

HERE = Path(__file__).parent
#: Their tests start processes that mean to have their network to themselves, so each folder is one group.
ONE_AFTER_THE_OTHER = ("node", "netns")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name what stays in one process where `scripts/test` runs two: a folder of real daemons, or a file."""
    for item in items:
        path = item.path.relative_to(HERE)
        folder = path.parts[0]
        group = folder if folder in ONE_AFTER_THE_OTHER else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
