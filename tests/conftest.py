"""What all tests share."""

from __future__ import annotations

import torch

# Networks of tests are small: more threads only wait for each other, for minutes where the cores are busy.
torch.set_num_threads(1)
