"""What all tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Networks of tests are small: more threads only wait for each other, for minutes where the cores are busy.
torch.set_num_threads(1)
# A deadline asserts a timing, which a busy machine breaks.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

#: Their tests start processes that mean to have their network to themselves.
ONE_AFTER_THE_OTHER = ("node", "netns")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Keep a folder of real daemons in one process where `scripts/test` runs two, and each other file.

    The groups of xdist 3.8 (`--dist loadgroup`) would say the same, but do nothing with pytest 9, which no
    longer reads the field that they are written into.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolderOrFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.split("::")[0])
            return path.parent.name if path.parent.name in ONE_AFTER_THE_OTHER else str(path)

    return ByFolderOrFile(config, log)
