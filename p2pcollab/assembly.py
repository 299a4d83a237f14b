"""The global model: put together from what a device has, as one file, and read back.

The file is safetensors with float32 tensors `stem.*` and `<task id>.*`, and in its metadata the run spec and
the provenance of every shard. Equal ledgers give equal bytes: nothing in them says who assembled them, or
when.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from . import limits
from .errors import IncompatibleError, PeerError, UsageError
from .files import storage_error, write_atomic
from .ledger import Contribution, joined_seen, states_digest
from .merging import merge
from .models import GlobalModel, blank_shard, blank_stem, initial_shard
from .models.build import MOMENTUM_PREFIX, STEM_PREFIX, filled, with_prefix
from .run import PROTOCOLS_READ, STEM, RunSpec, ShardId
from .shards import ShardTensors, restore_branch

FORMAT_VERSION: Final = 1
Frontiers = Mapping[ShardId, Sequence[Contribution]]
"""The contributions that each shard's state is merged of."""
TensorsOf = Callable[[Contribution], ShardTensors]
"""A contribution's decoded tensors."""

_FORMAT_NAMES: Final = {torch.float32: "F32", torch.int64: "I64"}
_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8
_NOT_OURS: Final = "use a file that `p2pcollab assemble` wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """The global model's tensors, and where they come from."""

    spec: RunSpec
    tensors: dict[str, Tensor]
    #: By shard: generation, samples, contributors, digests; JSON values.
    provenance: dict[str, Any]

    @property
    def missing(self) -> tuple[ShardId, ...]:
        """Tasks that nobody has trained yet."""
        return tuple(shard for shard in self.spec.shards if shard not in self.provenance and shard != STEM)

    @property
    def coverage(self) -> float:
        """Fraction of the classes that the model can tell, 0..1."""
        return coverage(self.spec, self.missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model file's content, ready to use."""

    spec: RunSpec
    #: Images [B, F, H, W] -> log-probabilities per class [B, C]; in evaluation mode.
    model: GlobalModel
    provenance: dict[str, Any]
    missing: tuple[ShardId, ...]

    @property
    def coverage(self) -> float:
        """Fraction of the classes that the model can tell, 0..1."""
        return coverage(self.spec, self.missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """What a model file says: tensors by shard and name, of a network that is not built yet."""

    spec: RunSpec
    states: dict[ShardId, dict[str, Tensor]]
    provenance: dict[str, Any]


def coverage(spec: RunSpec, missing: Iterable[ShardId]) -> float:
    """Fraction of the classes that have a branch when these tasks are missing."""
    absent = set(missing)
    covered = {index for task in spec.tasks if task.id not in absent for index in task.classes}
    return len(covered) / len(spec.classes)


def merged_shard(
    spec: RunSpec, shard: ShardId, frontier: Sequence[Contribution], tensors_of: TensorsOf
) -> ShardTensors:
    """A shard's newest state in float32: its frontier merged, or the initial tensors where there is none."""
    if not frontier:
        return initial_shard(spec, shard)
    return merge([(contribution, tensors_of(contribution)) for contribution in frontier])


def assemble(spec: RunSpec, frontiers: Frontiers, tensors_of: TensorsOf) -> Assembled:
    """The global model. A task without a contribution is missing; the stem starts as its initial tensors.

    Raises:
        PeerError: from `tensors_of`.
    """
    tensors: dict[str, Tensor] = {}
    provenance: dict[str, Any] = {}
    for shard in spec.shards:
        frontier = sorted(frontiers.get(shard, ()), key=lambda one: (one.device, one.version))
        if shard != STEM and not frontier:
            continue
        state = merged_shard(spec, shard, frontier, tensors_of)
        tensors.update({name: state[own] for name, own in _names(shard, state).items()})
        provenance[shard] = _provenance(frontier)
    return Assembled(spec=spec, tensors=tensors, provenance=provenance)


def to_bytes(model: Assembled) -> bytes:
    """The model as a safetensors file's bytes: the same for equal models."""
    data = [model.tensors[name].contiguous().numpy().tobytes() for name in _order(model.tensors)]
    run_spec, provenance = model.spec.encode().decode(), _json(model.provenance)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "p2pcollab-model",
            "format_version": str(FORMAT_VERSION),
            "run_spec": run_spec,
            "provenance": provenance,
            "missing": _json(model.missing),
            "coverage": repr(model.coverage),
            "content_sha256": _content_digest(run_spec, provenance, data),
        }
    }
    offset = 0
    for name in _order(model.tensors):
        tensor = model.tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _FORMAT_NAMES[tensor.dtype],
            "shape": tuple(tensor.shape),
            "data_offsets": (offset, end),
        }
        offset = end
    text = _json(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *data])


def save_atomic(path: Path, data: bytes) -> None:
    """Write a model file, whole or not at all.

    Raises:
        StorageError: it was not written; an older file of that name is as it was.
    """
    write_atomic(path, data)


def load_model(source: Path | bytes) -> LoadedModel:
    """Read a model file. No byte of it is trusted: names, shapes and dtypes must be those of its run spec.

    Raises:
        UsageError: it is not a model file, or is damaged.
        IncompatibleError: it is of another version.
        StorageError: the disk refused.
    """
    where = str(source) if isinstance(source, Path) else "the model"
    data = _read(source) if isinstance(source, Path) else source
    parts = read_model(data, where)
    spec = parts.spec
    branches = {
        shard: restore_branch(spec, spec.task(shard), state)
        for shard, state in parts.states.items()
        if shard != STEM
    }
    stem = filled(blank_stem(spec), with_prefix(parts.states[STEM], STEM_PREFIX))
    model = GlobalModel(spec, stem, branches)
    missing = tuple(shard for shard in spec.shards if shard not in parts.states)
    return LoadedModel(spec=spec, model=model.eval(), provenance=parts.provenance, missing=missing)


