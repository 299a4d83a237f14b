"""The global model as a file: equal ledgers give equal bytes, and no bytes but a model's are read."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_specs import model_spec

from p2pcollab import assembly, limits
from p2pcollab.assembly import Assembled, assemble, load_model, merged_shard, save_atomic, to_bytes
from p2pcollab.errors import IncompatibleError, P2PCollabError, PeerError, StorageError, UsageError
from p2pcollab.ledger import Contribution
from p2pcollab.merging import merge
from p2pcollab.models import SubModel, initial_shard
from p2pcollab.run import STEM, DeviceId, RunSpec, ShardId
from p2pcollab.shards import ShardTensors, restore_branch, restore_stem

SPEC = model_spec(tasks=((0,), (1, 2), (2, 3), (0, 3)))
T0, T1, T2, T3 = (ShardId(task.id) for task in SPEC.tasks)


def contribution(shard: ShardId, device: str, *, samples: int = 100, generation: int = 1) -> Contribution:
    """An unsigned header; the digest names the tensors that `tensors_of` makes."""
    return Contribution(
        run_id=SPEC.run_id,
        shard=shard,
        device=DeviceId(device),
        public_key=bytes(32),
        generation=generation,
        seen=((DeviceId(device), samples),),
        lease_samples=samples,
        stem_digest="" if shard == STEM else "initial",
        tensors_digest=f"{shard}/{device}",
        tensors_bytes=1,
        loss=0.0,
        accuracy=0.0,
        signature=bytes(64),
    )


def tensors_of(header: Contribution) -> ShardTensors:
    """The shard's initial tensors, moved by an amount that is the device's own."""
    step = 0.01 * (ord(header.device[0]) - ord("a"))
    return {
        name: tensor + step if tensor.is_floating_point() else tensor
        for name, tensor in initial_shard(SPEC, header.shard).items()
    }


FRONTIERS = {
    STEM: [contribution(STEM, "a"), contribution(STEM, "b", samples=50)],
    T0: [contribution(T0, "a")],
    T1: [contribution(T1, "b", samples=30), contribution(T1, "c", samples=60)],
}


@lru_cache
def example() -> bytes:
    return to_bytes(assemble(SPEC, FRONTIERS, tensors_of))


def header_of(data: bytes) -> dict[str, Any]:
    length = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    """The file with another header in front of the same tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_model_holds_the_merged_shards_and_scores_like_them() -> None:
    loaded = load_model(example())
    states = {shard: merge([(one, tensors_of(one)) for one in some]) for shard, some in FRONTIERS.items()}
    stem = restore_stem(SPEC, states[STEM]).eval()
    branches = {shard: restore_branch(SPEC, SPEC.task(shard), states[shard]).eval() for shard in (T0, T1)}
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = SubModel(SPEC, stem, branches).eval()(images)
        torch.testing.assert_close(loaded.model(images), expected, rtol=1e-4, atol=1e-5)
    assert loaded.spec == SPEC
    assert not loaded.model.training


def test_missing_tasks_are_named_and_a_class_is_missing_only_with_all_its_branches() -> None:
    loaded = load_model(example())
    assert loaded.missing == (T2, T3)
    assert loaded.coverage == 0.75
    with torch.no_grad():
        scores = loaded.model(torch.zeros(1, 1, 8, 8))
    assert scores[0].isneginf().tolist() == [False, False, False, True]


def test_model_without_any_branch_is_a_model_that_knows_nothing() -> None:
    loaded = load_model(to_bytes(assemble(SPEC, {}, tensors_of)))
    assert loaded.coverage == 0.0
    assert loaded.missing == (T0, T1, T2, T3)
    assert loaded.provenance["stem"]["generation"] == 0


def test_shard_that_nobody_trained_is_the_initial_one() -> None:
    merged = merged_shard(SPEC, T3, (), tensors_of)
    initial = initial_shard(SPEC, T3)
    assert all(torch.equal(merged[name], initial[name]) for name in initial)


@given(st.permutations([(shard, one) for shard, some in FRONTIERS.items() for one in some]))
@settings(max_examples=20, deadline=None)
def test_equal_ledgers_give_equal_bytes_in_whatever_order(
    order: Sequence[tuple[ShardId, Contribution]],
) -> None:
    frontiers: dict[ShardId, list[Contribution]] = {}
    for shard, one in order:
        frontiers.setdefault(shard, []).append(one)
    assert to_bytes(assemble(SPEC, frontiers, tensors_of)) == example()


def test_provenance_says_who_trained_what() -> None:
    provenance = load_model(example()).provenance
    assert set(provenance) == {"stem", "t0", "t1"}
    assert provenance["t1"]["contributors"] == {"b": 30, "c": 60}
    assert provenance["t1"]["samples"] == 90
    assert provenance["t1"]["digests"] == ["t1/b", "t1/c"]
    assert provenance["t1"]["stem_digests"] == ["initial"]


