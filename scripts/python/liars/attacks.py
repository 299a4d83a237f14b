"""What a lying device publishes in place of what it was asked to train.

The liars are insiders with everything that an honest device has: they run the same program, hold leases, sign
what they send, and keep within the bounds of shape, finiteness (but for `nan`) and size that anybody checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

#: Of the update, for `sign-flip` and `scaling`.
FLIP: Final = 4.0
SCALE: Final = 10.0
#: Deviation of the noise, and the drift, in root mean squares of the tensor.
NOISE: Final = 1.0
DRIFT: Final = 0.1
#: What `false-counts` claims of every other device, beyond what it has heard of.
CLAIMED_LEASES: Final = 3

_LARGEST: Final = 60_000.0


def _each(
    change: Callable[[Tensor, Tensor], Tensor], parent: Mapping[str, Tensor], made: Mapping[str, Tensor]
) -> Tensors:
    """Every floating tensor changed; variances stay positive and values within fp16: a careful liar."""
    changed = {}
    for name, tensor in made.items():
        if tensor.is_floating_point():
            tensor = change(parent[name], tensor).clamp(-_LARGEST, _LARGEST)
            if name.endswith("running_var"):
                tensor = tensor.clamp(min=1e-6)
        changed[name] = tensor
    return changed


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def sign_flip(parent: Tensors, made: Tensors, _generator: torch.Generator) -> Tensors:
    """The update, multiplied and against its direction."""
    return _each(lambda before, after: before - FLIP * (after - before), parent, made)


def scaling(parent: Tensors, made: Tensors, _generator: torch.Generator) -> Tensors:
    """The update, ten times as long."""
    return _each(lambda before, after: before + SCALE * (after - before), parent, made)


def noise(parent: Tensors, made: Tensors, generator: torch.Generator) -> Tensors:
    """Noise as large as the tensors themselves."""
    return _each(
        lambda _before, after: after + NOISE * _rms(after) * torch.randn(after.shape, generator=generator),
        parent,
        made,
    )


def nan(parent: Tensors, made: Tensors, _generator: torch.Generator) -> Tensors:
    """One value that is not a number in every tensor."""

    def spoil(_before: Tensor, after: Tensor) -> Tensor:
        after = after.clone()
        after.view(-1)[0] = float("nan")
        return after

    return _each(spoil, parent, made)


def drift(parent: Tensors, made: Tensors, _generator: torch.Generator) -> Tensors:
    """Honest work, and all values a little greater, always by the same part."""
    return _each(lambda _before, after: after + DRIFT * _rms(after), parent, made)


#: Attacks that change what a lease has made; the others are in `rehearsal`.
ON_TENSORS: Final[Mapping[str, Callable[[Tensors, Tensors, torch.Generator], Tensors]]] = {
    "sign-flip": sign_flip,
    "scaling": scaling,
    "noise": noise,
    "nan": nan,
    "drift": drift,
}
ATTACKS: Final = (
    "sign-flip",
    "scaling",
    "noise",
    "nan",
    "label-flip",
    "drift",
    "stale-replay",
    "equivocation",
    "false-counts",
)
