"""One lease of training, and evaluation."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from model_specs import examples, model_spec

from p2pcollab import cost, lease, training
from p2pcollab.errors import RunError
from p2pcollab.models import GlobalModel, initial_shard
from p2pcollab.models.build import MOMENTUM_PREFIX
from p2pcollab.optimiser import learning_rate
from p2pcollab.run import STEM, RunSpec, Schedule, ShardId
from p2pcollab.shards import ShardTensors, restore_branch, restore_stem
from p2pcollab.training import (
    LeaseResult,
    accuracy,
    evaluate_shards,
    train_branches,
    train_stem,
)

T0, T1 = ShardId("t0"), ShardId("t1")


def _initial(spec: RunSpec, *shards: ShardId) -> dict[ShardId, ShardTensors]:
    return {shard: initial_shard(spec, shard) for shard in shards}


def _train_bundle(
    spec: RunSpec, *shards: ShardId, batches: int = 10, on_step: lease.OnStep | None = None
) -> LeaseResult:
    return train_branches(
        spec,
        initial_shard(spec, STEM),
        _initial(spec, *shards),
        examples(spec, batches=batches),
        start_progress=dict.fromkeys(shards, 0.3),
        samples=batches * 16,
        on_step=on_step,
    )


def _equal(left: ShardTensors, right: ShardTensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_same_tensors_and_batches_make_the_same_contribution() -> None:
    spec = model_spec()
    torch.manual_seed(1)
    first = _train_bundle(spec, T0, T1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = _train_bundle(spec, T0, T1)
    assert all(_equal(first.tensors[shard], second.tensors[shard]) for shard in (T0, T1))
    assert first.losses == second.losses
    assert torch.equal(torch.get_rng_state(), state)


def test_branch_does_not_depend_on_the_others_of_its_bundle() -> None:
    spec = model_spec(tasks=((0,), (1, 2), (3,)))
    together = _train_bundle(spec, T0, T1)
    assert _equal(together.tensors[T0], _train_bundle(spec, T0).tensors[T0])
    assert _equal(together.tensors[T1], _train_bundle(spec, T1).tensors[T1])


def test_lease_leaves_its_inputs_as_they_were() -> None:
    spec = model_spec()
    stem, branch = initial_shard(spec, STEM), initial_shard(spec, T0)
    given = copy.deepcopy((stem, branch))
    batches = list(examples(spec, batches=3))
    train_branches(spec, stem, {T0: branch}, batches, start_progress={T0: 0.3}, samples=48)
    train_stem(spec, stem, batches, start_progress=0.3, samples=48)
    assert _equal(stem, given[0])
    assert _equal(branch, given[1])


def test_result_says_what_was_trained_and_what_it_cost() -> None:
    spec = model_spec()
    seconds = itertools.count()
    stem = train_stem(
        spec,
        initial_shard(spec, STEM),
        examples(spec, batches=4),
        start_progress=0.0,
        samples=1000,
        clock=lambda: float(next(seconds)),
    )
    assert (stem.samples, stem.macs, stem.seconds) == (64, 64 * cost.training_macs(spec, [STEM]), 1.0)
    assert stem.tensors.keys() == stem.losses.keys() == {STEM}
    bundle = _train_bundle(spec, T0, T1, batches=4)
    assert (bundle.samples, bundle.macs) == (64, 64 * cost.training_macs(spec, [T0, T1]))
    assert bundle.tensors.keys() == bundle.losses.keys() == {T0, T1}


def test_lease_ends_with_its_samples_though_more_batches_come() -> None:
    spec = model_spec()
    batches = examples(spec, batches=100)
    result = train_stem(spec, initial_shard(spec, STEM), batches, start_progress=0.0, samples=40)
    assert result.samples == 48
    assert sum(1 for _ in batches) == 97


def test_stopped_lease_covers_the_samples_done() -> None:
    spec = model_spec()
    seen: list[tuple[int, set[ShardId]]] = []

    def stop_at_third(done: int, losses: Mapping[ShardId, float]) -> bool:
        seen.append((done, set(losses)))
        return done < 48

    stopped = _train_bundle(spec, T0, on_step=stop_at_third)
    assert seen == [(16, {T0}), (32, {T0}), (48, {T0})]
    assert stopped.samples == 48
    assert _equal(stopped.tensors[T0], _train_bundle(spec, T0, batches=3).tensors[T0])


def test_lease_without_batches_changes_nothing() -> None:
    spec = model_spec()
    result = train_branches(
        spec, initial_shard(spec, STEM), _initial(spec, T0), [], start_progress={T0: 0.0}, samples=16
    )
    assert (result.samples, result.macs, result.losses) == (0, 0, {T0: 0.0})
    assert _equal(result.tensors[T0], initial_shard(spec, T0))


def test_reported_loss_is_the_mean_of_the_last_tenth() -> None:
    spec = model_spec()
    losses: list[float] = []

    def keep(_: int, by_shard: Mapping[ShardId, float]) -> bool:
        losses.append(by_shard[T0])
        return True

    result = _train_bundle(spec, T0, batches=20, on_step=keep)
    assert result.losses[T0] == pytest.approx(sum(losses[-2:]) / 2)


def test_every_branch_has_the_learning_rate_of_its_own_progress() -> None:
    spec = model_spec()
    result = train_branches(
        spec,
        initial_shard(spec, STEM),
        _initial(spec, T0, T1),
        examples(spec, batches=3),
        start_progress={T0: 1.0, T1: 0.3},
        samples=48,
    )
    name = "head.weight"
    assert torch.equal(result.tensors[T0][name], initial_shard(spec, T0)[name])
    assert not torch.equal(result.tensors[T1][name], initial_shard(spec, T1)[name])


def test_branches_may_have_a_peak_rate_of_their_own_and_the_stem_has_the_runs() -> None:
    def schedule(**rates: float) -> Schedule:
        return Schedule(budget_samples=960, lease_samples=160, batch_size=16, **rates)

    def trained(schedule: Schedule) -> tuple[ShardTensors, ShardTensors]:
        spec = model_spec(schedule=schedule)
        start = initial_shard(spec, STEM)
        stem = train_stem(spec, start, examples(spec, batches=3), start_progress=0.1, samples=48)
        branch = train_branches(
            spec,
            start,
            _initial(spec, T0),
            examples(spec, batches=3),
            start_progress={T0: 0.1},
            samples=48,
        )
        return stem.tensors[STEM], branch.tensors[T0]

    stem, branch = trained(schedule(peak_lr=0.1, branch_lr=0.05))
    assert _equal(stem, trained(schedule(peak_lr=0.1))[0])
    assert _equal(branch, trained(schedule(peak_lr=0.05))[1])
    assert not _equal(branch, trained(schedule(peak_lr=0.1))[1])


def test_learning_rate_rises_over_the_warm_up_then_falls_to_zero() -> None:
    schedule = Schedule(budget_samples=1, lease_samples=1, batch_size=2, peak_lr=0.4, warmup_fraction=0.2)
    rates = [learning_rate(schedule, progress / 100) for progress in range(101)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(0.2)
    assert max(rates) == rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.2)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert learning_rate(schedule, 1.5) == pytest.approx(0, abs=1e-12)
    falling_only = schedule.model_copy(update={"warmup_fraction": 0.0})
    assert learning_rate(falling_only, 0.0) == pytest.approx(0.4)


def test_divergence_is_an_error_that_says_what_to_do() -> None:
    spec = model_spec()
    images, labels = next(examples(spec, batches=1))
    poisoned = [(images * math.inf, labels)]
    with pytest.raises(RunError, match="lower learning rate"):
        train_stem(spec, initial_shard(spec, STEM), poisoned, start_progress=0.3, samples=16)


def test_small_networks_stay_in_float32() -> None:
    with lease.autocast_for("cpu", model_spec()):
        assert not torch.is_autocast_enabled("cpu")


def test_large_networks_use_bf16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model_spec("alexnet", channels=3, height=32, width=32)
    for native in (True, False):
        monkeypatch.setattr(lease, "native_bf16", lambda _device, native=native: native)
        with lease.autocast_for("cpu", spec):
            assert torch.is_autocast_enabled("cpu") == native


def test_trained_tensors_are_float32_whatever_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BF16_MACS_MIN", 0)
    monkeypatch.setattr(lease, "native_bf16", lambda _device: True)
    result = _train_bundle(model_spec(), T0, batches=2)
    assert {tensor.dtype for tensor in result.tensors[T0].values()} == {torch.float32, torch.int64}


def test_stem_and_branches_trained_apart_assemble_to_a_model_that_has_learned() -> None:
    spec = model_spec(tasks=((0,), (1, 2), (3,), (3, 4)))
    tasks = tuple(shard for shard in spec.shards if shard != STEM)
    stem = train_stem(
        spec, initial_shard(spec, STEM), examples(spec, batches=42), start_progress=0.0, samples=672
    ).tensors[STEM]
    branches = train_branches(
        spec,
        stem,
        _initial(spec, *tasks),
        examples(spec, batches=60),
        start_progress=dict.fromkeys(tasks, 0.0),
        samples=960,
    ).tensors
    model = GlobalModel(
        spec,
        restore_stem(spec, stem),
        {shard: restore_branch(spec, spec.task(shard), branches[shard]) for shard in tasks},
    )
    assert accuracy(model, examples(spec, batches=10, seed=9)) > 0.95
    for shards in (tasks, (STEM,)):
        trained = {shard: branches[shard] for shard in shards if shard != STEM}
        evaluation = evaluate_shards(spec, stem, trained, examples(spec, batches=10, seed=9))
        assert evaluation.samples == 160
        assert evaluation.macs == 160 * cost.evaluation_macs(spec, shards)
        assert evaluation.scores.keys() == set(shards)
        assert all(score.accuracy > 0.9 and score.loss < 0.4 for score in evaluation.scores.values())


def test_branch_that_always_says_other_scores_half() -> None:
    spec = model_spec()
    branch = initial_shard(spec, T0)
    branch["head.bias"] = torch.tensor([-50.0, 50.0])
    scores = evaluate_shards(spec, initial_shard(spec, STEM), {T0: branch}, examples(spec, batches=10)).scores
    assert scores[T0].accuracy == pytest.approx(0.5)


def test_evaluation_without_examples_knows_nothing() -> None:
    spec = model_spec()
    evaluation = evaluate_shards(spec, initial_shard(spec, STEM), _initial(spec, T0), [])
    assert evaluation.samples == evaluation.macs == 0
    assert evaluation.scores[T0].accuracy == 0.0


def _thinned(negatives: float, positives: int | None) -> RunSpec:
    schedule = model_spec().schedule.model_copy(update={"negatives": negatives, "positives": positives})
    return model_spec(schedule=schedule)


@pytest.mark.parametrize("positives", [None, 3])
def test_unthinned_probabilities_are_learnt_from_thinned_and_repeated_examples(positives: int | None) -> None:
    """Of the other classes' examples one in four is kept."""
    spec = _thinned(0.25, positives)
    objective = training.BranchObjective(spec, T0, "cpu")
    labels = torch.tensor([0] * 40 * (positives or 1) + [1] * 30 + [2] * 30 + [3] * 30)
    logits = torch.zeros(2, requires_grad=True)
    for _ in range(2000):
        objective(logits.expand(len(labels), 2), labels).backward()
        with torch.no_grad():
            logits -= logits.grad
            logits.grad.zero_()
    assert logits.softmax(0)[0].item() == pytest.approx(40 / (40 + 90 / 0.25), abs=1e-3)


