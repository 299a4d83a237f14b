"""The demo does what it shows: late joiner, killed device, takeover, equal digests; a short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pcollab.daemon.demo import _may_kill
from p2pcollab.errors import RunError

KEYS = {
    "assembled_accuracy",
    "central_accuracy",
    "digests",
    "devices",
    "central_training_macs",
    "coverage",
    "seconds_to_first_training_step",
    "wall_s",
    "seed",
}
DEVICE_KEYS = {"training_macs", "bytes_sent", "bytes_received", "tasks", "peak_rss_bytes"}


def test_a_run_that_is_over_before_a_device_is_killed_is_an_error_and_no_endless_wait() -> None:
    demo: Any = SimpleNamespace(progress=lambda: 1.0, last={"jetson": {"work": None}})
    jetson: Any = SimpleNamespace(name="jetson")
    with pytest.raises(RunError, match="before jetson could be killed"):
        _may_kill(demo, jetson)
    demo.last["jetson"]["work"] = {"shards": ["t0"]}
    assert _may_kill(demo, jetson)
    demo.progress = lambda: 0.4
    assert not _may_kill(demo, jetson)


@pytest.mark.slow
def test_the_demo_survives_its_own_faults_and_reports_every_documented_key(tmp_path: Path) -> None:
    report = tmp_path / "demo.json"
    command = [sys.executable, "-m", "p2pcollab.cli", "demo", "--devices", "4", "--epochs", "6"]
    run = subprocess.run(
        [*command, "--json", str(report), "--keep", str(tmp_path / "state")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    result = json.loads(report.read_text())
    assert result.keys() >= KEYS
    assert result["coverage"] == 1.0
    assert len(result["digests"]) == 2
    assert len(set(result["digests"])) == 1
    assert result["assembled_accuracy"] > 0.8
    assert all(device.keys() >= DEVICE_KEYS for device in result["devices"])
    assert [device["killed"] for device in result["devices"]].count(True) == 1
    finished_by = result["takeover"]["finished_by"]
    assert finished_by
    assert all(finished_by.values()), f"nobody finished what the killed device left: {finished_by}"
