"""The status: a device, its run and its peers as JSON values, for the API and all that show it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from typing import TYPE_CHECKING, Any, cast

from .. import limits
from ..errors import PeerError
from ..run import DeviceId, RunSpec
from .addresses import PeerAddress

if TYPE_CHECKING:
    from ..records import DeviceRecord
    from .node import Node
    from .session import Session


def status(node: Node) -> dict[str, Any]:
    """Everything, as `GET /v1/status` answers. Before the run is known, what belongs to it is empty."""
    session = node.member.session if node.member else None
    spec = session.spec if session else None
    ledger = session.coordinator.ledger if session else None
    shards = _shards(session) if session else []
    trained = [row for row in shards if row["shard"] != "stem" and row["generation"]]
    covered = {index for row in trained for index in (spec.task(row["shard"]).classes if spec else ())}
    return {
        "run": {
            "id": spec.run_id if spec else None,
            "name": spec.name if spec else None,
            "classes": list(spec.classes) if spec else [],
            "model": spec.model.family if spec else None,
            "join_code": str(node.code),
        },
        "device": _device(node),
        "phase": _phase(node),
        "work": _work(node),
        "shards": shards,
        "peers": _peers(session) if session else [],
        "ledger": {
            "digest": ledger.digest().hex() if ledger is not None else None,
            "entries": len(ledger) if ledger is not None else 0,
        },
        "coverage": len(covered) / len(spec.classes) if spec else 0.0,
        "progress": _progress(session.spec, shards) if session else 0.0,
        "complete": session.coordinator.complete if session else False,
        "refused": refused(session) if session else [],
        "board": _board(node),
        "counters": counters(session) if session else {},
        "timings": node.timings.to_status(),
        "warnings": sorted(set(session.warnings.values())) if session else [],
    }


def counters(session: Session) -> dict[str, int]:
    """What this device did in this run."""
    kept = session.counters
    return {
        "training_macs": kept.training_macs,
        "tried_macs": kept.tried_macs,
        "contributions": kept.contributions,
        "merges": kept.merges,
        "refused": kept.refused,
        "peak_rss_bytes": kept.trainer_peak_rss_bytes + peak_rss_bytes(),
        "trainer_restarts": kept.trainer_restarts,
        "strangers_refused": session.transport.counters.refused,
        **session.traffic(),
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def printable_name(wanted: str | None) -> str:
    """A device's name for people, fit for everybody's terminal."""
    name = wanted or platform.node() or "device"
    printable = "".join(character for character in name if character.isprintable())
    return printable[: limits.NAME_CHARS_MAX] or "device"


def _phase(node: Node) -> str:
    member = node.member
    if node.phase == "leaving" or member is None:
        return node.phase
    if member.phase != "ready":
        return member.phase
    if member.worker.progress is not None:
        return "training"
    return "complete" if member.session.coordinator.complete else "idle"


def _device(node: Node) -> dict[str, Any]:
    member, transport = node.member, node.transport
    data = member.data if member else None
    return {
        "id": node.identity.device,
        "name": node.name,
        "state": member.session.coordinator.state if member else "idle",
        "interface": node.interface.name,
        "host": node.interface.address,
        "address": transport.address.option if transport and transport.port else None,
        "port": transport.port if transport else None,
        "pid": os.getpid(),
        "uptime_s": node.timings.uptime_s,
        "speed_macs_s": member.speed_macs_s if member else 0.0,
        "budget": node.options.share_of_machine,
        "data": {
            "train": data.train if data else 0,
            "test": data.test if data else 0,
            "class_counts": list(data.class_counts) if data else [],
            "notes": list(data.notes) if data else [],
        },
    }


def _work(node: Node) -> dict[str, Any] | None:
    progress = node.member.worker.progress if node.member else None
    if progress is None or node.member is None:
        return None
    session = node.member.session
    labels = [session.spec.label(shard) for shard in progress.shards]
    return progress.to_status(labels, session.clock())


def _shards(session: Session) -> list[dict[str, Any]]:
    ledger = session.coordinator.believed
    held = session.store.digests()
    sightings = session.coordinator.sightings(session.clock())
    holders: dict[str, list[str]] = {}
    for own in session.coordinator.leases:
        holders.setdefault(own, []).append(session.own_name)
    for seen in sightings:
        if seen.live:
            for leased in seen.record.leases:
                holders.setdefault(leased, []).append(session.name(DeviceId(seen.record.device)))
    rows = []
    for shard in session.spec.shards:
        frontier = ledger.frontier(shard)
        newest = max(frontier, key=lambda entry: entry.generation, default=None)
        samples_by = ledger.seen(shard)
        rows.append(
            {
                "shard": shard,
                "label": session.spec.label(shard),
                "progress": ledger.progress(shard, session.spec),
                "generation": newest.generation if newest else 0,
                "samples": sum(samples_by.values()),
                "loss": newest.loss if newest else None,
                "accuracy": newest.accuracy if newest else None,
                "holders": sorted(holders.get(shard, [])),
                "contributors": [session.name(device) for device in sorted(samples_by)],
                "authors": [session.name(entry.device) for entry in frontier],
                "samples_by": dict(samples_by),
                "held": all(entry.tensors_digest in held for entry in frontier),
            }
        )
    return rows


def refused(session: Session) -> list[dict[str, Any]]:
    """Contributions that were refused lately, the newest last."""
    return [
        {
            "device": event.fields["device"],
            "name": session.name(DeviceId(event.fields["device"])),
            "shard": event.fields["shard"],
            "label": session.labels([event.fields["shard"]]) or event.fields["shard"],
            "reason": event.fields["reason"],
            "time": event.time,
        }
        for event in session.refusals
    ]


def _peers(session: Session) -> list[dict[str, Any]]:
    rows = []
    for seen in session.coordinator.sightings(session.clock()):
        record = cast("DeviceRecord", seen.record)
        rows.append(
            {
                "device": record.device,
                "name": record.name,
                "state": record.state if seen.live or record.state == "left" else "gone",
                "leases": list(record.leases) if seen.live else [],
                "labels": [
                    session.spec.label(s) for s in session.spec.shards if s in record.leases and seen.live
                ],
                "speed": record.speed,
                "last_seen_s": seen.silent_s,
                "address": _address(record),
                "class_counts": list(record.class_counts),
                "distrusted": session.coordinator.distrusts(DeviceId(record.device)),
            }
        )
    return rows


def _board(node: Node) -> dict[str, int]:
    """What comes from the network and stays in memory, whoever sent it: all of it is bounded."""
    member, transport, discovery = node.member, node.transport, node.discovery
    return {
        **(member.board.held() if member else {"names": 0, "records": 0, "neighbours": 0}),
        "addresses": len(transport.known_addresses) if transport else 0,
        **(discovery.held() if discovery else {"announcements": 0, "mdns_records": 0}),
    }


def _address(record: DeviceRecord) -> str | None:
    """A peer's address as `--peer` takes it."""
    for text in record.addresses:
        with contextlib.suppress(PeerError):
            return PeerAddress.parse(text).option
    return None


def _progress(spec: RunSpec, shards: list[dict[str, Any]]) -> float:
    """Samples seen over all budgets."""
    budgets = [spec.budget(row["shard"]) for row in shards]
    seen = [min(int(row["samples"]), budget) for row, budget in zip(shards, budgets, strict=True)]
    return sum(seen) / sum(budgets)