def read_model(data: bytes, where: str = "the model") -> ModelParts:
    """What a model file says, checked.

    Args:
        where: what an error calls it.

    Raises:
        UsageError, IncompatibleError: see `load_model`.
    """
    try:
        return _parts(data)
    except (PeerError, UsageError) as error:
        raise UsageError(
            f"{where} is not a model of p2pcollab, or is damaged: {error.what}", _NOT_OURS
        ) from error


def _parts(data: bytes) -> ModelParts:
    header, start = _header(data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != "p2pcollab-model":
        raise PeerError("it does not say that it is one")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        # Escaped and cut: whoever wrote the file must not write to a terminal.
        found = ascii(str(metadata.get("format_version")))[1:-1][:20]
        raise IncompatibleError(
            f"the model file has format version {found}, this program reads {FORMAT_VERSION}",
            "install the version of p2pcollab that wrote it",
        )
    run_spec, provenance = str(metadata.get("run_spec")), str(metadata.get("provenance"))
    body = memoryview(data)[start:]
    if _content_digest(run_spec, provenance, [body]) != metadata.get("content_sha256"):
        raise PeerError("its content is not what was written")
    spec = RunSpec.decode(run_spec.encode(errors="replace"), PROTOCOLS_READ)
    states: dict[ShardId, dict[str, Tensor]] = {}
    # Only of shards that the file claims to have is the network worked out, which takes a millisecond each.
    claimed = {name.partition(".")[0] for name in header}
    for shard in spec.shards:
        if shard != STEM and shard not in claimed:
            continue
        blank = blank_shard(spec, shard)
        states[shard] = {
            own: _tensor(header.pop(name, None), body, name, blank[own])
            for name, own in _names(shard, blank).items()
        }
    if header:
        raise PeerError(f"it holds a tensor {next(iter(header))[:40]!r} that the run's model has not")
    return ModelParts(spec=spec, states=states, provenance=_parse_json(provenance))


def _names(shard: ShardId, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the file -> name in the shard. Momentum and the stem's own head are never assembled."""
    if shard == STEM:
        return {name: name for name in tensors if name.startswith(STEM_PREFIX)}
    return {f"{shard}.{name}": name for name in tensors if not name.startswith(MOMENTUM_PREFIX)}


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest first, so that every tensor is aligned to its own width."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _provenance(frontier: Sequence[Contribution]) -> dict[str, Any]:
    return {
        "generation": max((one.generation for one in frontier), default=0),
        "samples": sum(joined_seen(frontier).values()),
        "contributors": dict(sorted(joined_seen(frontier).items())),
        "digests": [one.tensors_digest for one in frontier],
        "state_digest": states_digest(frontier),
        "stem_digests": sorted({one.stem_digest for one in frontier if one.stem_digest}),
    }


def _content_digest(run_spec: str, provenance: str, tensors: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of all that a model is: a file that rots, or is cut, is told from one that was written so."""
    digest = hashlib.sha256()
    for text in (run_spec, provenance):
        digest.update(hashlib.sha256(text.encode(errors="replace")).digest())
    for data in tensors:
        digest.update(data)
    return digest.hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _parse_json(text: str) -> dict[str, Any]:
    # Counted, those in names included, before any of them becomes an object.
    lists, items = text.count("[") + text.count("{"), text.count(",")
    if lists > limits.MODEL_HEADER_LISTS_MAX or items > limits.MODEL_HEADER_ITEMS_MAX:
        raise PeerError("its header has more parts than any model's")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PeerError("its header is not JSON") from error
    if not isinstance(value, dict):
        raise PeerError("its header is not an object")
    return value


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > limits.MODEL_BYTES_MAX:
            raise UsageError(f"{path} is larger than a model can be", _NOT_OURS)
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"there is no file {path}", _NOT_OURS) from error
    except OSError as error:
        raise storage_error(error, f"{path} was not read") from error


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if length > limits.MODEL_HEADER_BYTES_MAX or start > len(data):
        raise PeerError("it has no safetensors header")
    try:
        text = data[_LENGTH_BYTES:start].decode()
    except UnicodeDecodeError as error:
        raise PeerError("its header is not text") from error
    return _parse_json(text), start


def _tensor(entry: Any, body: memoryview, name: str, blank: Tensor) -> Tensor:
    """One tensor's values, if its entry in the header is the one that the run's model needs."""
    dtype = torch.float32 if blank.dtype.is_floating_point else torch.int64
    expected = {"dtype": _FORMAT_NAMES[dtype], "shape": list(blank.shape)}
    if not isinstance(entry, dict) or {key: entry.get(key) for key in expected} != expected:
        raise PeerError(f"the tensor {name} is missing or has another shape")
    offsets = entry.get("data_offsets")
    size = math.prod(blank.shape) * dtype.itemsize
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(one) is int for one in offsets)):
        raise PeerError(f"the tensor {name} has no place")
    begin, end = offsets
    if not 0 <= begin <= end <= len(body) or end - begin != size:
        raise PeerError(f"the tensor {name} has a wrong place")
    tensor = torch.frombuffer(bytearray(body[begin:end]), dtype=dtype).reshape(blank.shape)
    if not bool(tensor.isfinite().all()):
        raise PeerError(f"the tensor {name} holds values that are not finite")
    return tensor
