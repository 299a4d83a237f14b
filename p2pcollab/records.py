"""Board records: what each device shows of itself, signed by it and sealed for those who know the run secret.

A sealed record is a 12-byte nonce and a ChaCha20-Poly1305 box around public key, signature and payload. The
box is bound to the run, the board's name and the device's subkey, so it opens nowhere else. The nonce comes
from the operating system, here and nowhere else: all devices share the key, and a nonce used twice would
reveal both records. At 100 records a second, two of 96 bits meet within a year with probability 1e-10.
"""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from pydantic import Field, StringConstraints

from . import limits
from .errors import PeerError, RunError
from .keys import (
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    RunKeys,
    device_id,
    device_of_peer,
    peer_id,
    public_key_of_peer,
    verify_signature,
)
from .run import DeviceId, Frozen, RunId
from .wire import CountField, DeviceField, RunField, ShardField, pack, parse

__all__ = [
    "BOARD_DEVICES",
    "DeviceRecord",
    "DeviceState",
    "Identity",
    "RunKeys",
    "device_id",
    "device_of_peer",
    "open_record",
    "peer_id",
    "public_key_of_peer",
    "seal_record",
]

#: Name of the board's dictionary of devices, before `RunKeys.board_name` blinds it. Subkeys: device ids.
BOARD_DEVICES: Final = "devices"

_RECORD_DOMAIN: Final = b"p2pcollab/record/1"
_NONCE_BYTES: Final = 12
_HEAD_BYTES: Final = PUBLIC_KEY_BYTES + SIGNATURE_BYTES
_TAG_BYTES: Final = 16
_OVERHEAD_BYTES: Final = _NONCE_BYTES + _HEAD_BYTES + _TAG_BYTES

DeviceState = Literal["training", "idle", "complete", "leaving", "left", "observer"]

#: Text for a terminal: no control characters, and none that reverse or hide what follows.
_PRINTABLE: Final = r"^[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]+$"
_Nickname = Annotated[
    str, StringConstraints(min_length=1, max_length=limits.NAME_CHARS_MAX, pattern=_PRINTABLE)
]
_Shards = Annotated[tuple[ShardField, ...], Field(max_length=limits.TASKS_MAX + 1, fail_fast=True)]
_Amount = Annotated[float, Field(ge=0.0, le=1e21)]


class DeviceRecord(Frozen):
    """One device as the board shows it."""

    v: Literal[1] = 1
    run_id: RunField
    device: DeviceField
    #: For people; not unique.
    name: _Nickname
    #: Rises with every record of the device, over restarts too. A record with a smaller beat is a replay.
    beat: CountField
    state: DeviceState
    #: Dense-equivalent training MAC per second.
    speed: _Amount
    #: Share of the machine that training may use, 0..1.
    budget: Annotated[float, Field(ge=0.0, le=1.0)]
    #: Training samples per class of the run.
    class_counts: Annotated[tuple[CountField, ...], Field(max_length=limits.CLASSES_MAX, fail_fast=True)]
    #: The only tasks that the device trains; None: all.
    tasks: _Shards | None = None
    prefer: _Shards = ()
    leases: _Shards = ()
    lease_sequence: CountField = 0
    #: (shard, generation, samples) of each shard in the device's ledger.
    progress: Annotated[
        tuple[tuple[ShardField, CountField, CountField], ...],
        Field(max_length=limits.TASKS_MAX + 1, fail_fast=True),
    ] = ()
    #: Multiaddrs.
    addresses: Annotated[
        tuple[
            Annotated[str, StringConstraints(max_length=limits.ADDRESS_CHARS_MAX, pattern=r"^/[!-~]+$")], ...
        ],
        Field(max_length=limits.ADDRESSES_MAX, fail_fast=True),
    ] = ()
    #: Program and libraries, for diagnosis.
    versions: Annotated[str, StringConstraints(max_length=limits.NAME_CHARS_MAX, pattern=r"^[ -~]*$")] = ""


def seal_record(keys: RunKeys, identity: Identity, record: DeviceRecord) -> bytes:
    """The bytes to store under the device's subkey.

    Raises:
        RunError: the record is longer than the board takes.
    """
    assert record.device == identity.device
    payload = pack(dict(record))
    signature = identity.sign(_RECORD_DOMAIN + payload)
    nonce = os.urandom(_NONCE_BYTES)
    box = ChaCha20Poly1305(keys.seal_key).encrypt(
        nonce, identity.public_key + signature + payload, _bound_to(record.run_id, record.device)
    )
    sealed = nonce + box
    if len(sealed) > limits.RECORD_BYTES_MAX:
        raise RunError(
            f"this device's record has {len(sealed)} bytes, more than {limits.RECORD_BYTES_MAX}",
            "make a run with fewer classes or tasks",
        )
    return sealed


def open_record(keys: RunKeys, data: bytes, run_id: RunId, device: DeviceId) -> DeviceRecord:
    """The record that was found under the subkey `device`.

    Raises:
        PeerError: it is not a record of that device in this run, or its maker does not know the run secret.
    """
    if not _OVERHEAD_BYTES <= len(data) <= limits.RECORD_BYTES_MAX:
        raise PeerError(f"a record has {len(data)} bytes, not {_OVERHEAD_BYTES} to {limits.RECORD_BYTES_MAX}")
    try:
        content = ChaCha20Poly1305(keys.seal_key).decrypt(
            data[:_NONCE_BYTES], data[_NONCE_BYTES:], _bound_to(run_id, device)
        )
    except InvalidTag:
        raise PeerError("a record was not sealed for this run and device") from None
    public_key, signature = content[:PUBLIC_KEY_BYTES], content[PUBLIC_KEY_BYTES:_HEAD_BYTES]
    payload = content[_HEAD_BYTES:]
    if device_id(public_key) != device:
        raise PeerError("a record's key is not that of its device")
    if not verify_signature(public_key, signature, _RECORD_DOMAIN + payload):
        raise PeerError("a record's signature is not valid")
    record = parse(DeviceRecord, payload, limits.RECORD_BYTES_MAX)
    # The device signed these two itself: it cannot have meant another place.
    if record.run_id != run_id or record.device != device:
        raise PeerError("a record names another run or device than it is sealed for")
    return record


def _bound_to(run_id: RunId, device: DeviceId) -> bytes:
    # msgpack keeps the parts apart whatever a subkey from the board looks like.
    return _RECORD_DOMAIN + pack([run_id, BOARD_DEVICES, device])
