"""What an attacker sends: strategies for bytes that break parsers, shared by the tests of all that parse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: No deadlines: a busy machine is not a defect.
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

#: Well-known bombs: deep nesting, huge declared lengths, empty containers by the thousand, extension types,
#: keys that cannot be hashed, text that is not UTF-8, and the byte that msgpack never uses.
BOMBS: tuple[bytes, ...] = (
    b"",
    b"\x91" * 100_000,
    b"\x81\xa1a" * 100_000,
    b"\x81\x91" * 10_000,
    b"\x81\x80\x80",
    b"\x81\x90\x00",
    b"\x81\x01\x02",
    b"\xdc\xff\xff" + b"\x80" * 0xFFFF,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",
    b"\x81\xa1a\xc7\x00\x05",
    b"\x81\xa1a\xa2\xff\xfe",
    b"\x81\xa1a\xa3\xed\xa0\x80",
    b"\xc1",
    b"{" * 100_000,
    b"[" * 100_000,
    b'{"protocol":' + b"9" * 5_000 + b"}",
    b"\x00" * 1_000_000,
)

_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=70)
    | st.binary(max_size=70)
    | st.sampled_from(["", "stem", "t0", "t99999", "\x1b[2J", "0" * 32, "g" * 64, b"\x00" * 32, b"\x00" * 64])
)
_keys = st.text(max_size=8) | st.binary(max_size=8)
#: Anything that msgpack can say.
values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` with bytes flipped, cut off, inserted, repeated or overwritten; never `valid` itself."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "overwrite"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                data += data[at:]
            case _:
                patch = draw(st.binary(min_size=1, max_size=16) | st.sampled_from(BOMBS[8:17]))
                data[at : at + len(patch)] = patch
    result = bytes(data)
    return result if result != valid else result + b"\x00"


@st.composite
def mutated_map(draw: st.DrawFn, valid: dict[str, Any]) -> dict[Any, Any]:
    """`valid` with one field replaced, removed or added: well-formed msgpack with the wrong content."""
    fields: dict[Any, Any] = dict(valid)
    name = draw(st.sampled_from(sorted(valid)))
    match draw(st.sampled_from(["replace", "remove", "add"])):
        case "replace":
            fields[name] = draw(values)
        case "remove":
            del fields[name]
        case _:
            fields[draw(_keys)] = draw(values)
    return fields


def only_raises(allowed: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> None:
    """Run `call`, which may return or raise what is allowed; all else fails the test."""
    try:
        call()
    except allowed as error:
        text = str(error)
        assert text.isprintable(), "a peer's control characters reached an error message"
        assert len(text) < 500


def refused(allowed: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> None:
    """`call` must raise what is allowed."""
    with pytest.raises(allowed):
        call()


def pack(value: object) -> bytes:
    """msgpack, independent of the code under test."""
    packed: bytes = msgpack.packb(value)
    return packed
