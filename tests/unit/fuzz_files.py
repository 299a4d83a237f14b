"""Fuzz targets: files, and what the daemon and its trainer tell each other.

A model file's digest is put on anew where it would keep the fuzzer out: whoever writes one can do so, too.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzzing import (
    ALICE,
    RUN,
    SPEC,
    Target,
    contribution,
    json_bombs,
    msgpack_bombs,
    pack,
    reader,
    run_at_once,
)

from p2pcollab import limits
from p2pcollab.errors import (
    IncompatibleError,
    NotRunningError,
    P2PCollabError,
    PeerError,
    StorageError,
    UsageError,
)
from p2pcollab.run import ShardId
from p2pcollab.wire import decode_contribution


def _parse_frame(data: bytes) -> Callable[[], None] | None:
    from p2pcollab.daemon.frames import encode_frame, read_frame, receive_frame

    frame = read_frame(io.BytesIO(data))

    def check() -> None:
        assert _same(frame, run_at_once(receive_frame(reader(data))))
        if frame is not None:
            assert _same(read_frame(io.BytesIO(encode_frame(frame))), frame)

    return check


def _same(left: object, right: object) -> bool:
    """Equality in which NaN equals itself."""
    return repr(left) == repr(right)


def _frames() -> Iterable[bytes]:
    for fields in (
        {"do": "train", "id": 3, "shards": ["t0"], "frontiers": {"t0": [contribution()]}, "samples": 100},
        {"do": "blob", "id": 4, "digest": "ef" * 32, "data": bytes(100)},
        {"id": 3, "progress": 32, "losses": {"t0": 0.5}},
        {"id": 3, "error": {"kind": "RunError", "what": "it diverged", "fix": ""}},
    ):
        body = pack(fields)
        yield len(body).to_bytes(4, "big") + body


def _frame_allowed() -> tuple[type[Exception], ...]:
    from p2pcollab.daemon.frames import BrokenFrame

    return (BrokenFrame,)


FRAME = Target(
    name="trainer-frame",
    promise="Bytes between daemon and trainer are a message or the end, or BrokenFrame is raised.",
    parse=_parse_frame,
    allowed=_frame_allowed(),
    examples=_frames,
    form="frame",
    bombs=lambda: [
        b"\x3f\xff\xff\xff" + bytes(1000),
        b"\xff\xff\xff\xff" + bytes(1000),
        *((len(bomb)).to_bytes(4, "big") + bomb for bomb in msgpack_bombs(64 * limits.KIB, ("data",))),
    ],
)


# Tensors


@lru_cache
def _shard_example() -> bytes:
    from p2pcollab.models import initial_shard
    from p2pcollab.shards import encode_shard

    return encode_shard(initial_shard(SPEC, ShardId("t1")))


def _shard_body() -> bytes:
    good = _shard_example()
    return good[8 + int.from_bytes(good[:8], "little") :]


def _parse_shard(data: bytes) -> Callable[[], None]:
    """First byte: 0 as it comes, 1 behind the right header, cut or filled to the right length."""
    from p2pcollab.shards import decode_shard, encode_shard

    good, body = _shard_example(), data[1:]
    if data[:1] == b"\x01":
        header = 8 + int.from_bytes(good[:8], "little")
        body = (good[:header] + body + good[header + len(body) :])[: len(good)]
    tensors = decode_shard(body, SPEC, ShardId("t1"))

    def check() -> None:
        assert encode_shard(tensors) == body

    return check


SHARD = Target(
    name="shard",
    promise="The bytes are this run's shard with values that can be, or PeerError is raised.",
    parse=_parse_shard,
    allowed=(PeerError,),
    examples=lambda: [b"\x00" + _shard_example(), b"\x01" + _shard_body()[:2000]],
    length_max=4096,
    bombs=lambda: [
        b"\x00" + (2**63).to_bytes(8, "little") + _shard_example()[8:],
        b"\x00" + b"\xff" * len(_shard_example()),
        b"\x00" + bytes(16 * limits.MIB),
        b"\x00" + _shard_example() * 2,
    ],
)


@lru_cache
def _model_example() -> bytes:
    from p2pcollab.assembly import assemble, to_bytes
    from p2pcollab.models import initial_shard

    header = decode_contribution(contribution(), RUN)
    return to_bytes(assemble(SPEC, {ShardId("t1"): [header]}, lambda one: initial_shard(SPEC, one.shard)))


def _with_digest(data: bytes) -> bytes:
    """A model file with the digest that fits the rest of it."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        digest = hashlib.sha256()
        for key in ("run_spec", "provenance"):
            digest.update(hashlib.sha256(str(metadata.get(key)).encode(errors="replace")).digest())
        digest.update(data[8 + length :])
        metadata["content_sha256"] = digest.hexdigest()
        text = json.dumps(header).encode()
    except Exception:
        return data
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _parse_model(data: bytes) -> Callable[[], None]:
    from p2pcollab.assembly import load_model, read_model

    parsed = read_model(data)

    def check() -> None:
        loaded = load_model(data)
        assert loaded.spec == parsed.spec
        assert not loaded.model.training

    return check


