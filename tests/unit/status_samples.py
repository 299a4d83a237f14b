"""Status dictionaries as the daemon's API gives them, for tests of what is shown."""

from __future__ import annotations

import hashlib
from typing import Any

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUNDRED = tuple(f"class-{index:02d}" for index in range(100))
DEVICES = ("laptop", "pi", "jetson", "desk")


def status(
    classes: tuple[str, ...] = TEN,
    *,
    peers: int = 3,
    work: int = 2,
    progress: float = 0.4,
    complete: bool = False,
) -> dict[str, Any]:
    """A device in the middle of a run, which trains `work` tasks; one task per class."""
    names = [name if index < 4 else f"device-{index}" for index, name in enumerate([*DEVICES, *"x" * 60])]
    names = [f"device-{index}" if name == "x" else name for index, name in enumerate(names)]
    shards = [_shard("stem", "stem", 1.0, ["pi"] if not complete else [])]
    for index, label in enumerate(classes):
        own = progress if index < work else (progress + 0.61 * index) % 1.2
        holders = [names[0]] if index < work else [names[1 + index % max(1, peers)]] if index % 3 == 0 else []
        shards.append(
            _shard(f"t{index}", label, 1.0 if complete else min(1.0, own), [] if complete else holders)
        )
    own_ids = [f"t{index}" for index in range(work)]
    return {
        "run": {
            "id": hashlib.sha256(b"run").hexdigest(),
            "name": "pets",
            "classes": list(classes),
            "model": "alexnet",
            "join_code": "P2P-AAAA-BBBB-CCCC-DDDD-EEEE-FFFF-GGGG-HHHH-IIII-JJJJ",
        },
        "device": {
            "id": hashlib.sha256(b"device").hexdigest()[:32],
            "name": names[0],
            "state": "training" if work else "idle",
            "interface": "eth0",
            "address": "192.168.1.7",
            "port": 41234,
            "pid": 4711,
            "uptime_s": 192.4,
            "speed_macs_s": 3.1e10,
            "budget": 0.5,
            "data": {
                "train": 4000,
                "test": 1000,
                "class_counts": [4000 // len(classes)] * len(classes),
                "notes": ["12 files that are no images were skipped"],
            },
        },
        "phase": "complete" if complete else "training" if work else "idle",
        "work": None
        if not work or complete
        else {
            "shards": own_ids,
            "labels": list(classes[:work]),
            "samples_done": 12_800,
            "samples_total": 20_480,
            "samples_per_s": 812.4,
            "loss": dict.fromkeys(own_ids, 0.2134),
            "eta_s": 9.4,
        },
        "shards": shards,
        "peers": [_peer(names[1 + index], index, classes) for index in range(peers)],
        "ledger": {"digest": hashlib.sha256(b"ledger").hexdigest(), "entries": 34},
        "coverage": 0.9,
        "progress": 1.0 if complete else progress,
        "complete": complete,
        "counters": {
            "training_macs": 1.7e12,
            "bytes_sent": 4_200_000,
            "bytes_received": 3_100_000,
            "contributions": 12,
            "merges": 7,
            "refused": 1,
            "peak_rss_bytes": 812_000_000,
            "trainer_restarts": 0,
            "p2pd_restarts": 0,
        },
        "refused": [
            {
                "device": hashlib.sha256(b"pi").hexdigest()[:32],
                "name": "pi",
                "shard": "t1",
                "label": classes[1],
                "reason": "it is worse than what it would replace",
                "time": 1_790_000_000.0,
            }
        ],
        "timings": {"imports": 1.2, "p2pd": 0.4, "seconds_to_first_training_step": 3.4},
        "warnings": ["the clock of pi is 4 s ahead"],
    }


def early_status() -> dict[str, Any]:
    """A device that has just started: it does not know the run yet."""
    return {
        "run": None,
        "device": {"id": "ab" * 16, "name": "pi", "state": "idle", "uptime_s": 0.4, "data": None},
        "phase": "discovering",
        "work": None,
        "shards": [],
        "peers": [],
        "ledger": None,
        "coverage": 0.0,
        "progress": 0.0,
        "complete": False,
        "counters": {},
        "timings": {},
        "warnings": [],
    }


def events(number: int = 8) -> list[dict[str, Any]]:
    """What happened lately."""
    return [
        {
            "id": index,
            "time": 1_790_000_000.0 + index,
            "kind": "lease",
            "text": f"training cat, dog (lease {index})",
        }
        for index in range(1, number + 1)
    ]


def demo_state(devices: int = 5, classes: tuple[str, ...] = TEN) -> dict[str, Any]:
    """A demo half way: one device was killed, one has not started."""
    rows: list[dict[str, Any]] = []
    for index in range(devices):
        row = {
            "name": [*DEVICES, *(f"device-{n}" for n in range(4, 20))][index],
            "state": "running",
            "note": "",
        }
        row["status"] = status(classes, progress=0.5 + index / 100)
        rows.append(row)
    rows[1] |= {"state": "killed", "note": "killed (SIGKILL)"}
    rows[2] |= {"note": "joined late"}
    rows[-1] |= {"state": "waiting", "status": None}
    return {
        "phase": "training",
        "elapsed_s": 31.2,
        "message": "pi was killed while it trained cat",
        "devices": rows,
    }


def demo_result() -> dict[str, Any]:
    """What a demo measured."""
    digest = hashlib.sha256(b"model").hexdigest()
    return {
        "assembled_accuracy": 0.961,
        "central_accuracy": 0.972,
        "digests": [digest, digest],
        "assembled_on": ["desk", "laptop"],
        "coverage": 1.0,
        "missing": [],
        "devices": [
            {
                "name": name,
                "device": "ab" * 16,
                "budget": 1.0,
                "killed": name == "pi",
                "tasks": ["stem", "cat", "dog", "bird", "frog", "ship", "horse"][: index + 3],
                "samples": 43_110,
                "samples_by_task": {"cat": 43_110},
                "training_macs": 1.1e11 * (index + 1),
                "bytes_sent": 4_200_000,
                "bytes_received": 3_100_000,
                "peak_rss_bytes": 812_000_000,
                "seconds_to_first_training_step": 3.2,
            }
            for index, name in enumerate(DEVICES)
        ],
        "central_training_macs": 1.3e12,
        "central_seconds": 12.0,
        "takeover": {
            "device": "pi",
            "shards": ["t3"],
            "labels": ["cat"],
            "finished_by": {"cat": ["desk", "laptop"]},
        },
        "seconds_to_first_training_step": 3.2,
        "collaboration_s": 44.0,
        "wall_s": 61.0,
        "seed": 0,
        "options": {"dataset": "digits", "devices": 4},
    }


def _shard(shard: str, label: str, progress: float, holders: list[str]) -> dict[str, Any]:
    return {
        "shard": shard,
        "label": label,
        "progress": progress,
        "generation": int(progress * 10),
        "samples": int(progress * 43_110),
        "loss": 0.31,
        "accuracy": 0.823 if progress > 0 else 0.0,
        "holders": holders,
        "contributors": ["desk", "laptop", "pi"] if progress > 0 else [],
        "held": True,
    }


def _peer(name: str, index: int, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "device": hashlib.sha256(name.encode()).hexdigest()[:32],
        "name": name,
        "state": ["training", "idle", "leaving"][index % 3],
        "leases": ["t3"],
        "labels": [classes[3 % len(classes)], classes[5 % len(classes)]],
        "speed": 2.2e9 * (index + 1),
        "last_seen_s": 0.7,
        "address": "192.168.1.12:41555/12D3KooWExample",
        "class_counts": [40] * len(classes),
    }
