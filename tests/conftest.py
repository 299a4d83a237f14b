"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import settings

# Networks of tests are small: more threads only wait for each other, for minutes where the cores are busy.
torch.set_num_threads(1)
# A deadline asserts a timing, which a busy machine breaks.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
