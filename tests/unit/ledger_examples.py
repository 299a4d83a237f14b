"""Contributions and histories for the tests of ledger, merging, allotment and coordinator."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from p2pcollab.ledger import Contribution, Ledger, next_generation, successor_seen
from p2pcollab.run import STEM, DeviceId, InputSpec, ModelSpec, RunId, RunSpec, Schedule, ShardId, TaskSpec

T0 = ShardId("t0")


def device(index: int) -> DeviceId:
    return DeviceId(f"{index:032x}")


def small_spec(
    classes: int = 4, *, budget: int = 1000, lease: int = 100, batch: int = 10, seal: float = 0.5
) -> RunSpec:
    return RunSpec(
        name="example",
        classes=tuple(f"class {index}" for index in range(classes)),
        tasks=tuple(TaskSpec(id=f"t{index}", classes=(index,)) for index in range(classes)),
        model=ModelSpec(family="digits", stem_stages=1, branch_width=0.25),
        input=InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), augment="none"),
        schedule=Schedule(
            budget_samples=budget,
            lease_samples=lease,
            batch_size=batch,
            peak_lr=0.1,
            stem_seal_fraction=seal,
        ),
        seed=0,
    )


def contribution(
    author: int = 0,
    seen: Mapping[int, int] | None = None,
    *,
    shard: ShardId = T0,
    generation: int = 1,
    **changes: Any,
) -> Contribution:
    counts = seen if seen is not None else {author: 10}
    digest = f"{author}-{shard}-{generation}-{sorted(counts.items())}".encode().hex()
    entry = Contribution(
        run_id=RunId("run"),
        shard=shard,
        device=device(author),
        public_key=b"",
        generation=generation,
        seen=tuple((device(index), count) for index, count in sorted(counts.items())),
        lease_samples=10,
        stem_digest="" if shard == STEM else "initial",
        tensors_digest=digest,
        tensors_bytes=1,
        loss=1.0,
        accuracy=0.5,
        signature=b"",
    )
    return replace(entry, **changes) if changes else entry


def successor(
    parents: tuple[Contribution, ...], author: int, samples: int = 10, *, shard: ShardId = T0, **changes: Any
) -> Contribution:
    """What an honest device makes of `parents`."""
    seen = {int(other, 16): count for other, count in successor_seen(parents, device(author), samples)}
    return contribution(
        author,
        seen,
        shard=shard,
        generation=next_generation(parents),
        **{"lease_samples": samples, **changes},
    )


def history(seed: int, *, devices: int = 4, steps: int = 12, shards: int = 2) -> list[Contribution]:
    """What honest devices make when each knows a random part of what the others made."""
    rng = random.Random(seed)
    known = [Ledger() for _ in range(devices)]
    made: list[Contribution] = []
    for _ in range(steps):
        author = rng.randrange(devices)
        known[author] = known[author].add_all(entry for entry in made if rng.random() < 0.4)
        shard = ShardId(f"t{rng.randrange(shards)}")
        entry = successor(known[author].frontier(shard), author, rng.randrange(1, 50), shard=shard)
        known[author] = known[author].add(entry)
        made.append(entry)
    return made
