"""`scripts/kill-many steps` on a small scale: killed at any step, a device finds all that it had stored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "python" / "kill_steps.py"


def test_killed_device_resumes_with_all_that_it_had_stored(tmp_path: Path) -> None:
    figures = tmp_path / "kills.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "15", "--seed", "1", "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads(figures.read_text())
    assert found["kills"] == 15
    assert found["problems"] == []
    assert found["more_than_a_lease_lost"] == 0
    assert found["resumed"] > 0
