"""Rotation of the run secret: how the members of a run shut out a device, with no server.

The device on which a person says `forget` makes a *notice*: the next epoch's run secret, sealed to each
remaining member alone, and signed. A notice is one document that goes from device to device, as it is:
whoever is a member finds its own box in it, and nobody else learns anything but who the members are. What a
device was that missed it does not matter: it asks any member that has it, later.

    state --judge(notice)--> ADOPT   the notice is newer, and has a box for this device
                             IGNORE  it is the same, older, or from somebody who is not to be believed
                             SHUT_OUT  it is newer, and this device is what it forgets

Notices have a total order: the higher epoch, then the smaller digest. So two people who forget a device each
at the same moment converge on one of the two notices, and whose notice lost makes another one, of the epoch
after it, that forgets both.

A device never believes a notice by whom it has forgotten itself: otherwise, the one that is shut out would
answer with a notice of its own. The price: if one of two people who do this at the same moment forgets the
*other one's* device, the order in which the others hear of it decides, and may differ between them.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field

from . import limits
from .errors import PeerError, RunError, StorageError, UsageError
from .keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, device_id, verify_signature
from .run import SECRET_BYTES, DeviceId, Frozen, RunId
from .wire import DeviceField, RunField, pack, parse

_NOTICE_DOMAIN: Final = b"p2pcollab/rotation/1"
_BOX_DOMAIN: Final = b"p2pcollab/rotation-box/1"
_DIGEST_DOMAIN: Final = b"p2pcollab/rotation-secret/1"
_BOX_BYTES: Final = SECRET_BYTES + 16
#: A box's key is used once, so its nonce may be the same for all.
_NONCE: Final = bytes(12)
_P: Final = 2**255 - 19

_PublicKey = Annotated[bytes, Field(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
_Box = Annotated[bytes, Field(min_length=_BOX_BYTES, max_length=_BOX_BYTES)]


class Notice(Frozen):
    """That some devices are forgotten, and the run secret from now on, sealed to each of the others."""

    run_id: RunField
    epoch: Annotated[int, Field(ge=1, le=limits.COUNT_MAX)]
    #: Tells whether a secret is that of this notice; nothing about it.
    secret_digest: Annotated[bytes, Field(min_length=32, max_length=32)]
    author: _PublicKey
    #: All devices that were ever forgotten, sorted.
    forgotten: Annotated[
        tuple[DeviceField, ...], Field(min_length=1, max_length=limits.FORGOTTEN_MAX, fail_fast=True)
    ]
    #: X25519 public key, used for these boxes only.
    ephemeral: _PublicKey
    #: Public key and box of every member, sorted; the author's too.
    boxes: Annotated[
        tuple[tuple[_PublicKey, _Box], ...],
        Field(min_length=1, max_length=limits.DEVICES_MAX, fail_fast=True),
    ]
    signature: Annotated[bytes, Field(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]

    def encode(self) -> bytes:
        """The one encoding."""
        return pack(dict(self))

    @classmethod
    def decode(cls, data: bytes, run_id: RunId) -> Notice:
        """A notice of this run that its author has signed.

        Raises:
            PeerError: it is something else.
        """
        notice = parse(cls, data, limits.NOTICE_BYTES_MAX)
        if notice.run_id != run_id:
            raise PeerError("the notice is of another run")
        if notice.encode() != data:
            raise PeerError("the notice is not in canonical form")
        keys = [key for key, _ in notice.boxes]
        if list(notice.forgotten) != sorted(set(notice.forgotten)) or keys != sorted(set(keys)):
            raise PeerError("the notice's devices are not in order")
        members = set(map(device_id, keys))
        if members & set(notice.forgotten) or notice.author not in keys:
            raise PeerError("the notice forgets one of those that it is for, or its author")
        if not verify_signature(notice.author, notice.signature, notice.payload()):
            raise PeerError("the notice's signature is not valid")
        return notice

    def payload(self) -> bytes:
        """What the signature covers."""
        fields = dict(self)
        del fields["signature"]
        return _NOTICE_DOMAIN + pack(fields)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the whole notice."""
        return hashlib.sha256(self.encode()).digest()

    @property
    def author_id(self) -> DeviceId:
        """The device that made it."""
        return device_id(self.author)

    def is_newer_than(self, other: Notice | None) -> bool:
        """A total order, the same on all devices."""
        if other is None:
            return True
        return (-self.epoch, self.digest) < (-other.epoch, other.digest)

    def fits(self, secret: bytes) -> bool:
        """Whether this is the secret in its boxes."""
        return _digest_of(self.run_id, secret) == self.secret_digest

    def open(self, identity: Identity) -> bytes | None:
        """The new secret, for one of the members; None for everybody else.

        Raises:
            PeerError: the box with this device's name on it holds something else.
        """
        box = dict(self.boxes).get(identity.public_key)
        if box is None:
            return None
        try:
            shared = _private_key(identity.seed).exchange(X25519PublicKey.from_public_bytes(self.ephemeral))
            secret = ChaCha20Poly1305(
                _box_key(shared, self.ephemeral, identity.public_key, self.run_id, self.epoch)
            ).decrypt(_NONCE, box, None)
        except (InvalidTag, ValueError):
            raise PeerError("this device's box in the notice cannot be opened") from None
        if not self.fits(secret):
            raise PeerError("this device's box in the notice holds another secret than the notice names")
        return secret


