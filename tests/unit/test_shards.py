"""Cutting, restoring, encoding and decoding shards; and bytes that are not one."""

from __future__ import annotations

import json
import tracemalloc
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_specs import FAMILY_INPUTS, model_spec
from safetensors.torch import load as safetensors_load

from p2pcollab import limits
from p2pcollab.errors import PeerError, RunError
from p2pcollab.models import FAMILIES, blank_shard, initial_shard
from p2pcollab.models.build import AUX_PREFIX, MOMENTUM_PREFIX, STEM_PREFIX
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.shards import (
    ShardTensors,
    cut_branch,
    cut_stem,
    decode_shard,
    encode_shard,
    restore_aux_head,
    restore_branch,
    restore_momentum,
    restore_stem,
    shard_bytes,
)

T0 = ShardId("t0")


def _random_shard(spec: RunSpec, shard: ShardId, seed: int) -> ShardTensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, blank in blank_shard(spec, shard).items():
        if blank.dtype == torch.int64:
            tensors[name] = torch.randint(1000, tuple(blank.shape), generator=generator)
        else:
            tensors[name] = torch.randn(tuple(blank.shape), generator=generator)
            if name.endswith("running_var"):
                tensors[name] = tensors[name].square() * 1e6
    return tensors


def _equal(left: ShardTensors, right: ShardTensors) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@st.composite
def _specs(draw: st.DrawFn) -> RunSpec:
    family = draw(st.sampled_from([family for family, _, _ in FAMILY_INPUTS]))
    return model_spec(
        family,
        channels=draw(st.sampled_from([1, 3])),
        height=draw(st.integers(4, 40)),
        width=draw(st.integers(4, 40)),
        tasks=draw(st.sampled_from([((0, 1),), ((0,), (1,)), ((0, 1, 2), (2, 0))])),
        stem_stages=draw(st.integers(1, 3)),
        stem_width=draw(st.sampled_from([0.1, 0.5])),
        branch_width=draw(st.sampled_from([0.05, 0.25])),
        branch_squeeze=draw(st.sampled_from([None, 0.25])),
    )


@settings(max_examples=25, deadline=None)
@given(spec=_specs(), seed=st.integers(0, 1000))
def test_cutting_and_restoring_is_exact(spec: RunSpec, seed: int) -> None:
    shard = _random_shard(spec, STEM, seed)
    stem, aux_head = restore_stem(spec, shard), restore_aux_head(spec, shard)
    momentum = restore_momentum(shard, {STEM_PREFIX: stem, AUX_PREFIX: aux_head})
    assert _equal(cut_stem(stem, aux_head, momentum), shard)
    shard = _random_shard(spec, T0, seed)
    branch = restore_branch(spec, spec.task(T0), shard)
    assert _equal(cut_branch(branch, restore_momentum(shard, {"": branch})), shard)


def test_without_momentum_a_shard_brings_none() -> None:
    spec = model_spec()
    branch = restore_branch(spec, spec.task(T0), initial_shard(spec, T0))
    cut = cut_branch(branch)
    assert cut.keys() == initial_shard(spec, T0).keys()
    assert not any(mean.any() for mean in restore_momentum(cut, {"": branch}).values())


@settings(max_examples=25, deadline=None)
@given(spec=_specs(), seed=st.integers(0, 1000), shard=st.sampled_from([STEM, T0]))
def test_decoding_restores_what_was_encoded(spec: RunSpec, seed: int, shard: ShardId) -> None:
    tensors = _random_shard(spec, shard, seed)
    data = encode_shard(tensors)
    decoded = decode_shard(data, spec, shard)
    assert len(data) == shard_bytes(spec, shard)
    assert encode_shard(decoded) == data
    for name, tensor in tensors.items():
        expected = tensor.half().float() if tensor.ndim >= 2 else tensor
        if name.startswith(MOMENTUM_PREFIX):
            expected = tensor.bfloat16().float()
        assert torch.equal(decoded[name], expected), name