@pytest.mark.parametrize("positives", [None, 3])
def test_branch_trains_on_the_other_tasks_of_its_bundle_as_rarely_as_on_any_other_class(
    positives: int | None,
) -> None:
    """Batches for two tasks of four: their examples whole or repeated, half of the others."""
    spec = _thinned(0.5, positives)
    rows = training.BundleRows(spec, T0, (T0, T1), "cpu")
    generator = torch.Generator().manual_seed(0)
    often = torch.tensor([positives or 1.0, positives or 1.0, 0.5, 0.5])
    offered, seen = torch.zeros(4), torch.zeros(4)
    for _ in range(3000):
        labels = often.multinomial(80, replacement=True, generator=generator)
        # Features that say which example they are of.
        places, chosen = rows(torch.arange(80)[:, None], labels)
        assert torch.equal(labels[places[:, 0]], chosen)
        assert len(places.unique()) == len(places)
        assert (chosen == 0).sum() == (labels == 0).sum()
        offered += labels.bincount(minlength=4)
        seen += chosen.bincount(minlength=4)
    assert (seen[1:] / seen[0]).tolist() == pytest.approx([spec.schedule.rarity] * 3, rel=0.03)
    assert offered[1] > 1.9 * seen[1]


@pytest.mark.parametrize("labels", [[0], [0, 1], [1, 1], [1] * 20, [0] * 20])
def test_branch_of_a_bundle_never_trains_on_one_example_where_there_are_two(labels: list[int]) -> None:
    rows = training.BundleRows(_thinned(0.1, 3), T0, (T0, T1), "cpu")
    _, chosen = rows(torch.zeros(len(labels), 1), torch.tensor(labels))
    assert len(chosen) >= min(2, len(labels))
    assert (chosen == 0).sum() == labels.count(0)


