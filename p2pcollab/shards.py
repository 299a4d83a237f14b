"""Model <-> shards <-> bytes.

A shard is the unit of gossip and storage. Its bytes are a valid safetensors file whose header follows
from the run spec alone, so a peer's bytes are accepted by comparing their header with the only possible
one: nothing that a peer wrote is parsed, and nothing is allocated that the run's own model does not need.
The bytes of equal tensors are equal on every device, whatever version of the safetensors library it has.

Weights travel as fp16, which halves the traffic; vectors (batch norm, biases) as fp32, because running
variances leave fp16's range; counters as int64. The optimiser's momentum travels along as bf16: gradients
are too small for fp16, and a direction needs no more than its eight bits. Decoding always restores the exact
values whose digest was signed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from .errors import PeerError, RunError
from .models.build import (
    AUX_PREFIX,
    MOMENTUM_PREFIX,
    STEM_PREFIX,
    blank_aux_head,
    blank_branch,
    blank_shard,
    blank_stem,
    filled,
    with_prefix,
)
from .models.layers import Classifier, Stem
from .run import RunSpec, ShardId, TaskSpec

ShardTensors = dict[str, Tensor]
"""The named tensors of one shard, on the CPU: float32, and int64 counters."""

Momentum = Mapping[nn.Parameter, Tensor]
"""The running mean of each parameter's gradients (`optimiser.MeanMomentumSGD`)."""

_FORMAT_NAMES: Final = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}
_LENGTH_BYTES: Final = 8
#: The safetensors format wants the header's end, and so the tensors, aligned to this.
_ALIGNMENT: Final = 8


def cut_stem(stem: Stem, aux_head: Classifier, momentum: Momentum | None = None) -> ShardTensors:
    """The stem's shard: a copy of the stem and of its auxiliary head, and of their momentum (None: zero)."""
    return {
        **_cut(STEM_PREFIX, stem, momentum or {}),
        **_cut(AUX_PREFIX, aux_head, momentum or {}),
    }


def cut_branch(branch: Classifier, momentum: Momentum | None = None) -> ShardTensors:
    """A branch's shard: a copy of its tensors and of their momentum (None: zero)."""
    return _cut("", branch, momentum or {})


def restore_momentum(shard: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> Momentum:
    """The momentum that a shard brings, for the parameters of modules by their prefix in the shard."""
    return {
        parameter: shard[MOMENTUM_PREFIX + prefix + name]
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def _cut(prefix: str, module: nn.Module, momentum: Momentum) -> ShardTensors:
    tensors = {prefix + name: _copied(tensor) for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        mean = momentum.get(parameter)
        tensors[MOMENTUM_PREFIX + prefix + name] = (
            torch.zeros(parameter.shape) if mean is None else _copied(mean)
        )
    return tensors


def restore_stem(spec: RunSpec, tensors: Mapping[str, Tensor]) -> Stem:
    """The stem with a copy of its shard's values."""
    return filled(blank_stem(spec), with_prefix(tensors, STEM_PREFIX))


def restore_aux_head(spec: RunSpec, tensors: Mapping[str, Tensor]) -> Classifier:
    """The auxiliary head with a copy of the stem shard's values."""
    return filled(blank_aux_head(spec), with_prefix(tensors, AUX_PREFIX))


def restore_branch(spec: RunSpec, task: TaskSpec, tensors: Mapping[str, Tensor]) -> Classifier:
    """A branch with a copy of its shard's values."""
    return filled(blank_branch(spec, task), tensors)


def shard_bytes(spec: RunSpec, shard: ShardId) -> int:
    """Length of a shard's encoding, the same for all of its contributions."""
    return _Layout(blank_shard(spec, shard)).total_bytes


def encode_shard(tensors: Mapping[str, Tensor]) -> bytes:
    """A shard as bytes.

    Raises:
        RunError: a value is not finite, or leaves the range of fp16.
    """
    layout = _Layout(tensors)
    parts = [layout.header]
    for name in layout.names:
        tensor = tensors[name].detach().to("cpu", layout.dtypes[name]).contiguous()
        if not bool(tensor.isfinite().all()):
            raise RunError(
                f"training diverged: {name} holds values that are not finite",
                "start a run with a lower learning rate",
            )
        # NumPy has no bf16: its bytes are those of integers as wide.
        raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        parts.append(raw.numpy().tobytes())
    return b"".join(parts)


def decode_shard(data: bytes, spec: RunSpec, shard: ShardId) -> ShardTensors:
    """A shard from bytes that a peer or the disk gave, in float32.

    Raises:
        PeerError: they are anything else than this shard of this run, or hold a value that cannot be.
    """
    layout = _Layout(blank_shard(spec, shard))
    if len(data) != layout.total_bytes:
        raise PeerError(f"a shard {shard} has {layout.total_bytes} bytes, not {len(data)}")
    if not data.startswith(layout.header):
        raise PeerError(f"the bytes do not hold the tensors of shard {shard}")
    tensors = {}
    offset = len(layout.header)
    for name in layout.names:
        shape, dtype = layout.shapes[name], layout.dtypes[name]
        values = math.prod(shape)
        # A copy in every case: the bytes are not ours to alias, and PyTorch wants writable memory.
        raw = torch.frombuffer(bytearray(data[offset : offset + values * dtype.itemsize]), dtype=dtype)
        tensors[name] = raw.to(torch.float32 if dtype.is_floating_point else dtype).reshape(shape)
        offset += values * dtype.itemsize
        _check_values(name, tensors[name])
    return tensors


class _Layout:
    """Where each tensor of a shard lies in its bytes, and the header that says so."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: _wire_dtype(name, tensor) for name, tensor in tensors.items()}
        # Widest first, so that every tensor is aligned to its own width.
        self.names = sorted(tensors, key=lambda name: (-self.dtypes[name].itemsize, name))
        fields = {}
        offset = 0
        for name in self.names:
            end = offset + math.prod(self.shapes[name]) * self.dtypes[name].itemsize
            fields[name] = {
                "dtype": _FORMAT_NAMES[self.dtypes[name]],
                "shape": self.shapes[name],
                "data_offsets": (offset, end),
            }
            offset = end
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        self.total_bytes = len(self.header) + offset


def _wire_dtype(name: str, tensor: Tensor) -> torch.dtype:
    if name.startswith(MOMENTUM_PREFIX):
        return torch.bfloat16
    if not tensor.dtype.is_floating_point:
        return torch.int64
    return torch.float16 if tensor.ndim >= 2 else torch.float32


def _check_values(name: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise PeerError(f"{name} holds values that are not finite")
    if name.endswith(("running_var", "num_batches_tracked")) and bool((tensor < 0).any()):
        raise PeerError(f"{name} holds negative values")


def _copied(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