def _model_bombs() -> list[bytes]:
    def raw(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    size = limits.MODEL_HEADER_BYTES_MAX
    inner = [b"[],", b"{},", b'"ab",', b"9e9,", b"1,", b'{"a":1},']
    keys = b",".join(b'"%x":1' % number for number in range(size // 12))
    nested = json_bombs(limits.RUN_SPEC_BYTES_MAX, SPEC.encode())[::8]
    return [
        *(raw(b'{"a":[' + item * ((size - 16) // len(item)) + b"0]}") for item in inner),
        raw(b"{" + keys + b"}"),
        raw(b'{"a":' + b"[" * (size - 8)),
        raw(b'{"a":' + b"9" * (size - 8) + b"}"),
        (2**63).to_bytes(8, "little") + b"{}",
        size.to_bytes(8, "little") + b"{}",
        *(_model_with(run_spec=spec.decode(errors="replace")) for spec in nested),
        *(_model_with(provenance=spec.decode(errors="replace")) for spec in nested),
    ]


def _model_with(**metadata: str) -> bytes:
    data = _model_example()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= metadata
    text = json.dumps(header).encode()
    return _with_digest(len(text).to_bytes(8, "little") + text + data[8 + length :])


MODEL = Target(
    name="model-file",
    promise="The bytes are a model file, or UsageError or IncompatibleError is raised.",
    parse=_parse_model,
    allowed=(UsageError, IncompatibleError),
    examples=lambda: [_model_example()],
    length_max=16_384,
    cpu_ms_per_mib=25.0,
    bombs=_model_bombs,
)
SEALED_MODEL = Target(
    name="sealed-model",
    promise="Whatever somebody writes into a model file with the right digest, it is one, or UsageError or "
    "IncompatibleError is raised.",
    parse=lambda data: _parse_model(_with_digest(data)),
    allowed=(UsageError, IncompatibleError),
    examples=lambda: [_model_example()],
    form="model",
    length_max=16_384,
)


# The state folder


@lru_cache
def _folder() -> Path:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="p2pcollab-fuzz-", dir=memory))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _state_api(data: bytes) -> None:
    from p2pcollab.daemon.api_client import find_daemon

    (_folder() / "api.json").write_bytes(data)
    with suppress(NotRunningError):
        find_daemon(_folder())


def _state_mark(data: bytes) -> None:
    from p2pcollab.daemon.p2pd import end_stale_p2pd

    # It would look for a process of that number and end it, if it is a p2pd: none runs here under this test.
    path = _folder() / "p2pd.json"
    path.write_bytes(data)
    end_stale_p2pd(path)


def _state_options(data: bytes) -> None:
    from p2pcollab.daemon.options import DaemonOptions

    with suppress(UsageError):
        DaemonOptions.parse(data)


def _state_meta(data: bytes) -> None:
    """What the index remembers: of any form, although its rows carry sums."""
    from p2pcollab.daemon import opening
    from p2pcollab.daemon.options import DaemonOptions
    from p2pcollab.daemon.session import Counters

    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(meta, dict):
        return
    store: Any = SimpleNamespace(meta=lambda: meta)
    Counters.restore(meta.get("counters"))
    opening.saved_addresses(store)
    opening.remembered(DaemonOptions(mode="resume", state=_folder()), store)


def _state_kept(data: bytes) -> None:
    from p2pcollab.daemon.kept import KeptFile

    path = _folder() / "kept"
    notices: list[str] = []
    path.write_bytes(data)
    (_folder() / "kept.copy").unlink(missing_ok=True)
    with suppress(StorageError):
        content = KeptFile(path, fix="do this").read(notices)
        assert content == data[: -len(hashlib.sha256().hexdigest()) - 2]


_STATE = (_state_api, _state_mark, _state_options, _state_meta, _state_kept)


def _parse_state(data: bytes) -> None:
    """First byte: which of the files it is."""
    _STATE[(data[0] if data else 0) % len(_STATE)](data[1:])


def _state_files() -> Iterable[bytes]:
    meta = {
        "counters": {"contributions": 3, "training_macs": 10**12},
        "addresses": [f"/ip4/192.168.1.7/tcp/31337/p2p/{ALICE.peer_id}"],
        "options": {"data": "digits", "prefer": ["cat"], "budget": 0.5, "port": 4001},
        "port": 4001,
    }
    content = b"content"
    for number, data in enumerate(
        (
            json.dumps({"port": 4001, "token": "x" * 43, "pid": 2**22 + 1, "started": 1.5}),
            json.dumps({"pid": 2**31 - 1, "started": 1.5, "sockets": "/tmp/p2pcollab-none"}),
            json.dumps({"mode": "join", "state": "/tmp/x", "code": "P2P-X", "prefer": ["cat"]}),
            json.dumps(meta),
            content.decode() + "\n" + hashlib.sha256(content).hexdigest() + "\n",
        )
    ):
        yield bytes([number]) + data.encode()


STATE = Target(
    name="state-file",
    promise="A small file of the state folder is read, or its documented error raised: NotRunningError, "
    "UsageError, StorageError.",
    parse=_parse_state,
    allowed=(P2PCollabError,),
    examples=_state_files,
    form="json",
    prefix=1,
    bombs=lambda: [
        bytes([number]) + bomb
        for number in range(5)
        for bomb in (b"[" * 100_000, b"9" * 5000, b'{"pid":1e999}')
    ],
)