def test_bundle_costs_what_each_of_its_branches_trains_on() -> None:
    spec = _thinned(0.25, 3)
    batches = list(examples(spec, batches=10))
    rows = {shard: training.BundleRows(spec, shard, (T0, T1), "cpu") for shard in (T0, T1)}
    trained = sum(
        len(rows[shard](images, labels)[1]) * cost.macs_branch(spec, shard)
        for images, labels in batches
        for shard in (T0, T1)
    )
    made = train_branches(
        spec,
        initial_shard(spec, STEM),
        _initial(spec, T0, T1),
        batches,
        start_progress={T0: 0.0, T1: 0.0},
        samples=160,
    )
    assert made.macs == 160 * cost.macs_stem(spec) + 3 * trained
    assert made.macs < 160 * cost.training_macs(spec, (T0, T1))


def test_thinned_batches_count_for_what_was_offered_and_cost_what_was_trained() -> None:
    spec = model_spec()
    result = train_branches(
        spec,
        initial_shard(spec, STEM),
        {T0: initial_shard(spec, T0)},
        examples(spec, batches=10, size=8),
        start_progress={T0: 0.0},
        samples=160,
        batch_offered=16,
    )
    assert result.samples == 160
    assert result.macs == 80 * cost.training_macs(spec, (T0,))


