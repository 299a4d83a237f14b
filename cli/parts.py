"""The pieces that the views share: bars, the table of tasks, the table of peers, events.

Every function turns a status dictionary into something Rich can draw, and does nothing else. Names come from
peers, so they reach Rich as `Text` and never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import format as fmt

Status = Mapping[str, Any]
"""The daemon's status, as JSON brings it: the values are `Any` because they come from outside."""

#: One character per eighth of progress.
_LEVELS: Final = "·▁▂▃▄▅▆▇█"
#: Least width of a shard in columns.
_CELL: Final = 38
_STATE_STYLES: Final = {
    "training": "cyan",
    "complete": "green",
    "left": "dim",
    "killed": "bold red",
    "failed": "bold red",
    "late": "yellow",
    "leaving": "yellow",
}


def bar(fraction: float | None, width: int, style: str = "cyan") -> Text:
    """A progress bar of `width` cells that also reads without colour."""
    clamped = min(1.0, max(0.0, fraction or 0.0))
    filled = int(clamped * width + 1e-9)
    text = Text("━" * filled, style="green" if clamped >= 1.0 else style, no_wrap=True)
    return text.append("─" * (width - filled), style="dim")


def state_text(state: object) -> Text:
    """A device's or a run's state in its colour."""
    word = fmt.plain(state or "unknown")
    return Text(word, style=_STATE_STYLES.get(word.lower(), ""), no_wrap=True)


def section(title: str, body: RenderableType) -> Group:
    """A titled block with no frame."""
    return Group(Text(title, style="bold"), body, Text(""))


def panel(title: str, body: RenderableType, style: str = "dim") -> Panel:
    """A framed block."""
    return Panel(
        body, title=Text(title, style="bold"), title_align="left", border_style=style, padding=(0, 1)
    )


def own_shards(status: Status) -> list[str]:
    """The shards that this device is training."""
    return [str(shard) for shard in (status.get("work") or {}).get("shards") or ()]


def shard_state(shard: Mapping[str, Any]) -> str:
    """`complete`, `training` or `waiting`."""
    if (shard.get("progress") or 0.0) >= 1.0:
        return "complete"
    return "training" if shard.get("holders") else "waiting"


