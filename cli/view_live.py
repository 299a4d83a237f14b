"""The live view of one device: what it does now, how far every task is, what has happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import format as fmt
from .parts import (
    Status,
    bar,
    event_line,
    live_peers,
    own_shards,
    panel,
    peer_table,
    refused_lines,
    state_text,
    task_table,
    warning_lines,
)

_WIDE = 140
_PHASES = {
    "starting": "starting",
    "discovering": "looking for devices of this run",
    "fetching-spec": "fetching the run's description",
    "loading": "loading the data",
    "measuring": "measuring this device's speed",
    "idle": "nothing to train at the moment",
    "training": "starting the next lease",
    "complete": "the run is complete; this device goes on serving it",
    "leaving": "saying good-bye",
}


def live_view(
    status: Status,
    events: Sequence[Mapping[str, Any]],
    *,
    width: int,
    height: int,
    message: str = "",
) -> Group:
    """Everything that `join` and `watch` show, in at most `height` lines where that is possible at all."""
    blocks: list[RenderableType] = [*header(status, width), work_panel(status, width)]
    warnings = [*warning_lines(status)[:3], *refused_lines(status, 2, before="refused ")]
    left = height - 3 - _work_rows(status) - 2 - len(warnings) - 1
    event_rows = min(5, len(events), max(0, (left - 11) // 5))
    peers = len(status.get("peers") or ())
    peer_rows = min(max(1, peers), max(1, left // 5))
    # Frames are 2 lines each, the headings of the table of peers 1.
    task_rows = left - (event_rows + 2 if event_rows else 0) - 2
    if width >= _WIDE:
        tables = Table.grid(expand=True)
        tables.add_column(ratio=3)
        tables.add_column(ratio=2)
        left_cells, right_cells = width * 3 // 5, width * 2 // 5
        tables.add_row(
            panel("tasks", task_table(status, left_cells, max(3, task_rows))),
            panel("devices", peer_table(status, right_cells, max(2, task_rows - 1))),
        )
        blocks.append(tables)
    else:
        task_rows -= peer_rows + 3
        blocks.append(panel("tasks", task_table(status, width, max(3, task_rows))))
        blocks.append(panel("devices", peer_table(status, width, peer_rows)))
    if event_rows:
        blocks.append(panel("events", Group(*(event_line(event) for event in events[-event_rows:]))))
    blocks.extend(warnings)
    if message:
        blocks.append(Text(message, style="bold yellow"))
    return Group(*blocks)


def header(status: Status, width: int) -> list[RenderableType]:
    """Which run, which device, where, and how far the whole is."""
    run, device = status.get("run") or {}, status.get("device") or {}
    first = Table.grid(expand=True)
    first.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    first.add_column(justify="right", no_wrap=True)
    title = Text(fmt.plain(run.get("name") or "no run yet"), style="bold")
    if run.get("classes"):
        details = f"  {fmt.plain(run.get('model'))} · {fmt.plural(len(run['classes']), 'class', 'classes')}"
        title.append(details, style="dim")
    first.add_row(title, state_text(status.get("phase")))
    where = [fmt.plain(device.get("name") or "this device")]
    if device.get("interface"):
        where.append(f"{fmt.plain(device['interface'])} {fmt.plain(device.get('host'))}:{device.get('port')}")
    where.append(fmt.plural(live_peers(status), "peer"))
    where.append(f"up {fmt.duration(device.get('uptime_s'))}")
    progress, coverage = status.get("progress"), status.get("coverage")
    line = Text("run ", no_wrap=True)
    line.append_text(bar(progress, max(10, width - 40)))
    line.append(f" {fmt.percent(progress):>4}", style="bold")
    line.append(f"   coverage {fmt.percent(coverage)}", style="green" if (coverage or 0) >= 1 else "")
    if status.get("complete"):
        line.append("  ✓", style="bold green")
    return [first, Text(" · ".join(where), style="dim", no_wrap=True, overflow="ellipsis"), line]


def work_panel(status: Status, width: int) -> RenderableType:
    """The lease that this device trains: a bar per shard, speed, loss, time left."""
    work = status.get("work")
    if not work:
        phase = fmt.plain(status.get("phase") or "")
        return panel("this device", Text(_PHASES.get(phase, phase or "starting"), style="dim"))
    by_id = {shard["shard"]: shard for shard in status.get("shards") or ()}
    bar_cells = max(10, min(60, width - 56))
    table = Table.grid(padding=(0, 1))
    for shard_id, label in list(zip(work["shards"], work["labels"], strict=False))[: _shown(work)]:
        shard = by_id.get(shard_id, {})
        table.add_row(
            Text(fmt.plain(label, 16), style="bold cyan", no_wrap=True),
            bar(shard.get("progress"), bar_cells),
            Text(f"{fmt.percent(shard.get('progress')):>4}", no_wrap=True),
            Text(f"loss {fmt.number((work.get('loss') or {}).get(shard_id))}", no_wrap=True),
            Text(f"acc {fmt.accuracy(shard.get('accuracy')):>5}", style="dim", no_wrap=True),
        )
    hidden = len(work["shards"]) - _shown(work)
    done, total = work.get("samples_done") or 0, work.get("samples_total") or 0
    foot = Text(no_wrap=True, overflow="ellipsis")
    foot.append("lease ", style="dim").append_text(bar(done / total if total else 0.0, 12, "white"))
    foot.append(f" {fmt.count(done)}/{fmt.count(total)} samples · {fmt.count(work.get('samples_per_s'))}/s")
    foot.append(f" · {fmt.duration(work.get('eta_s'))} left")
    if hidden > 0:
        foot.append(f" · and {fmt.plural(hidden, 'more task')}", style="dim")
    return panel("this device trains", Group(table, foot), "cyan")


def _shown(work: Mapping[str, Any]) -> int:
    return min(6, len(work["shards"]))


def _work_rows(status: Status) -> int:
    work = status.get("work")
    return _shown(work) + 1 if work else 1


def log_line(status: Status) -> str:
    """One line for where no terminal is: the same facts, without colour or cursor movement."""
    work = status.get("work")
    parts = [
        fmt.plain(status.get("phase") or "starting"),
        f"run {fmt.percent(status.get('progress'))}",
        f"coverage {fmt.percent(status.get('coverage'))}",
        fmt.plural(live_peers(status), "peer"),
    ]
    if work and own_shards(status):
        losses = [loss for loss in (work.get("loss") or {}).values() if loss is not None]
        mean = sum(losses) / len(losses) if losses else None
        parts.append(f"training {fmt.names(work['labels'], 6)}")
        parts.append(f"{fmt.count(work.get('samples_per_s'))} samples/s")
        parts.append(f"loss {fmt.number(mean)}")
        parts.append(f"{fmt.duration(work.get('eta_s'))} left in this lease")
    return " · ".join(parts)
