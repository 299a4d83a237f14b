"""The page that `status` prints, and the table that `peers` prints."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import format as fmt
from .parts import (
    Status,
    bar,
    live_peers,
    peer_table,
    refused_lines,
    section,
    state_text,
    task_table,
    warning_lines,
)


def status_page(status: Status, *, width: int) -> Group:
    """Everything that a person asks first: which run, how far, what I do, what others do, what is wrong."""
    blocks: list[RenderableType] = [_facts(status, width), Text("")]
    blocks.append(section("tasks", task_table(status, width, rows_max=24)))
    blocks.append(section("devices", peer_table(status, width)))
    refused = refused_lines(status, rows_max=8)
    if refused:
        blocks.append(section("refused", Group(*refused)))
    blocks.extend(warning_lines(status))
    return Group(*blocks)


def peers_page(status: Status, *, width: int) -> Group:
    """The other devices of the run, and what this one is called."""
    device = status.get("device") or {}
    name = fmt.plain(device.get("name") or "this device")
    here = Text(f"this device: {name}", style="dim").append(
        f", {fmt.plain(device.get('state') or 'unknown')}"
    )
    return Group(peer_table(status, width), Text(""), here)


def _facts(status: Status, width: int) -> Table:
    run, device = status.get("run") or {}, status.get("device") or {}
    counters = status.get("counters") or {}
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    classes = run.get("classes") or ()
    table.add_row("run", Text(fmt.plain(run.get("name") or "not known yet"), style="bold"))
    if classes:
        model = f"{fmt.plain(run.get('model'))}, {fmt.plural(len(classes), 'class', 'classes')}: "
        table.add_row("model", Text(model + fmt.names(list(classes), 8)))
    if run.get("join_code"):
        table.add_row("join code", Text(fmt.plain(run["join_code"])))
    table.add_row("phase", state_text(status.get("phase")))
    progress = bar(status.get("progress"), 24).append(f" {fmt.percent(status.get('progress'))}")
    table.add_row("progress", progress.append(f", coverage {fmt.percent(status.get('coverage'))}"))
    table.add_row("device", Text(_device(status, device)))
    data = device.get("data") or {}
    if data:
        table.add_row("data", Text(_data(data, list(classes), width)))
    if status.get("work"):
        work = status["work"]
        speed = f"{fmt.count(work.get('samples_per_s'))} samples/s"
        left = f"{fmt.duration(work.get('eta_s'))} left in this lease"
        table.add_row("training", Text(f"{fmt.names(list(work['labels']), 8)} · {speed} · {left}"))
    if counters:
        sent, received = fmt.size(counters.get("bytes_sent")), fmt.size(counters.get("bytes_received"))
        traffic = f"{sent} sent, {received} received"
        spent = f"{fmt.quantity(counters.get('training_macs'), 'MAC')} trained"
        peak = f"peak memory {fmt.size(counters.get('peak_rss_bytes'))}"
        table.add_row("spent", Text(f"{spent} · {traffic} · {peak}"))
        refused = counters.get("refused") or 0
        if refused:
            table.add_row("refused", Text(fmt.plural(refused, "contribution"), style="yellow"))
    return table


def _device(status: Status, device: Status) -> str:
    words = [fmt.plain(device.get("name") or "observer")]
    if device.get("id"):
        words.append(fmt.plain(device["id"])[:8])
    if device.get("interface"):
        words.append(f"{fmt.plain(device['interface'])} {fmt.plain(device.get('host'))}:{device.get('port')}")
    if device.get("speed_macs_s"):
        words.append(fmt.quantity(device["speed_macs_s"], "MAC/s"))
    if device.get("budget") is not None:
        words.append(f"budget {fmt.percent(device['budget'])}")
    if device.get("uptime_s") is not None:
        words.append(f"up {fmt.duration(device['uptime_s'])}")
    words.append(fmt.plural(live_peers(status), "peer"))
    return " · ".join(words)


def _data(data: Status, classes: list[str], width: int) -> str:
    line = f"{fmt.count(data.get('train'))} training, {fmt.count(data.get('test'))} test samples"
    counts = data.get("class_counts") or ()
    if counts and len(counts) == len(classes) and len(classes) <= max(4, width // 12):
        pairs = zip(classes, counts, strict=True)
        line += " (" + ", ".join(f"{fmt.plain(name)} {fmt.count(amount)}" for name, amount in pairs) + ")"
    lacking = [name for name, amount in zip(classes, counts, strict=False) if not amount]
    if lacking:
        line += f"; none of {fmt.names(lacking, 5)}"
    notes = "; ".join(fmt.plain(note) for note in data.get("notes") or ())
    return f"{line}; {notes}" if notes else line
