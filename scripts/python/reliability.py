"""The figures of docs/reliability.md by name; see scripts/reliability."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _simulated(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of each scenario how much was run, and what it showed; of each planted bug, how soon it was found."""
    wanted = (
        "seeds", "broken", "kills", "stops", "false_takeovers", "kill_noticed_s", "kill_to_new_lease_s",
        "rounds_until_digests_equal", "seeds_needed", "not_found_in_seeds",
    )  # fmt: skip
    return {
        scenario: {key: figures[key] for key in wanted if figures.get(key) is not None}
        for scenario, figures in found.items()
    }


def _lied(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each rehearsal with liars ended at, and what was refused in it."""
    wanted = ("attack", "defended", "absent", "seed", "accuracy", "honest", "lying")
    return [{key: row.get(key) for key in wanted} for row in found["rows"]]


def collected() -> dict[str, Any]:
    """Everything; JSON values."""
    takeovers, sigkills, strangers = _read("takeover"), _read("sigkills"), _read("strangers")
    fuzz = _read("fuzz")
    return {
        "simulate": _simulated(_read("simulate")),
        "takeover": {
            key: takeovers[key]
            for key in ("kills", "entries_lost", "noticed_by_the_first", "takeover_first_shard")
        },
        "sigkills": {
            key: sigkills[key] for key in ("kills", "resumed", "more_than_a_lease_lost", "problems")
        },
        "netns_lab": {
            played["scenario"]: {
                "hosts": played["hosts"],
                "problems": played["problems"],
                "rounds": [settled["rounds"] for settled in played["settled"]],
                "seconds": [settled["seconds"] for settled in played["settled"]],
            }
            for played in _read("netns-lab")
        },
        "strangers": {
            "tries": sum(attack["tries"] for attack in strangers["attacks"]),
            "accepted_writes": sum(attack["accepted_writes"] for attack in strangers["attacks"]),
            "faults": len(strangers["faults"]),
            "recorded_bytes": strangers["capture"]["bytes"],
            "bytes_in_clear": strangers["capture"]["bytes_in_clear"],
        },
        "liars": _lied(_read("liars")),
        "liars_in_short_runs": _lied(_read("liars-short")),
        "fuzz": {key: value for key, value in fuzz.items() if not isinstance(value, dict | list)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "reliability.json", help="where they go")
    options = parser.parse_args()
    options.json.write_text(json.dumps(collected(), indent=1) + "\n")


if __name__ == "__main__":
    main()
