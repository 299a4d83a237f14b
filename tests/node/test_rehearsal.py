"""A rehearsed run is what real devices do: the same budgets, the same cost, as good a model."""

from __future__ import annotations

from pathlib import Path

import digits_runs as runs
import pytest

from p2pcollab.daemon.fleet import Fleet
from p2pcollab.daemon.rehearsal import Rehearsal, Rehearsed, RehearsedDevice
from p2pcollab.data.partition import Share
from p2pcollab.run import RunSpec

DEVICES = 3


def _rehearse(spec: RunSpec, seed: int = 0) -> Rehearsed:
    devices = [RehearsedDevice(speed=1e8, share=Share(index + 1, DEVICES)) for index in range(DEVICES)]
    return Rehearsal(spec, devices, source="digits", seed=seed).run()


def test_a_rehearsal_replays_to_the_byte() -> None:
    spec = runs.digits_spec("replayed", epochs=2)
    assert _rehearse(spec, seed=3) == _rehearse(spec, seed=3)


def test_a_rehearsal_agrees_with_real_daemons(tmp_path: Path) -> None:
    spec = runs.digits_spec("agreement", epochs=4)
    rehearsed = _rehearse(spec)
    with Fleet() as fleet:
        devices = [
            runs.add_digits(fleet, f"device{index}", tmp_path, f"{index + 1}/{DEVICES}")
            for index in range(DEVICES)
        ]
        code = runs.create(devices[0], spec)
        for device in devices[1:]:
            device.start(mode="join", code=code)
        runs.complete(*devices)
        found = [runs.status(device) for device in devices]
        spent = [status["counters"] for status in found]
        real_tried = sum(counters["tried_macs"] for counters in spent)
        real_trained = sum(counters["training_macs"] for counters in spent) - real_tried
        assembled = devices[0].assemble()
        real_samples = sum(runs.seen(devices[0]).values())

    assert not assembled.missing
    # Chance is 0.1. After so few epochs, runs differ by several points.
    real = runs.digits_accuracy(assembled.data)
    told = (
        f"refused: {[status['refused'] for status in found]}, peers: {[status['peers'] for status in found]}"
    )
    assert real > 0.75, told
    assert runs.digits_accuracy(rehearsed.model) == pytest.approx(real, abs=0.1), told
    samples = sum(sum(tally.samples.values()) for tally in rehearsed.devices)
    # Real devices on a busy machine overlap more, and train a little more than the budgets.
    assert samples == pytest.approx(real_samples, rel=0.15)
    tried = sum(tally.tried_macs for tally in rehearsed.devices)
    trained = sum(tally.macs for tally in rehearsed.devices) - tried
    assert trained == pytest.approx(real_trained, rel=0.3)
    # On a busy machine much is overtaken before it is tried.
    assert 0 < real_tried < 1.5 * tried
