"""The scripts that are run by hand. What they call is there: scripts/test checks their types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from data_examples import write_classes

ROOT = Path(__file__).parents[2]


def test_the_collected_figures_are_those_of_the_single_results(tmp_path: Path) -> None:
    collected = tmp_path / "reliability.json"
    script = ROOT / "scripts" / "python" / "reliability.py"
    subprocess.run([sys.executable, str(script), "--json", str(collected)], check=True, cwd=tmp_path)
    kept = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    assert json.loads(collected.read_text()) == kept, "run scripts/reliability"


def test_a_result_is_not_made_again_wherever_the_data_lie(tmp_path: Path) -> None:
    data, results = write_classes(tmp_path / "here", cat=12, dog=12), tmp_path / "results"
    script = ROOT / "scripts" / "python" / "bench_method.py"

    def bench(data: Path) -> dict[str, str]:
        options = f"--dataset pets --model digits --epochs 1 --seeds 0 --columns AD --devices 2 --data {data}"
        command = [sys.executable, str(script), *options.split(), "--results", str(results)]
        subprocess.run(command, check=True, cwd=tmp_path)
        return {path.name: path.read_text() for path in results.glob("*.json")}

    made = bench(data)
    assert sorted(name.split("-")[2] for name in made) == ["A", "D", "measured"]
    assert bench(data.rename(tmp_path / "there")) == made