def _without_momentum(tensors: ShardTensors) -> ShardTensors:
    return {
        name: torch.zeros_like(tensor) if name.startswith(MOMENTUM_PREFIX) else tensor
        for name, tensor in tensors.items()
    }


def _distance(left: ShardTensors, right: ShardTensors) -> float:
    names = [name for name in left if name.endswith("weight") and not name.startswith(MOMENTUM_PREFIX)]
    return math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in names))


def test_momentum_goes_on_in_the_next_lease() -> None:
    """Several short leases end nearer to one long lease with the momentum than without."""
    spec = model_spec()
    batches = list(examples(spec, batches=40))

    def leases(size: int, *, momentum: bool) -> ShardTensors:
        state = initial_shard(spec, T0)
        for start in range(0, len(batches), size):
            if not momentum:
                state = _without_momentum(state)
            state = train_branches(
                spec,
                initial_shard(spec, STEM),
                {T0: state},
                batches[start : start + size],
                start_progress={T0: start / 100},
                samples=size * 16,
            ).tensors[T0]
        return state

    whole = leases(40, momentum=True)
    with_it, without = (_distance(leases(5, momentum=momentum), whole) for momentum in (True, False))
    assert with_it < 0.7 * without


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_hostile_momentum_moves_a_lease_no_further_than_gradients_do(scale: float) -> None:
    spec = model_spec()

    def moved(momentum: float) -> float:
        start = initial_shard(spec, T0)
        for name, tensor in start.items():
            if name.startswith(MOMENTUM_PREFIX):
                tensor.fill_(momentum)
        made = train_branches(
            spec,
            initial_shard(spec, STEM),
            {T0: start},
            examples(spec, batches=20),
            start_progress={T0: 0.2},
            samples=320,
        ).tensors[T0]
        return _distance(made, start)

    # A brought mean as long as a gradient is worth ten more steps like the first, at most.
    assert moved(scale) < 3 * moved(0.0)
