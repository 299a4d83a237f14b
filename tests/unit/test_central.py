"""The central columns: each learns on the run's schedule, and counts what it costs."""

from __future__ import annotations

import pytest
from model_specs import examples, model_spec

from p2pcollab import cost
from p2pcollab.central import train_decoupled, train_dense, train_grouped
from p2pcollab.run import STEM, RunSpec, Schedule, ShardId
from p2pcollab.training import accuracy, log_probabilities

TASKS = ((0,), (1, 2), (3,))


def _spec(negatives: float = 1.0, positives: int | None = None) -> RunSpec:
    schedule = Schedule(
        budget_samples=960,
        lease_samples=160,
        batch_size=16,
        peak_lr=0.05,
        negatives=negatives,
        positives=positives,
    )
    return model_spec(tasks=TASKS, schedule=schedule)


def _branches_macs(spec: RunSpec) -> int:
    return sum(cost.macs_branch(spec, ShardId(task.id)) for task in spec.tasks)


@pytest.mark.parametrize("train", [train_dense, train_grouped, train_decoupled])
def test_each_column_learns(train) -> None:
    spec = _spec()
    trained = train(spec, examples(spec, batches=60))
    assert accuracy(trained.model, examples(spec, batches=10, seed=9)) > 0.9
    outputs, labels = log_probabilities(trained.model, examples(spec, batches=2, seed=9))
    assert outputs.shape == (32, 4)
    assert labels.shape == (32,)


def test_dense_and_grouped_networks_cost_three_forward_passes_a_sample() -> None:
    spec = _spec()
    assert train_dense(spec, examples(spec, batches=60)).macs == 960 * 3 * cost.macs_dense(spec)
    grouped = 960 * 3 * (cost.macs_stem(spec) + _branches_macs(spec))
    assert train_grouped(spec, examples(spec, batches=60)).macs == grouped


def test_decoupled_training_pays_for_the_stem_until_it_is_sealed_and_its_forward_pass_always() -> None:
    spec = _spec()
    expected = 672 * cost.training_macs(spec, (STEM,)) + 960 * (
        cost.macs_stem(spec) + 3 * _branches_macs(spec)
    )
    assert train_decoupled(spec, examples(spec, batches=60)).macs == expected


def test_decoupled_training_on_thinned_examples_still_learns_and_costs_less() -> None:
    thinned, whole = _spec(negatives=0.25), _spec()
    trained = train_decoupled(thinned, examples(thinned, batches=60))
    assert trained.macs < train_decoupled(whole, examples(whole, batches=60)).macs
    assert accuracy(trained.model, examples(thinned, batches=10, seed=9)) > 0.9


def test_decoupled_training_repeats_own_examples_from_further_batches() -> None:
    """Of 16 offered examples a task of one of four classes trains on four three times, and half of twelve."""
    spec = _spec(negatives=0.5, positives=3)
    further = [examples(spec, batches=60, seed=seed) for seed in (1, 2)]
    trained = train_decoupled(spec, examples(spec, batches=60), repeats=further)
    rows = {1: 3 * 4 + 6, 2: 3 * 8 + 4}
    branches = sum(
        rows[len(task.classes)] * 3 * cost.macs_branch(spec, ShardId(task.id)) for task in spec.tasks
    )
    stem = 672 * cost.training_macs(spec, (STEM,)) + 3 * 960 * cost.macs_stem(spec)
    assert trained.macs - stem == pytest.approx(60 * branches, rel=0.05)
    assert accuracy(trained.model, examples(spec, batches=10, seed=9)) > 0.9
