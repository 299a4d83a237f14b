"""What a fuzz target is, and what all of them are made of: actors, and bombs.

A target is one parser of bytes from outside, as a function of bytes, with its promise in one sentence. They
are in fuzz_messages.py, fuzz_text.py and fuzz_files.py, and listed in fuzz_targets.py.

`scripts/fuzz` feeds them what a fuzzer invents; the suite feeds them the corpus (tests/corpus/<name>/) and
what hypothesis invents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgpack

from p2pcollab import limits
from p2pcollab.keys import Identity, RunKeys
from p2pcollab.records import DeviceRecord
from p2pcollab.run import DeviceId, InputSpec, ModelSpec, RunId, RunSpec, Schedule, ShardId, TaskSpec
from p2pcollab.wire import encode_contribution, sign_contribution

CORPUS = Path(__file__).parents[1] / "corpus"

#: Bounds for one input. Inputs are up to `Target.length_max` bytes; larger ones are `Target.bombs`.
CPU_MS_MAX = 10.0
MEMORY_BYTES_MAX = 64 * limits.MIB


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parser."""

    name: str
    #: In one sentence.
    promise: str
    #: Parses; raises what is allowed, or breaks the promise. May return a check of what was accepted, which
    #: is no part of the parser, and not timed.
    parse: Callable[[bytes], Callable[[], None] | None]
    #: The errors that are documented.
    allowed: tuple[type[Exception], ...]
    #: Valid inputs.
    examples: Callable[[], Iterable[bytes]]
    #: What an input looks like behind its first bytes, for a mutator that keeps the form. `frame`: msgpack
    #: behind its length; `model`: a JSON header behind its length, then anything.
    form: Literal["msgpack", "json", "frame", "model", "bytes"] = "bytes"
    prefix: int = 0
    length_max: int = 4096
    #: CPU time on top of the bound, for what is allowed to be large.
    cpu_ms_per_mib: float = 0.0
    #: Inputs of the largest size, with the largest lies.
    bombs: Callable[[], Iterable[bytes]] = tuple

    def accepts(self, data: bytes) -> bool:
        """Whether the input is parsed. Any error that comes out of here breaks the promise."""
        check = self.attempt(data)
        if check is not None:
            check()
        return check is not None

    def attempt(self, data: bytes) -> Callable[[], None] | None:
        """Only the parser: the check of what it accepted, or None if it refused."""
        try:
            return self.parse(data) or _nothing_to_check
        except self.allowed as error:
            text = str(error)
            assert len(text) < 600, f"an error of {len(text)} characters"
            assert text.isprintable(), "control characters from outside in an error"
            return None

    def corpus(self) -> list[Path]:
        """The kept inputs."""
        return sorted(path for path in (CORPUS / self.name).iterdir() if path.is_file())


def _nothing_to_check() -> None:
    pass


def pack(value: object) -> bytes:
    """msgpack, independent of the code under test."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: bytes) -> Any:
    """Any msgpack, as far as it goes."""
    with suppress(Exception):
        return msgpack.unpackb(data, strict_map_key=False, max_array_len=1000)
    return None


# Actors

RUN = RunId("ab" * 32)
ALICE, BOB = (Identity.from_bytes(bytes([number]) * 32) for number in (1, 2))
KEYS = RunKeys.derive(b"the run's secret")
NOW = 1_800_000_000.0
SPEC = RunSpec(
    name="pets",
    classes=("cat", "dog", "größe"),
    tasks=(TaskSpec(id="t0", classes=(0, 1)), TaskSpec(id="t1", classes=(2,))),
    model=ModelSpec(family="digits", stem_stages=1, stem_width=0.1, branch_width=0.02),
    input=InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), augment="shift"),
    schedule=Schedule(budget_samples=1000, lease_samples=600, batch_size=10, peak_lr=0.1),
    seed=7,
)


def contribution(**changes: Any) -> bytes:
    """A contribution of Alice's, encoded."""
    wanted: dict[str, Any] = {
        "run_id": RUN,
        "shard": ShardId("t1"),
        "generation": 2,
        "seen": {ALICE.device: 640, DeviceId("0" * 32): 128},
        "lease_samples": 512,
        "stem_digest": "cd" * 32,
        "tensors_digest": "ef" * 32,
        "tensors_bytes": 123_456,
        "loss": 0.5,
        "accuracy": 0.75,
    }
    return encode_contribution(sign_contribution(ALICE, **(wanted | changes)))


