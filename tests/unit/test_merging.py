"""Merging gives the same bits everywhere, and the statistics of the union."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ledger_examples import T0, contribution
from torch import Tensor

from p2pcollab.ledger import Contribution, Ledger
from p2pcollab.merging import STALENESS_DISCOUNT, merge, merged_digest, weights

Part = tuple[Contribution, dict[str, Tensor]]


def part(author: int, seed: int, *, samples: int = 10, generation: int = 1) -> Part:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(5, generator=generator) * 100
    tensors = {
        "conv.weight": torch.randn(4, 3, generator=generator) * 10 ** (seed % 7 - 3),
        "norm.running_mean": mean,
        "norm.running_var": torch.rand(5, generator=generator),
        "norm.num_batches_tracked": torch.tensor(seed % 50),
    }
    return contribution(author, generation=generation, lease_samples=samples), tensors


parts = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(1, 10**6), st.integers(1, 5)), min_size=1, max_size=5
).map(
    lambda rows: [
        part(author, seed, samples=samples, generation=generation)
        for author, (seed, samples, generation) in enumerate(rows)
    ]
)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@given(parts)
def test_order_of_contributions_does_not_change_a_bit(given_parts: list[Part]) -> None:
    expected = bits(merge(given_parts))
    for order in itertools.islice(itertools.permutations(given_parts), 24):
        assert bits(merge(order)) == expected


@given(st.integers(0, 1000), st.integers(1, 10**9))
def test_single_contribution_comes_back_to_the_bit(seed: int, samples: int) -> None:
    entry, tensors = part(0, seed, samples=samples)
    tensors["conv.weight"][0, 0] = -0.0
    merged = merge([(entry, tensors)])
    assert bits(merged) == bits(tensors)
    assert all(merged[name].data_ptr() != tensors[name].data_ptr() for name in tensors)


@given(st.integers(0, 1000), st.integers(2, 6))
def test_merging_equal_tensors_gives_these_tensors(seed: int, count: int) -> None:
    _, tensors = part(0, seed)
    equal = [(part(author, 0, samples=7**author)[0], tensors) for author in range(count)]
    assert bits(merge(equal)) == bits(tensors)


@given(parts)
def test_mean_lies_between_its_parts(given_parts: list[Part]) -> None:
    merged = merge(given_parts)
    for name in ("conv.weight", "norm.running_mean"):
        stacked = torch.stack([tensors[name] for _, tensors in given_parts])
        assert bool((merged[name] >= stacked.amin(0)).all())
        assert bool((merged[name] <= stacked.amax(0)).all())
        assert merged[name].dtype == torch.float32


@given(st.data())
def test_a_minority_of_liars_cannot_leave_the_range_of_the_others(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 9))
    liars = data.draw(st.integers(1, count // 3))
    honest = [
        part(author, data.draw(st.integers(0, 1000)), samples=data.draw(st.integers(1, 100)), generation=7)
        for author in range(count - liars)
    ]
    size = data.draw(st.sampled_from([1e30, -1e30, 1e3, 0.0]))
    lies = [
        (
            contribution(count - index, generation=8, lease_samples=10**9),
            {
                name: torch.full_like(tensor, abs(size) if name.endswith("running_var") else size)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in honest[0][1].items()
            },
        )
        for index in range(1, liars + 1)
    ]
    merged = merge([*honest, *lies])
    for name in ("conv.weight", "norm.running_mean"):
        stacked = torch.stack([tensors[name] for _, tensors in honest])
        assert bool((merged[name] >= stacked.amin(0)).all())
        assert bool((merged[name] <= stacked.amax(0)).all())
    variances = torch.stack([tensors["norm.running_var"] for _, tensors in honest])
    means = torch.stack([tensors["norm.running_mean"] for _, tensors in honest])
    spread = (means.amax(0) - means.amin(0)).square()
    # The bound is computed in float32.
    assert bool((merged["norm.running_var"] <= (variances.amax(0) + spread) * (1 + 1e-5)).all())


def test_of_three_the_middle_one_is_left_whatever_they_weigh() -> None:
    values = [(1.0, 10), (2.0, 1), (100.0, 10**6)]
    parts_given = [
        (contribution(author, lease_samples=samples), {"w": torch.tensor([value])})
        for author, (value, samples) in enumerate(values)
    ]
    assert merge(parts_given)["w"].item() == 2.0
    assert merge(parts_given[:2])["w"].item() == pytest.approx(12 / 11)


def test_stragglers_do_not_outvote_the_one_in_front() -> None:
    values = [(1.0, 20), (5.0, 3), (6.0, 2)]
    parts_given = [
        (contribution(author, generation=generation), {"w": torch.tensor([value])})
        for author, (value, generation) in enumerate(values)
    ]
    assert merge(parts_given)["w"].item() == pytest.approx(1.0, abs=0.02)


def test_batch_norm_statistics_merge_as_those_of_the_union() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(count, generator=generator, dtype=torch.float64) * 3 + count for count in (10, 30)]
    given_parts = [
        (
            contribution(author, lease_samples=len(values)),
            {
                "n.running_mean": values.mean().reshape(1).float(),
                "n.running_var": values.var(unbiased=False).reshape(1).float(),
            },
        )
        for author, values in enumerate(data)
    ]
    merged, union = merge(given_parts), torch.cat(data)
    torch.testing.assert_close(merged["n.running_mean"], union.mean().reshape(1).float())
    torch.testing.assert_close(merged["n.running_var"], union.var(unbiased=False).reshape(1).float())


def test_variance_survives_a_mean_that_is_much_larger() -> None:
    statistics = {"n.running_mean": torch.tensor([1e6]), "n.running_var": torch.tensor([1e-3])}
    merged = merge([(contribution(author), statistics) for author in range(3)])
    assert bits(merged) == bits(statistics)


def test_counters_take_the_greatest() -> None:
    counters = [(contribution(author), {"n": torch.tensor(count)}) for author, count in enumerate((3, 9, 4))]
    assert merge(counters)["n"].item() == 9
    assert merge(counters)["n"].dtype == torch.int64


def test_weight_is_the_leases_samples_discounted_by_staleness() -> None:
    entries = [
        contribution(0, generation=5, lease_samples=100),
        contribution(1, generation=3, lease_samples=40),
    ]
    assert weights(entries) == (100.0, 40 * STALENESS_DISCOUNT**2)


def test_absurd_generation_does_not_silence_the_others() -> None:
    entries = [contribution(0, generation=10**9), contribution(1)]
    assert min(weights(entries)) > 0


def test_merged_state_is_named_after_its_frontier() -> None:
    one, other = contribution(0), contribution(1)
    assert merged_digest(Ledger(), T0) == "initial"
    assert merged_digest(Ledger([one, other]), T0) == merged_digest(Ledger([other, one]), T0)
    assert merged_digest(Ledger([one]), T0) != merged_digest(Ledger([one, other]), T0)


def test_tensors_of_different_shards_are_not_merged() -> None:
    with pytest.raises(AssertionError):
        merge([(contribution(0), {"a": torch.ones(1)}), (contribution(1), {"b": torch.ones(1)})])
