"""Mutations that keep the form: msgpack and JSON with another value, a field less, a list more."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any, AnyStr

import msgpack

from p2pcollab import limits

#: What parsers forget.
_SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    *(
        0,
        1,
        -1,
        2,
        127,
        128,
        255,
        256,
        2**31,
        2**32,
        2**53,
        10**15,
        10**15 + 1,
        2**63 - 1,
        2**63,
        -(2**63),
        2**64 - 1,
    ),
    *(0.0, -0.0, 0.5, 1.0, 1e308, float("nan"), float("inf"), -float("inf"), 5e-324),
    *(
        "",
        "a",
        "t0",
        "t1",
        "stem",
        "initial",
        "0" * 32,
        "ab" * 32,
        "\x00",
        "\x1b[2J",
        "é",
        "\U0001f431",
        "x" * 70,
    ),
    *("../x", "t0\n", "training", "left", "1", "[]", "{}"),
    *(b"", b"\x00", bytes(8), bytes(32), bytes(64), b"\xff" * 20),
)


def mutate(data: bytes, form: str, prefix: int, rng: random.Random) -> bytes | None:
    """The input with a few changes inside its form; None if it has none."""
    try:
        match form:
            case "msgpack":
                return data[:prefix] + _packed(_changed(_unpacked(data[prefix:]), rng))
            case "json":
                return data[:prefix] + _canonical(_changed(json.loads(data[prefix:]), rng), rng)
            case "frame":
                body = _packed(_changed(_unpacked(data[4:]), rng))
                return len(body).to_bytes(4, "big") + body
            case "model":
                return _changed_model(data, rng)
            case _:
                return None
    except Exception:
        return None  # it has not that form


def blind(data: bytes, rng: random.Random) -> bytes:
    """The input with bytes changed, for machines without atheris."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at : at + rng.randrange(1, 17)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randrange(1, 17))
            case 3:
                changed[at:at] = changed[rng.randrange(len(changed) + 1) :][:64]
            case _:
                changed[at : at + 1] = rng.choice(
                    (b"\xff", b"\x00", b"\x7f", b"\x80", b'"', b"[", b"\xdc\xff\xff")
                )
    return bytes(changed)


def _unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _canonical(value: Any, rng: random.Random) -> bytes:
    """As this program writes JSON; now and then as others do."""
    plain = rng.random() < 0.1
    text = json.dumps(
        value,
        sort_keys=not plain,
        separators=None if plain else (",", ":"),
        ensure_ascii=plain,
        default=lambda raw: raw.hex(),
    )
    return text.encode(errors="surrogatepass")


def _changed_model(data: bytes, rng: random.Random) -> bytes:
    """The header with a change, or one of the JSON texts inside it; lengths fit."""
    length = int.from_bytes(data[:8], "little")
    header, tail = json.loads(data[8 : 8 + length]), data[8 + length :]
    inner = rng.choice(("", "", "run_spec", "provenance"))
    if inner:
        metadata = header["__metadata__"]
        metadata[inner] = _canonical(_changed(json.loads(metadata[inner]), rng), rng).decode()
    else:
        header = _changed(header, rng)
    text = _canonical(header, rng)
    return len(text).to_bytes(8, "little") + text + tail


def _changed(value: Any, rng: random.Random) -> Any:
    for _ in range(rng.randrange(1, 4)):
        value = _change_one(value, rng)
    return value


def _change_one(value: Any, rng: random.Random) -> Any:
    """One change somewhere in a tree."""
    places: list[Callable[[Any], None]] = []
    held: list[Any] = []

    def walk(node: Any) -> None:
        if len(held) > 2000:
            return
        children: Any = (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        )
        for key, child in list(children):
            held.append(child)
            places.append(partial(node.__setitem__, key))
            walk(child)

    walk(value)
    if not places or rng.random() < 0.05:
        return _instead(value, rng)
    index = rng.randrange(len(places))
    places[index](_instead(held[index], rng))
    return value


def _instead(value: Any, rng: random.Random) -> Any:
    """Something else in the place of a value, often of its kind."""
    if rng.random() < 0.3:
        return rng.choice(_SCALARS)
    match value:
        case bool():
            return not value
        case int():
            return rng.choice(
                (value + 1, value - 1, -value, value * 2, value ^ (1 << rng.randrange(63)), float(value))
            )
        case float():
            return rng.choice((value + 1, -value, value * 1e300, round(value, 1), 0.0))
        case str() if value:
            return _other_text(value, rng)
        case bytes() if value:
            return _other_text(value, rng)
        case list():
            return _other_list(value, rng)
        case dict():
            return _other_map(value, rng)
        case _:
            return rng.choice(_SCALARS)


def _other_text(value: AnyStr, rng: random.Random) -> AnyStr:
    at = rng.randrange(len(value))
    return rng.choice((value[:at], value[at:], value + value[at:], value[:at] + value[at + 1 :]))


def _other_list(value: list[Any], rng: random.Random) -> Any:
    if not value:
        return [rng.choice(_SCALARS)]
    at = rng.randrange(len(value))
    return rng.choice(
        (
            value[:at] + value[at + 1 :],
            [*value, value[at]],
            value[::-1],
            value * rng.choice((2, 3, min(300, limits.CLASSES_MAX // len(value) + 1))),
            [value],
            value[at],
        )
    )


def _other_map(value: dict[Any, Any], rng: random.Random) -> Any:
    if not value:
        return {"a": rng.choice(_SCALARS)}
    key = rng.choice(list(value))
    return rng.choice(
        (
            {name: item for name, item in value.items() if name != key},
            {
                **value,
                rng.choice(("extra", "", "\x1b", key * 2 if isinstance(key, str) else "b")): value[key],
            },
            dict(reversed(value.items())),
            [value],
            value[key],
        )
    )