class Verdict(enum.Enum):
    """What to do about a notice."""

    ADOPT = "adopt"
    IGNORE = "ignore"
    SHUT_OUT = "shut out"


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationState:
    """What a device knows of the run secret and of who shares it."""

    run_id: RunId
    secret: bytes = field(repr=False)
    #: The newest notice; None while the run has the secret that it was made with, or this device has joined
    #: with a later one and was not told of its notice yet.
    notice: Notice | None = None
    #: Public keys of the devices that have proved to be in the run, this one included.
    members: Mapping[DeviceId, bytes] = field(default_factory=dict)
    #: Secrets of before, newest first: to tell those who still use them why they are refused.
    retired: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def epoch(self) -> int:
        """How often the secret was changed."""
        return self.notice.epoch if self.notice else 0

    @property
    def forgotten(self) -> frozenset[DeviceId]:
        """Devices that are shut out."""
        return frozenset(map(DeviceId, self.notice.forgotten)) if self.notice else frozenset()

    def is_member(self, device: DeviceId) -> bool:
        """Whether a device has proved to be in the run, and was not forgotten since."""
        return device in self.members and device not in self.forgotten

    def with_members(self, public_keys: Iterable[bytes]) -> RotationState:
        """With more members, as far as there is room; the forgotten ones never are."""
        members = dict(self.members)
        for key in public_keys:
            device = device_id(key)
            if len(members) < limits.DEVICES_MAX and device not in self.forgotten:
                members.setdefault(device, key)
        return self if len(members) == len(self.members) else replace(self, members=members)

    def with_secret(self, secret: bytes) -> RotationState:
        """With a secret that a person has typed in: its notice is not known yet."""
        return replace(self, secret=secret, notice=None, retired=_retire(self))


def forget(
    state: RotationState,
    identity: Identity,
    devices: Iterable[DeviceId],
    *,
    secret: bytes,
    ephemeral_seed: bytes,
) -> Notice:
    """A notice that forgets devices besides those that are forgotten already.

    Args:
        secret: the new run secret, 16 random bytes.
        ephemeral_seed: 32 random bytes, for this notice only.

    Raises:
        UsageError: one of the devices is this one.
        RunError: more devices were forgotten than a run can.
    """
    assert len(secret) == SECRET_BYTES and secret != state.secret
    forgotten = state.forgotten | set(devices)
    if identity.device in forgotten:
        raise UsageError(
            "a device cannot forget itself", "type this on another device, or use `p2pcollab leave`"
        )
    if len(forgotten) > limits.FORGOTTEN_MAX:
        raise RunError(
            f"a run forgets {limits.FORGOTTEN_MAX} devices at most", "make a new run with `p2pcollab new`"
        )
    ephemeral = X25519PrivateKey.from_private_bytes(ephemeral_seed)
    public = ephemeral.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    keys = {key for device, key in state.members.items() if device not in forgotten}
    epoch = state.epoch + 1
    boxes = []
    for key in sorted(keys | {identity.public_key}):
        try:
            shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(x25519_public_key(key)))
        except ValueError:
            continue  # no honest device has such a key
        box = ChaCha20Poly1305(_box_key(shared, public, key, state.run_id, epoch))
        boxes.append((key, box.encrypt(_NONCE, secret, None)))
    unsigned = Notice(
        run_id=state.run_id,
        epoch=epoch,
        secret_digest=_digest_of(state.run_id, secret),
        author=identity.public_key,
        forgotten=tuple(sorted(forgotten)),
        ephemeral=public,
        boxes=tuple(boxes),
        signature=bytes(SIGNATURE_BYTES),
    )
    return unsigned.model_copy(update={"signature": identity.sign(unsigned.payload())})


