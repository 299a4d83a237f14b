"""Devices that lie, in whole runs: real training, real contributions, simulated time.

`scripts/bench-liars` measures all attacks on CIFAR-10; these see that the defence is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from p2pcollab.data import inspect
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import RunSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "python"))

from liars.runs import Setting, read, run

DEVICES = 5


def setting() -> Setting:
    options = PlanOptions(family="digits", epochs=6, seed=0, classes_per_task=2)
    spec = plan_run("liars", inspect("digits"), options)
    changes = {"lease_samples": 640, "batch_size": 64, "peak_lr": 0.05}
    schedule = spec.schedule.model_copy(update=changes)
    spec = RunSpec.decode(spec.model_copy(update={"schedule": schedule}).encode())
    return Setting(spec=spec, source="digits", root=None, limit=1438, devices=DEVICES, liars=(2,))


@pytest.mark.parametrize("attack", ["equivocation", "false-counts"])
def test_one_liar_among_five_does_little_harm_and_honest_work_is_kept(attack: str) -> None:
    one = setting()
    result = run(one, read(one), attack, defended=True)
    # Chance is 0.1.
    assert result["accuracy"] > 0.85
    assert not result["incomplete"]
    honest = result["honest"]
    assert honest["tried"] > 20
    assert honest["refused"] <= 0.05 * honest["tried"]
    assert result["lying"]["made"] > 0


def test_the_same_lies_spoil_a_plain_average() -> None:
    one = setting()
    result = run(one, read(one), "sign-flip", defended=False)
    assert result["accuracy"] < 0.7
    assert result["honest"]["refused"] == 0