def test_file_is_plain_safetensors_in_float32_without_the_auxiliary_head(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_atomic(path, example())
    tensors = safetensors.torch.load_file(path)
    assert {name.split(".")[0] for name in tensors} == {"stem", "t0", "t1"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert RunSpec.decode(metadata["run_spec"].encode()) == SPEC
    assert json.loads(metadata["missing"]) == ["t2", "t3"]
    assert float(metadata["coverage"]) == 0.75
    assert load_model(path).spec == SPEC


def test_saving_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "none" / "model.safetensors"
    with pytest.raises(StorageError, match="folder is not there") as caught:
        save_atomic(path, example())
    assert caught.value.fix
    assert not list(tmp_path.iterdir())


def test_missing_file_or_a_folder_is_the_callers_mistake(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(UsageError, match="no file") as caught:
            load_model(path)
        assert "p2pcollab assemble" in caught.value.fix


def test_oversized_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(example())
    monkeypatch.setattr(limits, "MODEL_BYTES_MAX", 1000)
    with pytest.raises(UsageError, match="larger"):
        load_model(path)


def test_file_of_another_version_is_incompatible_not_damaged() -> None:
    header = header_of(example())
    header["__metadata__"]["format_version"] = "2"
    with pytest.raises(IncompatibleError, match="format version 2") as caught:
        load_model(with_header(example(), header))
    assert caught.value.fix


def sealed(header: dict[str, Any]) -> bytes:
    """The file of someone who writes other metadata, and the right digest for them."""
    data = example()
    length = struct.unpack("<Q", data[:8])[0]
    metadata = header["__metadata__"]
    digest = hashlib.sha256()
    for key in ("run_spec", "provenance"):
        digest.update(hashlib.sha256(str(metadata.get(key)).encode(errors="replace")).digest())
    digest.update(data[8 + length :])
    return with_header(data, {**header, "__metadata__": {**metadata, "content_sha256": digest.hexdigest()}})


def test_untouched_file_that_is_sealed_again_is_still_a_model() -> None:
    assert load_model(sealed(header_of(example()))).spec == SPEC


@pytest.mark.parametrize("key", ["format", "run_spec", "provenance"])
@pytest.mark.parametrize("value", [None, 7, "", "x", "[" * 100_000, [], "\ud800", "{}x"])
def test_hostile_metadata_are_refused(key: str, value: object) -> None:
    header = header_of(example())
    header["__metadata__"][key] = value
    with pytest.raises(UsageError, match="not a model"):
        load_model(sealed(header))


@pytest.mark.parametrize("metadata", [None, 7, [], {}])
def test_file_without_metadata_is_refused(metadata: object) -> None:
    with pytest.raises(UsageError, match="not a model"):
        load_model(with_header(example(), {**header_of(example()), "__metadata__": metadata}))


@pytest.mark.parametrize(
    "change", [{"family": "vgg16"}, {"family": "none"}, {"stem_stages": 16}, {"branch_width": 1.0}]
)
def test_spec_of_another_network_is_refused_without_building_it(change: dict[str, object]) -> None:
    header = header_of(example())
    other = SPEC.model_copy(update={"model": SPEC.model.model_copy(update=change)})
    header["__metadata__"]["run_spec"] = other.encode().decode()
    with pytest.raises(UsageError, match="not a model"):
        load_model(sealed(header))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        {},
        {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
        {"dtype": "F16"},
        {"data_offsets": [-4, 0]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [2.0, 4.0]},
        {"data_offsets": [True, 4]},
        {"data_offsets": None},
        {"shape": [10**9, 10**9]},
        {"shape": []},
    ],
)
def test_tensor_that_is_not_the_runs_is_refused(entry: object) -> None:
    header = header_of(example())
    name = "t0.head.weight"
    if isinstance(entry, dict) and entry:
        entry = {**header[name], **entry}
    header[name] = entry
    with pytest.raises(UsageError, match="not a model"):
        load_model(with_header(example(), header))


def test_tensor_too_many_or_too_few_is_refused() -> None:
    header = header_of(example())
    with pytest.raises(UsageError, match="the run's model has not"):
        load_model(with_header(example(), {**header, "t9.head.weight": header["t0.head.weight"]}))
    del header["t0.head.weight"]
    with pytest.raises(UsageError, match=r"t0\.head\.weight is missing"):
        load_model(with_header(example(), header))


def test_values_that_are_not_finite_are_refused() -> None:
    model = assemble(SPEC, FRONTIERS, tensors_of)
    broken = {**model.tensors, "t0.head.bias": model.tensors["t0.head.bias"] * float("nan")}
    data = to_bytes(Assembled(spec=SPEC, tensors=broken, provenance=model.provenance))
    with pytest.raises(UsageError, match="not finite"):
        load_model(data)


def test_every_flipped_bit_of_the_tensors_is_found() -> None:
    data = bytearray(example())
    for position in (len(data) - 1, len(data) // 2, len(data) - 1000):
        data[position] ^= 1
        with pytest.raises(UsageError, match="not what was written"):
            load_model(bytes(data))
        data[position] ^= 1


@given(st.integers(0, 20_000))
@settings(max_examples=60, deadline=None)
def test_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(UsageError):
        load_model(example()[: min(length, len(example()) - 1)])


@given(st.binary(max_size=200), st.binary(max_size=8), st.integers(0, 6000))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_model_or_one_clear_error(junk: bytes, patch: bytes, position: int) -> None:
    patched = bytearray(example())
    patched[position : position + len(patch)] = patch
    for data in (junk, bytes(patched)):
        try:
            loaded = load_model(data)
        except (UsageError, IncompatibleError) as error:
            assert error.what
        else:
            # White space of the header, or what is worked out again when it is read.
            assert data[-5000:] == example()[-5000:] and loaded.spec == SPEC


def test_peers_error_while_assembling_is_not_hidden() -> None:
    def refuse(header: Contribution) -> ShardTensors:
        raise PeerError("lies")

    with pytest.raises(P2PCollabError, match="lies"):
        assembly.assemble(SPEC, FRONTIERS, refuse)
