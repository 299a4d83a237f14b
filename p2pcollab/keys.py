"""Keys: who a device is (Ed25519), and what knowing the run secret lets it do (HKDF of the secret).

The only randomness in here is `Identity.create`, whose seed no caller may choose by accident.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from .errors import PeerError, StorageError, UsageError
from .run import SECRET_BYTES, DeviceId

SEED_BYTES: Final = 32
PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_KEY_BYTES: Final = 32

# libp2p's protobufs, written by hand because they have one form: field 1 (key type) = 1 (Ed25519), field 2
# (data) = length and bytes. Source: libp2p specs, peer-ids/peer-ids.md.
_LIBP2P_PUBLIC: Final = b"\x08\x01\x12\x20"
_LIBP2P_PRIVATE: Final = b"\x08\x01\x12\x40"
#: Multihash "identity" of 36 bytes: the peer id of a short key is the key itself.
_IDENTITY_MULTIHASH: Final = b"\x00\x24"
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PEER_ID_CHARS_MAX: Final = 64


def device_id(public_key: bytes) -> DeviceId:
    """A device's id: the first 32 hexadecimal digits of its key's SHA-256."""
    return DeviceId(hashlib.sha256(public_key).hexdigest()[:32])


def peer_id(public_key: bytes) -> str:
    """The libp2p peer id of a device, base58: p2pd runs under the same key."""
    return _base58_encode(_IDENTITY_MULTIHASH + _LIBP2P_PUBLIC + public_key)


def public_key_of_peer(peer: str) -> bytes:
    """The Ed25519 public key that a peer id consists of.

    Raises:
        PeerError: it is not the peer id of an Ed25519 key.
    """
    raw = _base58_decode(peer)
    prefix = _IDENTITY_MULTIHASH + _LIBP2P_PUBLIC
    if len(raw) != len(prefix) + PUBLIC_KEY_BYTES or not raw.startswith(prefix):
        raise PeerError("the peer id is not that of an Ed25519 key")
    return raw[len(prefix) :]


def device_of_peer(peer: str) -> DeviceId:
    """The device behind a peer id, which the transport has proved.

    Raises:
        PeerError: it is not the peer id of an Ed25519 key.
    """
    return device_id(public_key_of_peer(peer))


def verify_signature(public_key: bytes, signature: bytes, payload: bytes) -> bool:
    """Whether the holder of `public_key` signed `payload`; False for anything that is not a key."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, payload)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Identity:
    """A device's Ed25519 key pair."""

    #: 32 bytes; never printed.
    seed: bytes = field(repr=False)
    public_key: bytes
    _private: Ed25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def create(cls) -> Identity:
        """A new identity, from the operating system's randomness."""
        return cls.from_bytes(os.urandom(SEED_BYTES))

    @classmethod
    def from_bytes(cls, seed: bytes) -> Identity:
        """The identity of a stored seed.

        Raises:
            StorageError: it has not 32 bytes.
        """
        if len(seed) != SEED_BYTES:
            raise StorageError(
                f"the identity has {len(seed)} bytes instead of {SEED_BYTES}",
                "restore identity.key from a copy, or remove it to become a new device",
            )
        private = Ed25519PrivateKey.from_private_bytes(seed)
        public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return cls(seed=seed, public_key=public, _private=private)

    @property
    def device(self) -> DeviceId:
        """The device's id."""
        return device_id(self.public_key)

    @property
    def peer_id(self) -> str:
        """The device's libp2p peer id, base58."""
        return peer_id(self.public_key)

    @property
    def libp2p_private_key(self) -> bytes:
        """What p2pd reads as its identity file: the protobuf PrivateKey of this key."""
        return _LIBP2P_PRIVATE + self.seed + self.public_key

    def sign(self, payload: bytes) -> bytes:
        """64 bytes; the payload starts with the domain that says what is signed."""
        return self._private.sign(payload)


@dataclass(frozen=True, slots=True)
class RunKeys:
    """What the run secret is good for: one 32-byte key per purpose, so that none can stand in for another."""

    #: Blinds names on the board.
    board_key: bytes = field(repr=False)
    #: Seals records.
    seal_key: bytes = field(repr=False)
    #: Authenticates requests and responses.
    auth_key: bytes = field(repr=False)

    @classmethod
    def derive(cls, secret: bytes) -> RunKeys:
        """The keys of a run secret.

        Raises:
            UsageError: the secret has not 16 bytes.
        """
        if len(secret) != SECRET_BYTES:
            raise UsageError(f"the run secret has {len(secret)} bytes instead of {SECRET_BYTES}")
        return cls(
            board_key=_derive(secret, b"board"),
            seal_key=_derive(secret, b"seal"),
            auth_key=_derive(secret, b"auth"),
        )

    def board_name(self, name: str) -> str:
        """What a name is called on the board: 64 hexadecimal digits that tell a stranger nothing."""
        return hmac.new(self.board_key, name.encode(), hashlib.sha256).hexdigest()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=b"p2pcollab/run-keys/1", info=purpose).derive(
        secret
    )


def _base58_encode(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    zeros = len(data) - len(data.lstrip(b"\x00"))
    return _BASE58[0] * zeros + digits


def _base58_decode(text: str) -> bytes:
    # Bounded first: the arithmetic is quadratic in the length.
    if len(text) > _PEER_ID_CHARS_MAX:
        raise PeerError(f"the peer id has {len(text)} characters, more than {_PEER_ID_CHARS_MAX}")
    number = 0
    for character in text:
        digit = _BASE58.find(character)
        if digit < 0:
            raise PeerError("the peer id has a character that none has")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip(_BASE58[0]))
    return b"\x00" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
