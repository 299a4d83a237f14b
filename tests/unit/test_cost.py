"""Costs, counted a second time from the layers that run."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from model_specs import FAMILY_INPUTS, model_spec
from torch import Tensor, nn

from p2pcollab import cost
from p2pcollab.models import build_aux_head, build_branch, build_dense, build_stem
from p2pcollab.run import STEM, RunSpec, ShardId

TEN_TASKS = tuple((index,) for index in range(10))


def _counted(module: nn.Module, inputs: Tensor) -> tuple[int, Tensor]:
    """MACs of one example and the output, from the shapes that the layers see."""
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        positions = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        total += weight.numel() * positions

    handles = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    output = module.eval()(inputs)
    for handle in handles:
        handle.remove()
    return total, output


def _spec(family: str, channels: Literal[1, 3], side: int) -> RunSpec:
    return model_spec(family, channels=channels, height=side, width=side, tasks=TEN_TASKS)


@pytest.mark.parametrize(
    ("family", "channels", "side"), [*FAMILY_INPUTS, ("alexnet", 1, 28), ("vgg11", 3, 6)]
)
def test_costs_are_those_of_the_layers_that_run(family: str, channels: Literal[1, 3], side: int) -> None:
    spec = _spec(family, channels, side)
    images = torch.zeros(1, channels, side, side)
    macs_stem, features = _counted(build_stem(spec), images)
    assert cost.macs_stem(spec) == macs_stem
    assert cost.macs_aux(spec) == _counted(build_aux_head(spec), features)[0]
    assert cost.macs_branch(spec, ShardId("t0")) == _counted(build_branch(spec, spec.tasks[0]), features)[0]
    assert cost.macs_dense(spec) == _counted(build_dense(spec), images)[0]


def test_dense_alexnet_for_ten_classes_costs_171_million_macs() -> None:
    assert cost.macs_dense(_spec("alexnet", 3, 32)) == pytest.approx(171e6, abs=1e6)


def test_device_with_one_class_of_alexnet_spends_a_sixth_of_dense_training() -> None:
    spec = _spec("alexnet", 3, 32)
    assert cost.training_macs_dense(spec) > 6 * cost.training_macs(spec, [ShardId("t0")])


def test_device_with_three_digits_spends_under_a_quarter_of_dense_training() -> None:
    spec = _spec("digits", 1, 8)
    bundle = [ShardId("t0"), ShardId("t1"), ShardId("t2")]
    assert cost.training_macs_dense(spec) > 4 * cost.training_macs(spec, bundle)


def test_what_only_runs_forward_counts_once_and_what_trains_three_times() -> None:
    spec = _spec("digits", 1, 8)
    stem, aux = cost.macs_stem(spec), cost.macs_aux(spec)
    branch = cost.macs_branch(spec, ShardId("t0"))
    assert cost.training_macs(spec, [STEM]) == 3 * (stem + aux)
    assert cost.training_macs(spec, [ShardId("t0"), ShardId("t1")]) == stem + 6 * branch
    assert cost.evaluation_macs(spec, [STEM, ShardId("t0")]) == stem + aux + branch


def test_stem_runs_on_what_a_bundle_trains_on_and_each_branch_trains_on_its_own_part() -> None:
    """Own examples three times, half of the others: for two of ten classes as many as are offered."""
    schedule = model_spec().schedule.model_copy(update={"negatives": 0.5, "positives": 3})
    spec = model_spec(tasks=TEN_TASKS, schedule=schedule)
    labels = np.arange(10)
    stem, branch = cost.macs_stem(spec), cost.macs_branch(spec, ShardId("t0"))
    bundle = [ShardId("t0"), ShardId("t1")]
    each = 0.1 * 3 + 0.9 * 0.5
    assert cost.offered_macs(spec, bundle, labels) == pytest.approx(1.0 * stem + 2 * 3 * each * branch)
    assert cost.offered_macs(spec, bundle[:1], labels) == pytest.approx(each * (stem + 3 * branch))
    assert cost.offered_macs(spec, [STEM], labels) == cost.training_macs(spec, [STEM])


def test_a_squeeze_makes_a_narrow_branch_on_a_wide_stem_cheaper() -> None:
    def branch(**divided: float | None) -> int:
        spec = model_spec("alexnet", channels=3, height=32, width=32, tasks=TEN_TASKS, **divided)
        return cost.macs_branch(spec, ShardId("t0"))

    assert branch(branch_squeeze=0.25) < 0.6 * branch(branch_squeeze=None)