def judge(
    state: RotationState, notice: Notice, identity: Identity, relay: DeviceId | None
) -> tuple[Verdict, bytes]:
    """What to do about a notice that `Notice.decode` has accepted, and the new secret if it is to be adopted.

    Args:
        relay: the device that handed it over, which the transport has proved; None: this device itself, its
            disk, or one that has proved that it knows the present secret.

    Raises:
        PeerError: its box for this device is spoilt.
    """
    vouched = relay is None or state.is_member(relay) or state.is_member(notice.author_id)
    if notice.author_id in state.forgotten or relay in state.forgotten or not vouched:
        return Verdict.IGNORE, b""
    if not notice.is_newer_than(state.notice) or notice.epoch > state.epoch + limits.EPOCHS_AHEAD_MAX:
        return Verdict.IGNORE, b""
    if identity.device in notice.forgotten:
        return Verdict.SHUT_OUT, b""
    # Who came with a join code of after the notice has no box in it.
    secret = state.secret if notice.fits(state.secret) else notice.open(identity)
    return (Verdict.IGNORE, b"") if secret is None else (Verdict.ADOPT, secret)


def adopt(state: RotationState, notice: Notice, secret: bytes) -> RotationState:
    """The state after `judge` has said ADOPT."""
    assert notice.fits(secret)
    retired = state.retired if secret == state.secret else _retire(state)
    later = replace(state, secret=secret, notice=notice, retired=retired)
    members = {device: key for device, key in state.members.items() if device not in later.forgotten}
    return replace(later, members=members).with_members(key for key, _ in notice.boxes)


def left_out(before: RotationState, after: RotationState, identity: Identity) -> frozenset[DeviceId]:
    """Devices that this one's own notice forgot, and the one in its place does not: to be forgotten anew."""
    if before.notice is None or before.notice.author != identity.public_key:
        return frozenset()
    return before.forgotten - after.forgotten


class _KeptState(Frozen):
    """A state as a file; its members are kept elsewhere."""

    secret: Annotated[bytes, Field(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    #: Empty: none is known.
    notice: Annotated[bytes, Field(max_length=limits.NOTICE_BYTES_MAX)]
    retired: Annotated[
        tuple[Annotated[bytes, Field(min_length=SECRET_BYTES, max_length=SECRET_BYTES)], ...],
        Field(max_length=limits.RETIRED_SECRETS_MAX, fail_fast=True),
    ]


def encode_state(state: RotationState) -> bytes:
    """What of a state is to be remembered, the members apart."""
    kept = _KeptState(
        secret=state.secret,
        notice=state.notice.encode() if state.notice else b"",
        retired=state.retired,
    )
    return pack(dict(kept))


def decode_state(data: bytes, run_id: RunId) -> RotationState:
    """The state of `encode_state`.

    Raises:
        StorageError: these are other bytes.
    """
    try:
        kept = parse(_KeptState, data, 2 * limits.NOTICE_BYTES_MAX)
        notice = Notice.decode(kept.notice, run_id) if kept.notice else None
        if notice is not None and not notice.fits(kept.secret):
            raise PeerError("the secret is not that of the notice")
    except PeerError as error:
        raise StorageError(
            f"the run's stored secret cannot be used: {error}", "join the run again with its join code"
        ) from error
    state = RotationState(run_id=run_id, secret=kept.secret, notice=notice, retired=kept.retired)
    return state.with_members(key for key, _ in notice.boxes) if notice else state


def x25519_public_key(ed25519_public_key: bytes) -> bytes:
    """The key to seal to for the holder of an Ed25519 key: the same point on the curve's other form.

    Source: RFC 7748, section 4.1, u = (1 + y) / (1 - y); libsodium's crypto_sign_ed25519_pk_to_curve25519.

    Raises:
        ValueError: no device has such a key.
    """
    y = int.from_bytes(ed25519_public_key, "little") & ((1 << 255) - 1)
    if y >= _P or y in (0, 1, _P - 1):
        raise ValueError("not a key that a device can have")
    return ((1 + y) * pow(1 - y, -1, _P) % _P).to_bytes(32, "little")


def _private_key(seed: bytes) -> X25519PrivateKey:
    # Ed25519's own scalar (RFC 8032, section 5.1.5); X25519 sets the same bits of it.
    return X25519PrivateKey.from_private_bytes(hashlib.sha512(seed).digest()[:32])


def _box_key(shared: bytes, ephemeral: bytes, recipient: bytes, run_id: str, epoch: int) -> bytes:
    info = _BOX_DOMAIN + pack([run_id, epoch, ephemeral, recipient])
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(shared)


def _digest_of(run_id: str, secret: bytes) -> bytes:
    return hashlib.sha256(_DIGEST_DOMAIN + pack([run_id, secret])).digest()


def _retire(state: RotationState) -> tuple[bytes, ...]:
    return (state.secret, *state.retired)[: limits.RETIRED_SECRETS_MAX]
