"""The table of the benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .attacks import ATTACKS


def name(attack: str | None, defended: bool, absent: bool) -> str:
    """What is run, in words."""
    if absent:
        return "the liars are not there"
    how = "defence" if defended else "plain averaging"
    return f"{attack or 'no attack'}, {how}"


def _accuracy(results: Sequence[dict[str, Any]]) -> str:
    values = [100 * one["accuracy"] for one in results]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}" + (
        " *" if any(one["incomplete"] for one in results) else ""
    )


def _change(results: Sequence[dict[str, Any]], base: dict[int, float]) -> str:
    """Mean difference to the run of the same seed without an attack."""
    changes = [100 * (one["accuracy"] - base[one["seed"]]) for one in results if one["seed"] in base]
    return f"{statistics.fmean(changes):+.1f}" if changes else "-"


def _part(results: Sequence[dict[str, Any]], kind: str, top: str, bottom: str) -> str:
    above, below = (sum(one[kind][field] for one in results) for field in (top, bottom))
    return f"{100 * above / below:.1f} % of {below}" if below else "-"


def _distrusted(results: Sequence[dict[str, Any]]) -> str:
    """Pairs of an honest device and one that it distrusts in the end, in the mean of the runs."""
    means = (statistics.fmean(one[kind]["distrusted"] for one in results) for kind in ("lying", "honest"))
    return ", ".join(f"{mean:.1f}" for mean in means) if results else "-"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row for each attack."""
    lines = [
        "| attack | plain averaging | change | with the defence | change | against absent | honest refused "
        "| lies refused | lies that no honest device kept | distrusted: liars, honest | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = {
        one["seed"]: one["accuracy"]
        for one in results
        if one["attack"] is None and one["defended"] and not one["absent"]
    }
    without = {one["seed"]: one["accuracy"] for one in results if one["absent"]}
    for attack in (None, *ATTACKS):
        rows = [one for one in results if one["attack"] == attack and not one["absent"]]
        plain = [one for one in rows if not one["defended"]]
        defended = [one for one in rows if one["defended"]]
        if not rows:
            continue
        made = sum(one["lying"]["made"] for one in defended)
        kept = sum(one["lying"]["kept"] for one in defended)
        lines.append(
            f"| {attack or 'none'} | {_accuracy(plain)} | {_change(plain, base)} "
            f"| **{_accuracy(defended)}** | {_change(defended, base)} | {_change(defended, without)} "
            f"| {_part(defended, 'honest', 'refused', 'tried')} "
            f"| {_part(defended, 'lying', 'refused', 'tried')} "
            f"| {f'{made - kept} of {made}' if made else '-'} | {_distrusted(defended)} | {len(defended)} |"
        )
    absent = [one for one in results if one["absent"]]
    if absent:
        lines.append(
            f"| none, without the two | - | - | **{_accuracy(absent)}** | {_change(absent, base)} | - "
            f"| {_part(absent, 'honest', 'refused', 'tried')} | - | - "
            f"| {_distrusted(absent)} | {len(absent)} |"
        )
    return "\n".join(lines)