def task_table(status: Status, width: int, rows_max: int) -> RenderableType:
    """All shards, one a row; in columns where that is too long; else the ones that matter, and a summary."""
    shards = list(status.get("shards") or ())
    if not shards:
        return Text("  not known yet", style="dim")
    own = set(own_shards(status))
    if len(shards) + 1 <= rows_max:
        return _task_rows(shards, own, width)
    columns = max(1, (width - 4) // _CELL)
    if -(-len(shards) // columns) <= rows_max:
        return _task_grid(shards, own, columns, width)
    room = max(1, rows_max - 1 - -(-len(shards) // _strip_cells(width))) * columns
    ranked = sorted(
        range(len(shards)),
        key=lambda index: (
            shards[index]["shard"] not in own,
            shards[index]["shard"] != "stem",
            shard_state(shards[index]) != "training",
            index,
        ),
    )
    chosen = [shards[index] for index in sorted(ranked[:room])]
    rest = [shards[index] for index in ranked[room:]]
    return Group(_task_grid(chosen, own, columns, width), _summary(rest), strip(shards, width))


def _label(shard: Mapping[str, Any], mine: bool, cells: int) -> Text:
    state = shard_state(shard)
    marker = {"complete": "✓ ", "training": "● ", "waiting": "  "}[state]
    style = "bold cyan" if mine else {"complete": "green", "training": "", "waiting": "dim"}[state]
    return Text(marker + fmt.plain(shard["label"], cells), style=style, no_wrap=True)


def _task_grid(shards: Sequence[Mapping[str, Any]], own: set[str], columns: int, width: int) -> Table:
    """Several shards in a row, read down the columns: label, bar, progress, first holder."""
    cell = (width - 4) // columns
    rows = -(-len(shards) // columns)
    table = Table.grid()
    for _ in range(columns):
        table.add_column(width=cell, no_wrap=True, overflow="ellipsis")
    for row in range(rows):
        cells = []
        for shard in shards[row::rows]:
            text = _label(shard, shard["shard"] in own, 12)
            text.pad_right(max(0, 15 - text.cell_len))
            text.append_text(bar(shard.get("progress"), 8)).append(
                f" {fmt.percent(shard.get('progress')):>4}"
            )
            text.append(
                f" {fmt.plain(next(iter(shard.get('holders') or ()), ''), max(6, cell - 31))}", style="dim"
            )
            cells.append(text)
        table.add_row(*cells)
    return table


def _task_rows(shards: Sequence[Mapping[str, Any]], own: set[str], width: int) -> Table:
    label_cells = min(28, max(8, *(len(fmt.plain(shard["label"])) for shard in shards)))
    label_cells = min(label_cells, 14 if width < 90 else 28)
    table = Table(box=None, padding=(0, 1), pad_edge=False, expand=True, header_style="dim")
    table.add_column("  task", width=label_cells + 2, no_wrap=True)
    table.add_column("progress", width=12 if width < 90 else 24, no_wrap=True)
    table.add_column("", width=5, justify="right", no_wrap=True)
    table.add_column("accuracy", width=8, justify="right", no_wrap=True)
    table.add_column("trained by", ratio=1, no_wrap=True, overflow="ellipsis")
    for shard in shards:
        holders, others = fmt.names(shard.get("holders"), 3), fmt.names(shard.get("contributors"), 3)
        table.add_row(
            _label(shard, shard["shard"] in own, label_cells),
            bar(shard.get("progress"), 12 if width < 90 else 24),
            fmt.percent(shard.get("progress")),
            fmt.accuracy(shard.get("accuracy")),
            Text(holders) if holders else Text(f"({others})" if others else "-", style="dim"),
        )
    return table


def _summary(shards: Sequence[Mapping[str, Any]]) -> Text:
    states = [shard_state(shard) for shard in shards]
    mean = sum(shard.get("progress") or 0.0 for shard in shards) / max(1, len(shards))
    counts = " · ".join(
        f"{states.count(state)} {state}" for state in ("complete", "training", "waiting") if state in states
    )
    line = f"  {fmt.plural(len(shards), 'other task')}: {counts} · mean {fmt.percent(mean)}"
    return Text(line, style="dim", no_wrap=True, overflow="ellipsis")


def _strip_cells(width: int) -> int:
    return max(10, width - 8)


def strip(shards: Sequence[Mapping[str, Any]], width: int) -> Text:
    """The progress of every shard, one character each, in the run's order."""
    text = Text()
    for index, shard in enumerate(shards):
        if index % _strip_cells(width) == 0:
            text.append("\n  " if index else "  ")
        progress = min(1.0, max(0.0, shard.get("progress") or 0.0))
        level = _LEVELS[max(int(progress > 0), int(progress * (len(_LEVELS) - 1)))]
        text.append(level, style="green" if progress >= 1.0 else "cyan" if shard.get("holders") else "dim")
    return text


def live_peers(status: Status) -> int:
    """How many other devices are here now."""
    return sum(peer.get("state") not in ("gone", "left") for peer in status.get("peers") or ())


def peer_table(status: Status, width: int, rows_max: int = 0) -> RenderableType:
    """The other devices of the run; `rows_max` 0 shows all."""
    peers = list(status.get("peers") or ())
    if not peers:
        return Text("  no other device seen yet", style="dim")
    wide = width >= 100
    table = Table(box=None, padding=(0, 1), pad_edge=False, expand=True, header_style="dim")
    table.add_column("  device", width=18 if wide else 14, no_wrap=True, overflow="ellipsis")
    table.add_column("state", width=9, no_wrap=True)
    table.add_column("speed", width=12, justify="right", no_wrap=True)
    table.add_column("seen", width=8, justify="right", no_wrap=True)
    if wide:
        table.add_column("samples", width=8, justify="right", no_wrap=True)
        table.add_column("address", width=32, no_wrap=True, overflow="ellipsis")
    table.add_column("training", ratio=1, no_wrap=True, overflow="ellipsis")
    shown = peers[: max(1, rows_max - 1)] if 0 < rows_max < len(peers) else peers
    for peer in shown:
        cells: list[RenderableType] = [
            Text("  " + fmt.plain(peer.get("name") or str(peer.get("device"))[:8])),
            state_text(peer.get("state")),
            fmt.quantity(peer.get("speed"), "MAC/s"),
            fmt.duration(peer.get("last_seen_s")),
        ]
        if wide:
            cells.append(fmt.count(sum(peer.get("class_counts") or ())))
            cells.append(Text(fmt.plain(peer.get("address") or "-"), style="dim"))
        cells.append(Text(fmt.names(peer.get("labels"), 6) or "-"))
        table.add_row(*cells)
    if len(peers) > len(shown):
        return Group(table, Text(f"  and {fmt.plural(len(peers) - len(shown), 'more device')}", style="dim"))
    return table


def event_line(event: Mapping[str, Any]) -> Text:
    """One event: when, and what happened."""
    kind = fmt.plain(event.get("kind", ""))
    alarming = any(word in kind for word in ("error", "refused", "fail", "warn"))
    text = Text(fmt.clock(event.get("time")) + "  ", style="dim", no_wrap=True, overflow="ellipsis")
    return text.append(fmt.plain(event.get("text") or kind), style="yellow" if alarming else "default")


def warning_lines(status: Status) -> list[Text]:
    """What the daemon wants its owner to know."""
    return [Text(f"! {fmt.plain(line)}", style="yellow") for line in status.get("warnings") or ()]


def refused_lines(status: Status, rows_max: int, before: str = "") -> list[Text]:
    """Contributions that this device does not believe, the newest last: whose, to what, and why."""
    lines = []
    for refusal in list(status.get("refused") or ())[-rows_max:]:
        text = Text(no_wrap=True, overflow="ellipsis").append(before, style="yellow")
        text.append(fmt.clock(refusal.get("time")) + "  ", style="dim")
        who, what = fmt.plain(refusal.get("name"), 18), fmt.plain(refusal.get("label"), 18)
        lines.append(text.append(f"{who} ({what}): {fmt.plain(refusal.get('reason'))}", style="yellow"))
    return lines
