"""Lies about tensors are told from honest work by what they do to a device's own examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ledger_examples import contribution

from p2pcollab import cost, limits
from p2pcollab.daemon.judge import Judge
from p2pcollab.data import ArrayDataset, inspect, load
from p2pcollab.data.batches import batches, eval_batches
from p2pcollab.data.partition import stratified_subset
from p2pcollab.judging import (
    OTHERS_MAX,
    OWN_MAX,
    OWN_MIN,
    Comparison,
    Sample,
    compare,
    draw,
    features_by_example,
    guesses,
    judge_loss,
    losses_by_example,
)
from p2pcollab.ledger import Contribution
from p2pcollab.models import initial_shard
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.plans import Trial
from p2pcollab.run import STEM, ShardId
from p2pcollab.shards import ShardTensors
from p2pcollab.training import train_branches, train_stem
from p2pcollab.trust import Verdict

SPEC = plan_run("digits", inspect("digits"), PlanOptions(family="digits", epochs=20, seed=0))
DATA = load("digits", SPEC)
T3: Final = ShardId("t3")
ORDER: Final = np.random.default_rng(0).permutation(len(DATA.test))
LEASE: Final = 1024
LEASES: Final = 3


def lease(
    shard: ShardId, state: ShardTensors, stem: ShardTensors, number: int, data: ArrayDataset = DATA.train
) -> ShardTensors:
    """What one honest lease makes."""
    source = batches(data, SPEC, seed=number, samples=LEASE)
    progress = 0.15 * number
    if shard == STEM:
        return train_stem(SPEC, state, source, start_progress=progress, samples=LEASE).tensors[STEM]
    made = train_branches(SPEC, stem, {shard: state}, source, start_progress={shard: progress}, samples=LEASE)
    return made.tensors[shard]


@pytest.fixture(scope="module")
def lineages() -> dict[ShardId, list[ShardTensors]]:
    """The states of the stem and of a branch after each of some leases, from the initial ones on."""
    torch.manual_seed(0)
    stem = [initial_shard(SPEC, STEM)]
    for number in range(LEASES):
        stem.append(lease(STEM, stem[-1], {}, number))
    branch = [initial_shard(SPEC, T3)]
    for number in range(LEASES):
        branch.append(lease(T3, branch[-1], stem[-1], number))
    return {STEM: stem, T3: branch}


def losses(shard: ShardId, tensors: ShardTensors, stem: ShardTensors, sample: Sample) -> torch.Tensor:
    """Of each example, everything computed anew."""
    images = eval_batches(DATA.test.subset(sample.indices), SPEC)
    features_N = features_by_example(SPEC, tensors if shard == STEM else stem, images)
    return losses_by_example(SPEC, shard, tensors, features_N, DATA.test.labels[sample.indices])


class Court:
    """A judge whose own examples are the digits' test images, and what is brought before it."""

    def __init__(
        self,
        lineages: dict[ShardId, list[ShardTensors]],
        features_bytes: int = limits.TRIED_FEATURES_BYTES_MAX,
    ) -> None:
        self.judge = Judge(SPEC, DATA.test, torch.device("cpu"), seed=0, features_bytes=features_bytes)
        self._tensors: dict[str, ShardTensors] = {}
        #: What branches are tried on.
        self.stem = self.made(9, LEASES * LEASE, STEM, lineages[STEM][-1])

    def made(self, author: int, samples: int, shard: ShardId, tensors: ShardTensors) -> Contribution:
        entry = contribution(author, {author: samples}, shard=shard)
        self._tensors[entry.tensors_digest] = tensors
        return entry

    def _trial(self, entry: Contribution, reference: tuple[Contribution, ...], behind: int) -> Trial:
        stem = () if entry.shard == STEM else (self.stem,)
        return Trial(contribution=entry, reference=reference, stem=stem, behind=behind, class_counts=None)

    def _decode(self, entry: Contribution) -> ShardTensors:
        return self._tensors[entry.tensors_digest]

    def verdict(self, entry: Contribution, *reference: Contribution, behind: int = 0) -> Verdict | None:
        return self.judge.verdict(self._trial(entry, reference, behind), self._decode(entry), self._decode)

    def compare(self, entry: Contribution, *reference: Contribution) -> Comparison | None:
        return self.judge.compare(self._trial(entry, reference, 0), self._decode(entry), self._decode)


def biased(state: ShardTensors, shift: float) -> ShardTensors:
    """The same state, but for a leaning to its first class."""
    (name,) = {"aux.head.bias", "head.bias"} & state.keys()
    bias = state[name].clone()
    bias[0] += shift
    return {**state, name: bias}


