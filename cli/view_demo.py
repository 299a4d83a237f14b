"""The demo's live view, one panel per device, and the table of what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import format as fmt
from .parts import bar, own_shards, panel, shard_state, strip

State = Mapping[str, Any]
"""What the demo tells while it runs; `Any` because the statuses in it are the daemons' JSON."""

_PANEL_LINES: Final = 6
_STYLES: Final = {"running": "cyan", "late": "yellow", "waiting": "dim", "killed": "bold red"}


def demo_view(state: State, *, width: int, height: int) -> Group:
    """All devices at once: panels where they fit, else a line each."""
    devices = list(state.get("devices") or ())
    columns = max(1, min(4, width // 39, len(devices) or 1))
    head = _head(state, width)
    rows = -(-len(devices) // columns)
    body: list[RenderableType]
    if rows * _PANEL_LINES + len(head) <= height:
        cells = width // columns - (1 if columns > 1 else 0)
        body = [Columns([_device_panel(device, cells) for device in devices], padding=(0, 1), expand=False)]
    else:
        body = [_device_lines(devices, width)]
    return Group(*head, *body)


def _head(state: State, width: int) -> list[RenderableType]:
    first = Table.grid(expand=True)
    first.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    first.add_column(justify="right", no_wrap=True)
    title = Text("p2pcollab demo  ", style="bold").append(fmt.plain(state.get("phase")), style="bold cyan")
    first.add_row(title, Text(fmt.duration(state.get("elapsed_s")), style="dim"))
    lines: list[RenderableType] = [
        first,
        Text(fmt.plain(state.get("message") or ""), no_wrap=True, overflow="ellipsis"),
    ]
    best = _furthest(state.get("devices") or ())
    if best is not None:
        line = Text("run ", no_wrap=True).append_text(bar(best.get("progress"), max(10, width - 30)))
        line.append(f" {fmt.percent(best.get('progress')):>4}   coverage {fmt.percent(best.get('coverage'))}")
        tasks = strip(best.get("shards") or (), width)
        states = [shard_state(shard) for shard in best.get("shards") or ()]
        if "\n" not in tasks.plain:
            tasks.append(
                f"   {states.count('complete')} of {fmt.plural(len(states), 'shard')} complete", style="dim"
            )
        lines += [line, tasks]
    return lines


def _furthest(devices: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The status of the living device that has heard most."""
    statuses = [device["status"] for device in devices if device.get("status") and _state(device) != "killed"]
    return max(statuses, key=lambda status: status.get("progress") or 0.0, default=None)


def _state(device: Mapping[str, Any]) -> str:
    state = str(device.get("state") or "waiting").lower()
    return "late" if state == "running" and "late" in str(device.get("note") or "").lower() else state


def _device_panel(device: Mapping[str, Any], cells: int) -> RenderableType:
    state = _state(device)
    lines = [line.copy() for line in _device_text(device, cells - 4)]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    title = f"{fmt.plain(device.get('name'), 14)} · {state.upper() if state in ('killed', 'late') else state}"
    body = panel(title, Group(*lines), _STYLES.get(state, "dim"))
    body.width = cells
    return body


def _device_text(device: Mapping[str, Any], cells: int) -> list[Text]:
    """Four lines: what it trains, how far the lease is, speed, what it has cost."""
    status = device.get("status") or {}
    note = Text(fmt.plain(device.get("note") or ""), style="yellow")
    if not status:
        return [note or Text("not started yet", style="dim"), Text(), Text(), Text()]
    counters = status.get("counters") or {}
    spent = Text(style="dim")
    spent.append(f"↑{fmt.size(counters.get('bytes_sent'))} ↓{fmt.size(counters.get('bytes_received'))}")
    spent.append(f" {fmt.quantity(counters.get('training_macs'), 'MAC')}")
    if _state(device) == "killed":
        last = Text(f"was at {fmt.names(list((status.get('work') or {}).get('labels') or ()), 3) or 'rest'}")
        return [note or Text("killed"), last, Text(), spent]
    work = status.get("work")
    if not work or not own_shards(status):
        return [Text(fmt.plain(status.get("phase") or "")), note, Text(), spent]
    done, total = work.get("samples_done") or 0, work.get("samples_total") or 0
    lease = bar(done / total if total else 0.0, max(6, cells - 6)).append(
        f" {fmt.percent(done / total if total else 0)}"
    )
    speed = Text(f"{fmt.count(work.get('samples_per_s'))} samples/s", style="dim")
    if note:
        speed.append(" · ").append_text(note)
    return [Text(fmt.names(list(work["labels"]), 5), style="bold"), lease, speed, spent]


def _device_lines(devices: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, expand=True, header_style="dim")
    table.add_column("device", width=12, no_wrap=True, overflow="ellipsis")
    table.add_column("state", width=8, no_wrap=True)
    table.add_column("trains", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("lease", width=16 if width >= 100 else 10, no_wrap=True)
    table.add_column("samples/s", width=9, justify="right", no_wrap=True)
    for device in devices:
        state = _state(device)
        work = (device.get("status") or {}).get("work") or {}
        total = work.get("samples_total") or 0
        what = fmt.names(list(work.get("labels") or ()), 5) or fmt.plain(device.get("note") or "")
        table.add_row(
            Text(fmt.plain(device.get("name"))),
            Text(state.upper() if state in ("killed", "late") else state, style=_STYLES.get(state, "")),
            Text(what),
            bar((work.get("samples_done") or 0) / total, 16 if width >= 100 else 10) if total else "",
            fmt.count(work.get("samples_per_s")),
        )
    return table


def demo_line(state: State) -> str:
    """One line for where no terminal is."""
    best = _furthest(state.get("devices") or ()) or {}
    running = sum(device.get("state") == "running" for device in state.get("devices") or ())
    parts = [fmt.duration(state.get("elapsed_s")), fmt.plain(state.get("phase"))]
    if state.get("devices"):
        parts.append(f"{fmt.plural(running, 'device')} running")
    if best:
        parts.append(f"run {fmt.percent(best.get('progress'))}, coverage {fmt.percent(best.get('coverage'))}")
    if state.get("message"):
        parts.append(fmt.plain(state["message"]))
    return " · ".join(parts)


def demo_summary(result: Mapping[str, Any], *, width: int) -> Group:
    """What the demo measured, per device and of the model."""
    central = result.get("central_training_macs") or 0
    table = Table(box=None, padding=(0, 1), pad_edge=False, expand=True, header_style="dim")
    table.add_column("device", width=10 if width < 100 else 14, no_wrap=True, overflow="ellipsis")
    table.add_column("trained", ratio=1, overflow="fold" if width >= 100 else "ellipsis", no_wrap=width < 100)
    table.add_column("samples", width=7, justify="right", no_wrap=True)
    table.add_column("MACs", width=6, justify="right", no_wrap=True)
    table.add_column("central", width=8, justify="right", no_wrap=True)
    table.add_column("sent", width=7, justify="right", no_wrap=True)
    table.add_column("got", width=7, justify="right", no_wrap=True)
    table.add_column("memory", width=7, justify="right", no_wrap=True)
    for row in result.get("devices") or ():
        macs, tasks = row.get("training_macs") or 0, list(row.get("tasks") or ())
        table.add_row(
            Text(
                fmt.plain(row["name"]) + (" ✝" if row.get("killed") else ""),
                style="red" if row.get("killed") else "",
            ),
            Text(fmt.names(tasks, 12) if width >= 100 else fmt.plural(len(tasks), "shard")),
            fmt.count(row.get("samples")),
            fmt.count(macs),
            f"{central / macs:.1f}x" if macs and central else "-",
            fmt.size(row.get("bytes_sent")),
            fmt.size(row.get("bytes_received")),
            fmt.size(row.get("peak_rss_bytes")),
        )
    legend = "MACs: training only. central: the dense network's training needs so many times as many"
    return Group(table, Text(legend, style="dim"), Text(""), _outcome(result))


def _outcome(result: Mapping[str, Any]) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    assembled, central = result.get("assembled_accuracy"), result.get("central_accuracy")
    line = Text(f"{fmt.accuracy(assembled)} assembled from the devices", style="bold")
    if central is not None and assembled is not None:
        points = (assembled - central) * 100
        line.append(f", {fmt.accuracy(central)} trained centrally ({points:+.1f} points)", style="")
    facts.add_row("accuracy", line)
    digests = list(result.get("digests") or ())
    if digests:
        equal = len(set(digests)) == 1
        where = fmt.names(list(result.get("assembled_on") or ()))
        verdict = f"{'equal' if equal else 'DIFFERENT'} on {where}: sha256 {fmt.plain(digests[0])[:16]}…"
        facts.add_row("digests", Text(verdict, style="green" if equal else "bold red"))
    missing = list(result.get("missing") or ())
    coverage = fmt.percent(result.get("coverage")) + (f", missing {fmt.names(missing, 8)}" if missing else "")
    facts.add_row("coverage", Text(coverage, style="green" if not missing else "yellow"))
    takeover = result.get("takeover")
    if takeover:
        finishers = {name for who in (takeover.get("finished_by") or {}).values() for name in who}
        story = (
            f"{fmt.plain(takeover['device'])} was killed while it trained {fmt.names(takeover['labels'], 6)}"
        )
        if finishers:
            story += f"; finished by {fmt.names(sorted(finishers), 6)}"
        facts.add_row("failure", Text(story))
    first = fmt.number(result.get("seconds_to_first_training_step"), 1)
    facts.add_row("first step", Text(f"{first} s after a device's start (median)"))
    together, whole = fmt.duration(result.get("collaboration_s")), fmt.duration(result.get("wall_s"))
    facts.add_row("time", Text(f"{together} together, {whole} in all"))
    return facts