@pytest.mark.parametrize(("family", "channels", "side"), FAMILY_INPUTS)
@pytest.mark.parametrize("shard", [STEM, T0])
def test_encoded_shard_is_a_safetensors_file(
    family: str, channels: Literal[1, 3], side: int, shard: ShardId
) -> None:
    spec = model_spec(family, channels=channels, height=side, width=side)
    data = encode_shard(initial_shard(spec, shard))
    loaded = safetensors_load(data)
    decoded = decode_shard(data, spec, shard)
    assert loaded.keys() == decoded.keys()
    assert all(torch.equal(loaded[name].to(decoded[name].dtype), decoded[name]) for name in loaded)


def test_encoding_does_not_depend_on_the_order_of_the_tensors() -> None:
    tensors = initial_shard(model_spec(), T0)
    assert encode_shard(dict(reversed(tensors.items()))) == encode_shard(tensors)


def test_cut_shard_does_not_change_when_training_goes_on() -> None:
    spec = model_spec()
    branch = restore_branch(spec, spec.task(T0), initial_shard(spec, T0))
    cut = cut_branch(branch)
    branch.head.bias.data.fill_(7.0)
    assert (cut["head.bias"] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_diverged_weights_are_not_encoded(value: float) -> None:
    tensors = initial_shard(model_spec(), T0)
    tensors["head.weight"][0, 0] = value
    with pytest.raises(RunError, match="diverged"):
        encode_shard(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_largest_shard_of_every_family_can_be_sent(family: str) -> None:
    spec = model_spec(
        family, channels=3, height=1024, width=1024, tasks=[range(1000)], stem_stages=1, branch_width=1.0
    )
    assert shard_bytes(spec, T0) < limits.SHARD_BYTES_MAX
    assert shard_bytes(spec, STEM) < limits.SHARD_BYTES_MAX


# Hostile bytes. The promise: a shard of this run's model or PeerError, and no memory beyond the data.


def _refused(data: bytes, shard: ShardId = T0) -> None:
    with pytest.raises(PeerError):
        decode_shard(data, model_spec(), shard)


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    _refused(data)


@settings(deadline=None)
@given(data=st.data())
def test_altered_shard_is_refused_or_harmless(data: st.DataObject) -> None:
    spec = model_spec()
    good = bytearray(encode_shard(initial_shard(spec, T0)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors = decode_shard(bytes(good), spec, T0)
    except PeerError:
        return
    blank = blank_shard(spec, T0)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in blank.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_truncated_and_extended_shards_are_refused() -> None:
    data = encode_shard(initial_shard(model_spec(), T0))
    for wrong in (b"", data[:8], data[:-1], data + b"\0", data * 2):
        _refused(wrong)


def test_shard_of_another_task_shape_is_refused() -> None:
    spec = model_spec()
    _refused(encode_shard(initial_shard(spec, STEM)))
    _refused(encode_shard(initial_shard(model_spec(tasks=((0, 1), (2,))), T0)))
    _refused(encode_shard(initial_shard(model_spec(branch_width=0.5), T0)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head.weight", float("nan")),
        ("head.bias", float("inf")),
        ("stages.0.norm.running_var", -1e-3),
        ("stages.0.norm.num_batches_tracked", -1),
    ],
)
def test_values_that_cannot_be_are_refused(name: str, value: float) -> None:
    tensors = initial_shard(model_spec(), T0)
    marked = {key: tensor.clone() for key, tensor in tensors.items()}
    marked[name].view(-1)[0] = 1.5 if marked[name].dtype.is_floating_point else 3
    good, other = encode_shard(tensors), encode_shard(marked)
    at = next(index for index, (a, b) in enumerate(zip(good, other, strict=True)) if a != b)
    wide = marked[name]
    element = torch.tensor([value], dtype=torch.float16 if wide.ndim >= 2 else wide.dtype).numpy().tobytes()
    size = len(element)
    start = len(good) - (len(good) - at - 1 + size) // size * size
    _refused(good[:start] + element + good[start + size :])


def test_header_that_declares_a_giant_tensor_costs_no_memory() -> None:
    data = encode_shard(initial_shard(model_spec(), T0))
    header = {"head.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    forged = len(text).to_bytes(8, "little") + text
    tracemalloc.start()
    try:
        _refused(forged)
        _refused(forged + data[len(forged) :])
        _refused((2**63).to_bytes(8, "little") + data[8:])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
