"""What is shown of a model: where it comes from, how good it is, what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import format as fmt
from .parts import bar

Facts = Mapping[str, Any]
"""The command's JSON result."""

_SHARDS_SHOWN: Final = 24


def assembly_page(summary: Facts, *, width: int) -> Group:
    """The file that was written, and who trained what is in it."""
    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    table.add_column("task", max_width=28 if width < 100 else 48, no_wrap=True, overflow="ellipsis")
    table.add_column("generation", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("devices", justify="right")
    for shard in summary["shards"][:_SHARDS_SHOWN]:
        devices = str(len(shard["contributors"]))
        table.add_row(
            Text(fmt.plain(shard["label"])), str(shard["generation"]), fmt.count(shard["samples"]), devices
        )
    hidden = len(summary["shards"]) - _SHARDS_SHOWN
    tail = (
        [Text(f"and {fmt.plural(hidden, 'more task')}; --json shows all", style="dim")] if hidden > 0 else []
    )
    everyone = {device for shard in summary["shards"] for device in shard["contributors"]}
    coverage = (
        f"{fmt.percent(summary['coverage'])} of the classes, trained by {fmt.plural(len(everyone), 'device')}"
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    verb = "replaced" if summary["replaced"] else "written"
    facts.add_row(verb, Text(f"{fmt.plain(summary['path'])} ({fmt.size(summary['bytes'])})", style="bold"))
    facts.add_row("sha256", Text(summary["sha256"]))
    facts.add_row("run", Text(f"{fmt.plain(summary['run'])} ({summary['run_id'][:14]})"))
    facts.add_row("coverage", Text(coverage, style="yellow" if summary["missing"] else "green"))
    return Group(facts, Text(""), table, *tail)


def evaluation_page(result: Facts, *, width: int) -> Group:
    """Accuracy in all, then by class."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("class", max_width=20 if width < 100 else 40, no_wrap=True, overflow="ellipsis")
    table.add_column(f"{result['noun']}s", justify="right")
    table.add_column("right", justify="right")
    table.add_column("", width=16)
    table.add_column("accuracy", justify="right")
    table.add_column("most often taken for", no_wrap=True, overflow="ellipsis")
    for row in result["classes"]:
        known = row["accuracy"] is not None
        confusion = f"{fmt.plain(row['mistaken_for'])} ({row['mistaken']})" if row["mistaken_for"] else ""
        table.add_row(
            Text(fmt.plain(row["class"])),
            str(row["images"]),
            str(row["right"]),
            bar(row["accuracy"], 16) if known else "",
            f"{row['accuracy'] * 100:.1f}%" if known else "-",
            Text(confusion, style="dim"),
        )
    examples = fmt.plural(result["images"], result["noun"])
    accuracy = f"accuracy {result['accuracy'] * 100:.2f}% on {examples}"
    head: list[RenderableType] = [Text(accuracy, style="bold")]
    if result["missing"]:
        absent = (
            f"the model lacks {fmt.plural(len(result['missing']), 'task')}: {fmt.names(result['missing'], 8)}"
        )
        head.append(Text(absent, style="yellow"))
    notes = [Text(f"! {fmt.plain(remark)}", style="yellow") for remark in result["notes"]]
    return Group(*head, Text(""), table, *notes)


def prediction_lines(predictions: Sequence[Facts]) -> Iterator[str]:
    """One line per file: its name, then the classes with their probabilities, the likeliest first."""
    longest = max((len(fmt.plain(one["image"])) for one in predictions), default=0)
    for one in predictions:
        classes = "  ".join(
            f"{fmt.plain(choice['class'])} {choice['probability'] * 100:.1f}%" for choice in one["classes"]
        )
        yield f"{fmt.plain(one['image']):<{min(longest, 60)}}  {classes}"
