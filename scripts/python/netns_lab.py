"""Plays scenarios in a lab of network namespaces; see scripts/netns-lab."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "netns"))

from play import Result, check_tools, play
from rich.console import Console
from rich.table import Table
from scenario import Scenario, load, timeline

from p2pcollab.errors import ExitCode, P2PCollabError

SCENARIOS = Path(__file__).parents[2] / "tests" / "netns" / "scenarios"


def find(name: str) -> Scenario:
    """A scenario of the repository by its name, or any by its path."""
    kept = SCENARIOS / f"{name}.toml"
    return load(kept if kept.exists() else Path(name))


def table(result: Result) -> Table:
    """The final state of every device."""
    shown = Table(title=f"{result.scenario}, seed {result.seed}", title_justify="left")
    for column in (
        "host",
        "ledger",
        "entries",
        "coverage",
        "progress",
        "made",
        "restarts",
        "sent",
        "warnings",
    ):
        shown.add_column(column)
    for row in result.devices:
        shown.add_row(
            str(row["host"]),
            row["digest"][:12],
            str(row["entries"]),
            f"{row['coverage']:.0%}",
            f"{row['progress']:.1%}",
            str(row["contributions"]),
            f"{row['trainer_restarts']} + {row['p2pd_restarts']}",
            f"{row['bytes_sent'] / 1e6:.1f} MB",
            str(len(row["warnings"])),
        )
    return shown


def verdict(result: Result) -> list[str]:
    """What was compared, in words."""
    lines = [
        f"{result.entries_seen} ledger entries seen, {len(result.entries_lost)} lost; "
        f"ledgers {'equal' if result.digests_equal else 'UNEQUAL'}"
        + ("" if result.models_equal is None else f"; models {'equal' if result.models_equal else 'UNEQUAL'}")
    ]
    for one in result.settled:
        took = "not in time" if one.seconds is None else f"{one.seconds:.1f} s, {one.rounds} rounds"
        bound = f" (at most {one.within_rounds})" if one.within_rounds else ""
        lines.append(f"equal after {took}{bound}, from {one.at_s:.0f} s on")
    return lines + [f"PROBLEM: {problem}" for problem in result.problems]


def _end(_number: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", help="names, or paths of TOML files")
    parser.add_argument("--list", action="store_true", help="show what scenarios there are")
    parser.add_argument("--plan", action="store_true", help="show what would happen when, and do nothing")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    if options.list:
        for path in sorted(SCENARIOS.glob("*.toml")):
            print(f"{path.stem:20} {load(path).about}")
        return 0
    if not options.scenarios:
        parser.error("name a scenario; --list shows them")
    scenarios = [find(name) for name in options.scenarios]
    if options.plan:
        for scenario in scenarios:
            print(f"{scenario.name}: {scenario.about}")
            for moment in timeline(scenario):
                print(f"{moment.at_s:7.1f} s  {moment.label}")
        return 0
    for scenario in scenarios:
        check_tools(scenario)
    results = []
    for scenario in scenarios:
        print(f"{scenario.name}: {scenario.about}")
        result = play(scenario, say=lambda text: print(text, flush=True))
        results.append(result)
        # Wide enough for every column where no terminal says how wide it is.
        Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(table(result))
        print("\n".join(verdict(result)), flush=True)
        if options.json:
            options.json.write_text(json.dumps([one.to_json() for one in results], indent=1) + "\n")
    return 1 if any(result.problems for result in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except P2PCollabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: all of it was removed", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
