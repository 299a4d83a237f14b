"""Builds the networks of a run, with their initial values.

Every device computes the initial tensors itself, so they must be the same bits everywhere: they depend on the
run's seed, the shard and the tensor's name only, and are made of integers by exact arithmetic. (PyTorch's own
initialisation depends on the global generator, and its normal distribution on the vector unit.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..run import STEM, RunSpec, ShardId, TaskSpec
from .layers import Classifier, Stem
from .stages import aux_plan, branch_plan, dense_plan, stem_plan

Module = TypeVar("Module", bound=nn.Module)

#: Prefixes in the stem's shard: the stem proper, and its auxiliary head, which is not assembled.
STEM_PREFIX: Final = "stem."
AUX_PREFIX: Final = "aux."
#: Prefix of the optimiser's momentum in every shard: it travels with what it belongs to, and is never
#: assembled.
MOMENTUM_PREFIX: Final = "momentum."

_DENSE: Final = "dense"
_RANDOM_BITS: Final = 24


def build_stem(spec: RunSpec) -> Stem:
    """The stem with its initial values: images [B, F, H, W] in, feature maps out."""
    return filled(blank_stem(spec), with_prefix(initial_shard(spec, STEM), STEM_PREFIX))


def build_aux_head(spec: RunSpec) -> Classifier:
    """The stem's own head with its initial values: features in, logits [B, C] out."""
    return filled(blank_aux_head(spec), with_prefix(initial_shard(spec, STEM), AUX_PREFIX))


def build_branch(spec: RunSpec, task: TaskSpec) -> Classifier:
    """A task's branch with its initial values: features in, logits [B, k + 1] out, the last for "other"."""
    return filled(blank_branch(spec, task), initial_shard(spec, ShardId(task.id)))


def build_dense(spec: RunSpec) -> Classifier:
    """The undivided network with its initial values, to compare with: images in, logits [B, C] out."""
    dense = blank_dense(spec)
    return filled(dense, _initial(spec, _DENSE, dense.state_dict()))


def blank_stem(spec: RunSpec) -> Stem:
    """The stem's structure, without memory for its values."""
    with torch.device("meta"):
        return Stem(stem_plan(spec))


def blank_aux_head(spec: RunSpec) -> Classifier:
    """The auxiliary head's structure, without memory for its values."""
    with torch.device("meta"):
        return Classifier(aux_plan(spec))


def blank_branch(spec: RunSpec, task: TaskSpec) -> Classifier:
    """A branch's structure, without memory for its values."""
    with torch.device("meta"):
        return Classifier(branch_plan(spec, len(task.classes)))


def blank_dense(spec: RunSpec) -> Classifier:
    """The dense network's structure, without memory for its values."""
    with torch.device("meta"):
        return Classifier(dense_plan(spec))


def blank_shard(spec: RunSpec, shard: ShardId) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a shard's tensors, without memory for their values."""
    if shard != STEM:
        return _blank("", blank_branch(spec, spec.task(shard)))
    return {**_blank(STEM_PREFIX, blank_stem(spec)), **_blank(AUX_PREFIX, blank_aux_head(spec))}


def _blank(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    tensors = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        tensors[MOMENTUM_PREFIX + prefix + name] = parameter.detach()
    return tensors


def initial_shard(spec: RunSpec, shard: ShardId) -> dict[str, Tensor]:
    """A shard of generation 0: the same bits on every device, whatever was built before."""
    return _initial(spec, shard, blank_shard(spec, shard))


def filled(module: Module, tensors: Mapping[str, Tensor]) -> Module:
    """A blank module with a copy of these values, on the CPU, in training mode. Momentum is left out."""
    module.to_empty(device="cpu")
    values = {name: tensor for name, tensor in tensors.items() if not name.startswith(MOMENTUM_PREFIX)}
    module.load_state_dict(values, strict=True)
    return module


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, named without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_momentum(key: str) -> bool:
    return key.rpartition("/")[2].startswith(MOMENTUM_PREFIX)


def _initial(spec: RunSpec, owner: str, blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _initial_tensor(f"{spec.seed}/{owner}/{name}", tensor) for name, tensor in blank.items()}


def _initial_tensor(key: str, blank: Tensor) -> Tensor:
    """Weights: uniform with variance 1 / (3 fan-in), as PyTorch's own; batch-norm's scale and variance 1; the
    rest 0.

    A sixth of the variance of He et al. 2015. Under batch normalisation the scale of the weights changes no
    output, but smaller weights turn further with each step, and short runs gain by it: 4.3 points for the
    dense AlexNet, 5.0 for the grouped one (docs/results/method-trials.md).
    """
    if _is_momentum(key):
        return torch.zeros(blank.shape)
    if blank.ndim >= 2:
        fan_in = math.prod(blank.shape[1:])
        return _uniform(key, blank.shape, math.sqrt(1 / fan_in))
    ones = key.endswith(("norm.weight", "running_var"))
    return torch.full(blank.shape, 1 if ones else 0, dtype=blank.dtype)


def _uniform(key: str, shape: torch.Size, bound: float) -> Tensor:
    """Float32 values in (-bound, bound), from a generator whose stream NumPy guarantees (NEP 19)."""
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], dtype="<u8")
    raw = np.random.Philox(key=seed).random_raw(math.prod(shape)) >> np.uint64(64 - _RANDOM_BITS)
    unit = (raw.astype(np.float64) + 0.5) * 2.0 ** (1 - _RANDOM_BITS) - 1.0
    return torch.from_numpy((unit * bound).astype(np.float32).reshape(shape))