def reason(
    shard: ShardId, candidate: ShardTensors, reference: ShardTensors, stem: ShardTensors
) -> str | None:
    """A device's judgement, with the digits' test images as its own examples."""
    sample = draw(SPEC, shard, DATA.test.labels, ORDER)
    assert sample is not None
    tried = [losses(shard, tensors, stem, sample) for tensors in (candidate, reference)]
    verdict = judge_loss(compare(*tried, sample), 1.0)
    return None if verdict is None else verdict.reason


@pytest.mark.parametrize("shard", [STEM, T3])
def test_every_honest_lease_is_accepted(lineages: dict[ShardId, list[ShardTensors]], shard: ShardId) -> None:
    states = lineages[shard]
    for before, after in itertools.pairwise(states):
        assert reason(shard, after, before, lineages[STEM][-1]) is None
    # Work that was done at the same time as the reference, on the same parent.
    other = lease(shard, states[-2], lineages[STEM][-1], 99)
    assert reason(shard, other, states[-1], lineages[STEM][-1]) is None


def _flipped(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return before - 4 * (after - before)


def _scaled(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return before + 10 * (after - before)


def _noisy(_before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return after + after.square().mean().sqrt() * torch.randn(after.shape, generator=generator)


def _negated(_before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return -after


@pytest.mark.parametrize("shard", [STEM, T3])
@pytest.mark.parametrize("lie", [_flipped, _scaled, _noisy, _negated])
def test_tensors_that_spoil_the_state_are_refused(
    lineages: dict[ShardId, list[ShardTensors]],
    shard: ShardId,
    lie: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    before, after = lineages[shard][-2:]
    spoilt = {}
    for name, tensor in after.items():
        spoilt[name] = lie(before[name], tensor) if tensor.is_floating_point() else tensor
        if name.endswith("running_var"):
            spoilt[name] = spoilt[name].clamp(min=1e-6)
    told = reason(shard, spoilt, before, lineages[STEM][-1])
    assert told is not None
    assert "worse than what it would replace" in told


@pytest.mark.parametrize("shard", [STEM, T3])
def test_work_on_wrong_labels_is_refused(lineages: dict[ShardId, list[ShardTensors]], shard: ShardId) -> None:
    wrong = ArrayDataset(images=DATA.train.images, labels=9 - DATA.train.labels)
    before = lineages[shard][-1]
    made = lease(shard, before, lineages[STEM][-1], LEASES, wrong)
    assert reason(shard, made, before, lineages[STEM][-1]) is not None


@pytest.mark.parametrize("shard", [STEM, T3])
def test_an_old_state_in_place_of_work_is_refused(
    lineages: dict[ShardId, list[ShardTensors]], shard: ShardId
) -> None:
    states = lineages[shard]
    assert reason(shard, states[0], states[-1], lineages[STEM][-1]) is not None


@pytest.mark.parametrize("shard", [STEM, T3])
def test_what_mends_a_bad_state_is_accepted_though_guessing_were_better(
    lineages: dict[ShardId, list[ShardTensors]], shard: ShardId
) -> None:
    """Honest leases leave such states at times. Where nothing is to compare with, guessing decides."""
    court = Court(lineages)
    late = SPEC.budget(shard)
    # They take nearly everything for their first class, the one more than the other.
    bad = court.made(1, late, shard, biased(lineages[shard][-1], 40.0))
    better = court.made(2, late, shard, biased(lineages[shard][-1], 20.0))
    assert court.verdict(better) is not None
    assert court.verdict(better, bad) is None


@pytest.mark.parametrize("shard", [STEM, T3])
def test_late_honest_work_is_not_built_on_and_held_against_nobody_and_a_late_lie_is(
    lineages: dict[ShardId, list[ShardTensors]], shard: ShardId
) -> None:
    court = Court(lineages)
    # Trained on from the last of these states, so that the first lease's is clearly worse.
    newest_state = lineages[shard][-1]
    for number in range(LEASES, 3 * LEASES):
        newest_state = lease(shard, newest_state, lineages[STEM][-1], number)
    newest = court.made(1, 3 * LEASES * LEASE, shard, newest_state)
    late = court.made(2, LEASE, shard, biased(lineages[shard][1], 1.0 if shard == STEM else 2.5))
    told = court.verdict(late, newest, behind=1)
    assert told is not None and told.excused and not told.gross
    told = court.verdict(late, newest)
    assert told is not None and not told.excused, "who is not late has no excuse"
    wrong = {
        name: -tensor if name.endswith("weight") and "norm" not in name else tensor
        for name, tensor in newest_state.items()
    }
    told = court.verdict(court.made(3, LEASE, shard, wrong), newest, behind=1)
    assert told is not None and not told.excused


def test_each_examples_features_are_computed_once_and_forgotten_when_they_are_too_many(
    lineages: dict[ShardId, list[ShardTensors]],
) -> None:
    def told(features_bytes: int) -> list[tuple[Comparison, int]]:
        """What a new judge finds, and what each trial costs it."""
        court = Court(lineages, features_bytes)
        entries = {
            shard: [court.made(1, count * LEASE, shard, state) for count, state in enumerate(states, start=1)]
            for shard, states in lineages.items()
        }
        found = []
        for shard, number, stem in [(STEM, 1, 0), (T3, 1, 1), (T3, 2, 1), (STEM, 2, 0), (T3, 2, 2)]:
            court.stem = entries[STEM][stem]
            before = court.judge.macs
            comparison = court.compare(entries[shard][number], entries[shard][number - 1])
            assert comparison is not None
            found.append((comparison, court.judge.macs - before))
        return found

    samples = {shard: draw(SPEC, shard, DATA.test.labels, ORDER) for shard in (STEM, T3)}
    counts = {shard: len(sample.indices) for shard, sample in samples.items() if sample is not None}
    heads = {shard: 2 * count * cost.head_macs(SPEC, shard) for shard, count in counts.items()}
    stem_pass = counts[STEM] * cost.macs_stem(SPEC)
    remembered = told(limits.TRIED_FEATURES_BYTES_MAX)
    macs = [spent for _, spent in remembered]
    assert macs[0] == 2 * stem_pass + heads[STEM]
    # A branch on a stem that was tried: what is missing are examples of its own classes, and once only.
    assert macs[1] - heads[T3] < stem_pass / 2
    assert macs[2] == heads[T3]
    # The stem that it is compared with was tried before.
    assert macs[3] == stem_pass + heads[STEM]
    # Without room nothing is remembered, with little not all, and everything is found as before.
    one = features_by_example(SPEC, lineages[STEM][0], eval_batches(DATA.test.subset(np.arange(1)), SPEC))
    spent = []
    for room in (0, counts[STEM] // 2, counts[STEM]):
        again = told(room * one.numel() * torch.bfloat16.itemsize)
        assert [found for found, _ in again] == [found for found, _ in remembered]
        spent.append(sum(macs for _, macs in again))
    assert spent[0] > spent[1] > spent[2] > sum(macs)
    assert spent[0] > sum(macs) + 2 * stem_pass


# What a device can judge


def test_a_device_without_a_tasks_classes_or_without_others_does_not_judge() -> None:
    labels = DATA.test.labels

    def cannot(shard: ShardId, labels: npt.NDArray[np.int64]) -> bool:
        return draw(SPEC, shard, labels, np.arange(len(labels))) is None

    assert cannot(T3, labels[labels != 3])
    assert cannot(T3, labels[labels == 3])
    assert cannot(T3, labels[:0])
    assert cannot(STEM, labels[labels == 3])
    assert cannot(T3, np.concatenate([labels[labels != 3], labels[labels == 3][: OWN_MIN - 1]]))


def test_work_is_judged_on_classes_that_its_maker_has() -> None:
    counts = [0] * 10
    counts[3] = counts[5] = 7
    sample = draw(SPEC, T3, DATA.test.labels, ORDER, counts)
    assert sample is not None
    assert set(DATA.test.labels[sample.indices]) == {3, 5}
    counts[3] = 0
    assert draw(SPEC, T3, DATA.test.labels, ORDER, counts) is None


@given(st.integers(0, 2**32), st.lists(st.integers(0, 9), min_size=1, max_size=600))
def test_few_examples_are_tried_and_the_classes_weigh_as_in_the_data(seed: int, labels: list[int]) -> None:
    array = np.array(labels, dtype=np.int64)
    sample = draw(SPEC, T3, array, np.random.default_rng(seed).permutation(len(array)))
    if sample is None:
        return
    assert len(sample.indices) <= OWN_MAX + OTHERS_MAX
    assert len(set(sample.indices.tolist())) == len(sample.indices)
    assert sample.weights.sum() == pytest.approx(1)
    own = array[sample.indices] == 3
    assert sample.weights[own].sum() == pytest.approx((array == 3).mean())


def test_samples_of_different_shards_share_examples() -> None:
    labels = DATA.test.labels
    shards = [STEM, *(ShardId(task.id) for task in SPEC.tasks)]
    drawn = [draw(SPEC, shard, labels, ORDER) for shard in shards]
    different = set().union(*(sample.indices.tolist() for sample in drawn if sample is not None))
    # The stem's, and what each task lacks of its own among them.
    assert len(different) <= OWN_MAX + OTHERS_MAX + len(SPEC.tasks) * OWN_MAX
    assert len(different) < sum(len(sample.indices) for sample in drawn if sample is not None) / 4


def test_different_seeds_try_different_examples() -> None:
    subset = stratified_subset(DATA.train.labels, 1000)
    labels = DATA.train.labels[subset]
    orders = [np.random.default_rng(seed).permutation(len(labels)) for seed in (1, 2)]
    one, other = (draw(SPEC, T3, labels, order) for order in orders)
    assert one is not None and other is not None
    assert set(one.indices) != set(other.indices)


def test_guessing_is_worth_the_entropy_of_the_classes_shares() -> None:
    labels = DATA.test.labels
    sample = draw(SPEC, STEM, labels, ORDER)
    assert sample is not None
    share = np.bincount(labels[sample.indices], minlength=10) / len(sample.indices)
    expected = -(share[share > 0] * np.log(share[share > 0])).sum()
    guessed = guesses(SPEC, STEM, labels, sample)
    assert float((torch.from_numpy(sample.weights) * guessed).sum()) == pytest.approx(expected)
    sample = draw(SPEC, T3, labels, ORDER)
    assert sample is not None
    part = float((labels == 3).mean())
    guessed = guesses(SPEC, T3, labels, sample)
    expected = -part * np.log(part) - (1 - part) * np.log(1 - part)
    assert float((torch.from_numpy(sample.weights) * guessed).sum()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("samples", "lie", "gross"),
    [
        (LEASE, "statistics", False),
        (SPEC.budget(T3), "statistics", True),
        (LEASE, "weights", True),
        (SPEC.budget(T3), "weights", True),
    ],
)
def test_early_in_training_bad_statistics_alone_are_not_gross(
    lineages: dict[ShardId, list[ShardTensors]], samples: int, lie: str, gross: bool
) -> None:
    """They may be those of weights of some steps ago, which changed fast. It is refused all the same."""
    court = Court(lineages)
    before, after = lineages[T3][-2:]
    spoilt = biased(after, 40.0)
    if lie == "statistics":
        spoilt = {
            name: 40 * tensor if name.endswith("running_mean") else tensor for name, tensor in after.items()
        }
    reference = court.made(1, samples, T3, before)
    told = court.verdict(court.made(2, samples, T3, spoilt), reference)
    assert told is not None and told.gross == gross and ("far worse" in told.reason) == gross
    assert not told.excused


# The statistic


def found(candidate: float, reference: float, error: float = 0.0) -> Comparison:
    return Comparison(candidate=candidate, reference=reference, error=error)


def test_what_chance_explains_is_not_refused() -> None:
    assert judge_loss(found(2.0, 0.5), 1.0) is not None
    assert judge_loss(found(2.0, 0.5, error=0.8), 1.0) is None


def test_late_work_that_counts_for_little_may_be_worse_up_to_a_point() -> None:
    assert judge_loss(found(0.8, 0.5), 1.0) is not None
    assert judge_loss(found(0.8, 0.5), 0.5**10) is None
    assert judge_loss(found(2.0, 0.5), 0.5**10) is not None


def test_a_loss_that_is_no_number_is_gross() -> None:
    sample = Sample(np.arange(8), np.full(8, 1 / 8))
    good_N = torch.full((8,), 0.5, dtype=torch.float64)
    for value in (math.inf, math.nan):
        bad_N = good_N.clone()
        bad_N[3] = value
        verdict = judge_loss(compare(bad_N, good_N, sample), 1.0)
        assert verdict is not None and verdict.gross


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0), st.floats(0.0, 3.0), st.floats(0.0, 1.0))
def test_what_is_gross_is_refused_by_far(
    candidate: float, reference: float, error: float, weight: float
) -> None:
    verdict = judge_loss(found(candidate, reference, error), weight)
    gross = verdict is not None and verdict.gross
    assert gross == (candidate - reference - 4 * error > 1.0 + 2 * reference)


# The worst of 1,101 honest contributions in runs without an attack, and the mildest kind of gross lie there.
@pytest.mark.parametrize(
    ("candidate", "reference", "error", "gross"),
    [(2.68, 0.58, 0.34, False), (3.39, 0.82, 0.51, False), (2.73, 0.19, 0.20, True), (30.0, 1.0, 2.0, True)],
)
def test_honest_work_is_never_gross(candidate: float, reference: float, error: float, gross: bool) -> None:
    verdict = judge_loss(found(candidate, reference, error), 1.0)
    assert verdict is not None
    assert verdict.gross == gross


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_gross_and_replaced(loss: float) -> None:
    for reference in (0.5, loss):
        verdict = judge_loss(found(loss, reference, error=loss), 1.0)
        assert verdict is not None and verdict.gross
    assert judge_loss(found(0.5, loss, error=loss), 1.0) is None


@given(st.integers(0, 2**32), st.integers(2, 200))
def test_the_error_is_that_of_a_mean_of_independent_examples(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.rand(2, count, generator=generator, dtype=torch.float64)
    sample = Sample(np.arange(count), np.full(count, 1 / count))
    result = compare(one, other, sample)
    assert result.candidate - result.reference == pytest.approx(float((one - other).mean()))
    assert result.error == pytest.approx(float((one - other).std(unbiased=False)) / count**0.5)