def record(**changes: Any) -> DeviceRecord:
    """A record of Alice's."""
    wanted: dict[str, Any] = {
        "run_id": RUN,
        "device": ALICE.device,
        "name": "küchen-pi",
        "beat": round(NOW * 1000),
        "state": "training",
        "speed": 2.5e9,
        "budget": 0.5,
        "class_counts": (10, 0, 300),
        "prefer": ("t1",),
        "leases": ("t0", "t1"),
        "lease_sequence": 4,
        "progress": (("stem", 2, 512), ("t0", 1, 128)),
        "addresses": ("/ip4/192.168.1.7/tcp/31337/p2p/" + ALICE.peer_id,),
        "versions": "p2pcollab 0.1.0",
    }
    return DeviceRecord(**(wanted | changes))


# Bombs: what the largest message can hold at worst.


def msgpack_bombs(size: int, fields: Iterable[str]) -> list[bytes]:
    """msgpack of about `size` bytes: many small things, deep nesting, lengths that lie."""
    bombs = [b"\x91" * size, b"\xdc\x10\x00" * (size // 3), b"\x81\xa1a" * (size // 3), b"\x00" * size]
    for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"):
        bombs.append(head + b"\xff\xff\xff\xff" + b"\x01" * (size - 5))
    for field in fields:
        for item in (b"\x80", b"\x90", b"\xa0", b"\xc0", b"\x01", b"\xd0\x80", b"\xa2ab", b"\xcb" + bytes(8)):
            rows = max(1, (size - 64) // (3 + 4000 * len(item)))
            row = b"\xdc" + (4000).to_bytes(2, "big") + item * 4000
            body = b"\xdc" + min(rows, 4096).to_bytes(2, "big") + row * min(rows, 4096)
            bombs.append(b"\x81" + pack(field) + body)
        # As many elements as may be, each of which is wrong.
        wrong: tuple[object, ...] = (["x", "y", -1, b""], ["t0", "x"], {}, b"", -1, None)
        for element in wrong:
            count = min(4096, (size - 64) // max(1, len(pack(element))))
            bombs.append(pack({field: [element] * count}))
    bombs.append(pack({f"field {number}": 1 for number in range(128)}))
    return [bomb[:size] for bomb in bombs]


def json_bombs(size: int, spec: bytes) -> list[bytes]:
    """JSON of about `size` bytes, some of it in the places of a run spec's lists."""

    def filled(before: bytes, item: bytes, after: bytes) -> bytes:
        count = (size - len(before) - len(after)) // (len(item) + 1)
        return before + b",".join([item] * count) + after

    bombs = [
        b"[" * size,
        b'{"a":' * (size // 5),
        b"9" * size,
        b" " * size,
        spec[:-1] + b" " * (size - len(spec)),
    ]
    for item in (b'""', b"{}", b"[]", b"1", b"1e9", b'"ab"', b'{"id":1}', b"null"):
        bombs.append(filled(b'{"protocol":2,"x":[', item, b"]}"))
        for field in (b"classes", b"tasks"):
            bombs.append(filled(b'{"protocol":2,"' + field + b'":[', item, b"]}"))
        bombs.append(filled(b'{"protocol":2,"tasks":[{"id":"t0","classes":[', item, b"]}]}"))
        bombs.append(filled(b'{"protocol":2,"input":{"mean":[', item, b"]}}"))
    keys = b",".join(b'"%x":1' % number for number in range(size // 10))
    bombs += [b'{"protocol":2,' + keys + b"}", b'{"protocol":2,"model":{' + keys + b"}}"]
    return [bomb[:size] for bomb in bombs]


# Coroutines


def run_at_once(work: Any) -> Any:
    """Run a coroutine that never waits: everything that it reads is there."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits for more")


def reader(data: bytes) -> asyncio.StreamReader:
    """A stream that brings these bytes, and ends."""
    # It needs a loop only to wait, and to ask it whether it debugs.
    loop: Any = SimpleNamespace(get_debug=lambda: False)
    stream = asyncio.StreamReader(limit=limits.MIB, loop=loop)
    stream.feed_data(data)
    stream.feed_eof()
    return stream
