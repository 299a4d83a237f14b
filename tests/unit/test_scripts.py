"""The scripts that are run by hand. What they call is there: scripts/test checks their types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_collected_figures_are_those_of_the_single_results(tmp_path: Path) -> None:
    collected = tmp_path / "reliability.json"
    script = ROOT / "scripts" / "python" / "reliability.py"
    subprocess.run([sys.executable, str(script), "--json", str(collected)], check=True, cwd=tmp_path)
    kept = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    assert json.loads(collected.read_text()) == kept, "run scripts/reliability"
