"""Is this contribution acceptable? What can be told of a verified contribution before it is merged.

Both checks return the reason to refuse, or None. They stop accidents and clumsy lies; an insider who lies
plausibly about tensors or counters is not caught here (docs/security.md). The tensors come in as arguments,
so this module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from . import limits
from .run import STEM, RunSpec

if TYPE_CHECKING:
    import torch

    from .ledger import Contribution

#: How far a shard may be trained over its budget, in multiples of it, besides the lease that completes it.
#: An honest device starts no lease on a shard that it knows to be complete, so its total stays under budget +
#: one lease; the rest is for one that hears of the completion between its claim and its first step. Higher
#: lets a liar outweigh the others' progress, lower refuses late honest work.
SEEN_SLACK: Final = 1.25
#: Root mean square of a trained tensor against that of the initial one. Trained layers stay within a few
#: times their initialisation; a scaled-up contribution would own the weighted mean.
RMS_GROWTH_MAX: Final = 20.0
#: For tensors that start at or near zero (biases).
RMS_FLOOR: Final = 5.0
#: Batch-norm statistics follow the activations, not the initialisation.
STATISTICS_RMS_MAX: Final = 1e6
#: A lease's own result is kept to this part of each bound: it is rounded to 16 bits on its way.
BOUND_ROOM: Final = 0.995


def reason_to_refuse(
    contribution: Contribution, spec: RunSpec, *, tensors_bytes_max: int = limits.SHARD_BYTES_MAX
) -> str | None:
    """Why a contribution cannot belong to this run, from its header alone.

    Args:
        tensors_bytes_max: what the shard's bytes can be at most, where the caller knows the model.
    """
    if contribution.shard not in spec.shards:
        return f"the run has no shard {contribution.shard}"
    return _refuse_counters(contribution, spec) or _refuse_digests(contribution, tensors_bytes_max)


def _refuse_counters(contribution: Contribution, spec: RunSpec) -> str | None:
    # A lease ends on a whole batch.
    lease_max = spec.schedule.lease_samples + spec.schedule.batch_size
    seen = dict(contribution.seen)
    total = sum(seen.values())
    if contribution.generation < 1:
        return "generation 0 is the initial state, which nobody contributes"
    if contribution.generation > total:
        return f"generation {contribution.generation} cannot come from {total} samples"
    if not 1 <= contribution.lease_samples <= lease_max:
        return f"a lease has {contribution.lease_samples} samples, not 1 to {lease_max}"
    if seen.get(contribution.device, 0) < contribution.lease_samples:
        return "its device has not counted the lease's samples as seen"
    if total > spec.budget(contribution.shard) * SEEN_SLACK + lease_max:
        return f"{total} samples seen, far over the budget of {spec.budget(contribution.shard)}"
    return None


def _refuse_digests(contribution: Contribution, tensors_bytes_max: int) -> str | None:
    if contribution.shard == STEM and contribution.stem_digest:
        return "a stem is not trained on a stem"
    if contribution.shard != STEM and not contribution.stem_digest:
        return "it does not say which stem the branch was trained on"
    if not 1 <= contribution.tensors_bytes <= tensors_bytes_max:
        return f"its tensors have {contribution.tensors_bytes} bytes, not 1 to {tensors_bytes_max}"
    return None


def reason_to_refuse_tensors(
    tensors: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> str | None:
    """Why a shard's tensors cannot be merged.

    Args:
        tensors: decoded, name -> tensor.
        initial: the shard as the run spec seeds it. The bound hangs on it and not on the newest state, so
            that a patient liar cannot raise it step by step.
    """
    if tensors.keys() != initial.keys():
        return "its tensors have other names than the shard's"
    for name, tensor in tensors.items():
        if tensor.shape != initial[name].shape:
            return f"{name} has another shape than the shard's"
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"{name} is not finite"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} is negative"
        bound = _rms_bound(name, initial[name])
        if tensor.is_floating_point() and _rms(tensor) > bound:
            return f"{name} has a root mean square of {_rms(tensor):.3g}, over {bound:.3g}"
    return None


def within_bounds(
    tensors: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a lease has made, with every tensor scaled down that is over its bound.

    A liar can give a state just under a bound, from which an honest lease steps over it. Published as it is,
    that would have its maker convicted by all, and the shard would never get on.

    Args:
        initial: as for `reason_to_refuse_tensors`, which finds no tensor too large in the result.
    """
    made = dict(tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            continue
        bound, rms = BOUND_ROOM * _rms_bound(name, initial[name]), _rms(tensor)
        if rms > bound:
            made[name] = tensor * (bound / rms)
    return made


def _rms_bound(name: str, initial: torch.Tensor) -> float:
    if name.endswith(("running_mean", "running_var")):
        return STATISTICS_RMS_MAX
    return max(RMS_GROWTH_MAX * _rms(initial), RMS_FLOOR)


def _rms(tensor: torch.Tensor) -> float:
    return math.sqrt(tensor.double().square().sum().item() / max(1, tensor.numel()))
