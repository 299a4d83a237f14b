"""Which contributions are merged: honest work always, impossible headers and wild tensors never."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hostile_bytes import quick
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.keys import Identity
from p2pcollab.ledger import Contribution, Ledger, next_generation, successor_seen
from p2pcollab.run import STEM, DeviceId, InputSpec, ModelSpec, RunSpec, Schedule, ShardId, TaskSpec
from p2pcollab.screen import reason_to_refuse, reason_to_refuse_tensors, within_bounds
from p2pcollab.wire import sign_contribution

SPEC = RunSpec(
    name="pets",
    classes=("cat", "dog"),
    tasks=(TaskSpec(id="t0", classes=(0,)), TaskSpec(id="t1", classes=(1,))),
    model=ModelSpec(family="digits", stem_stages=2, branch_width=0.5),
    input=InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), augment="none"),
    schedule=Schedule(
        budget_samples=1000, lease_samples=100, batch_size=10, peak_lr=0.1, stem_seal_fraction=0.5
    ),
    seed=7,
)
DEVICES = tuple(Identity.from_bytes(bytes([number]) * 32) for number in range(4))
ALICE = DEVICES[0]
T0 = ShardId("t0")


def contribution(identity: Identity = ALICE, **changes: Any) -> Contribution:
    """An honest first contribution of 100 samples."""
    wanted: dict[str, Any] = {
        "run_id": SPEC.run_id,
        "shard": T0,
        "generation": 1,
        "seen": {identity.device: 100},
        "lease_samples": 100,
        "stem_digest": "initial",
        "tensors_digest": "ef" * 32,
        "tensors_bytes": 1000,
        "loss": 0.5,
        "accuracy": 0.75,
    }
    return sign_contribution(identity, **(wanted | changes))


def others(samples: int) -> dict[DeviceId, int]:
    return {ALICE.device: 100, DeviceId("0" * 32): samples}


# Headers


@quick
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 110), st.booleans()), max_size=40))
def test_honest_work_is_never_refused(leases: list[tuple[int, int, bool]]) -> None:
    """Devices train and exchange in any order, and begin no lease on a shard they know to be complete."""
    ledgers = [Ledger() for _ in DEVICES]
    for number, samples, exchanges in leases:
        identity = DEVICES[number]
        if exchanges:
            ledgers[number] = ledgers[number].join(ledgers[(number + 1) % len(DEVICES)])
        frontier = ledgers[number].frontier(T0)
        if ledgers[number].progress(T0, SPEC) >= 1:
            continue
        made = contribution(
            identity,
            generation=next_generation(frontier),
            seen=successor_seen(frontier, identity.device, samples),
            lease_samples=samples,
        )
        assert reason_to_refuse(made, SPEC) is None
        ledgers[number] = ledgers[number].add(made)


def test_the_stem_is_screened_by_its_own_budget() -> None:
    stem = {"shard": STEM, "stem_digest": ""}
    assert reason_to_refuse(contribution(**stem), SPEC) is None
    assert reason_to_refuse(contribution(**stem, seen=others(900)), SPEC) is not None
    assert reason_to_refuse(contribution(seen=others(900)), SPEC) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shard": "t7"}, "no shard"),
        ({"lease_samples": 111, "seen": {ALICE.device: 111}}, "lease"),
        ({"lease_samples": 100, "seen": {ALICE.device: 99}}, "counted"),
        ({"seen": {DeviceId("0" * 32): 500}}, "counted"),
        ({"seen": others(1300)}, "budget"),
        ({"seen": others(limits.COUNT_MAX)}, "budget"),
        ({"generation": 101}, "generation"),
        ({"generation": limits.COUNT_MAX}, "generation"),
        ({"stem_digest": ""}, "stem"),
        ({"shard": STEM, "stem_digest": "ab" * 32}, "stem"),
        ({"tensors_bytes": limits.SHARD_BYTES_MAX}, "bytes"),
    ],
)
def test_an_impossible_header_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    refusal = reason_to_refuse(contribution(**changes), SPEC, tensors_bytes_max=10_000)
    assert refusal is not None
    assert reason in refusal


# Tensors


def shard() -> dict[str, torch.Tensor]:
    """A small branch as it is seeded."""
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(8, 4, 3, 3, generator=generator) * 0.05,
        "conv.bias": torch.zeros(8),
        "norm.running_mean": torch.zeros(8),
        "norm.running_var": torch.ones(8),
        "norm.num_batches_tracked": torch.tensor(0),
        "empty": torch.zeros(0),
    }


def trained() -> dict[str, torch.Tensor]:
    tensors = shard()
    tensors["conv.weight"] = tensors["conv.weight"] * 4 + 0.01
    tensors["conv.bias"] = tensors["conv.bias"] - 1.5
    tensors["norm.running_mean"] = tensors["norm.running_mean"] + 12.0
    tensors["norm.running_var"] = tensors["norm.running_var"] * 900.0
    tensors["norm.num_batches_tracked"] = torch.tensor(12_345)
    return tensors


def test_trained_tensors_are_accepted() -> None:
    assert reason_to_refuse_tensors(shard(), shard()) is None
    assert reason_to_refuse_tensors(trained(), shard()) is None


@given(st.floats(0.1, 1e30), st.sampled_from(sorted(name for name in shard() if "num" not in name)))
def test_what_a_lease_has_made_is_pulled_into_the_bounds(scale: float, name: str) -> None:
    """From a state just under a bound an honest lease steps over it; it is no liar for that."""
    tensors = trained()
    tensors[name] = tensors[name] * scale
    made = within_bounds(tensors, shard())
    assert made.keys() == tensors.keys()
    rounded = {
        one: tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        for one, tensor in made.items()
    }
    assert reason_to_refuse_tensors(rounded, shard()) is None
    if reason_to_refuse_tensors(tensors, shard()) is None and scale < 1.0:
        assert all(torch.equal(made[one], tensors[one]) for one in tensors)
    # A direction stays what it was.
    flat, was = made[name].double().flatten(), tensors[name].double().flatten()
    assert float(flat @ was) == pytest.approx(float(flat.norm() * was.norm()), rel=1e-5)


def test_what_is_not_finite_stays_so() -> None:
    tensors = trained()
    tensors["conv.bias"][0] = float("nan")
    assert reason_to_refuse_tensors(within_bounds(tensors, shard()), shard()) == "conv.bias is not finite"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "norm.running_mean", "norm.running_var"])
def test_a_single_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    tensors = trained()
    tensors[name].view(-1)[-1] = value
    assert reason_to_refuse_tensors(tensors, shard()) == f"{name} is not finite"


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "norm.running_mean", "norm.running_var"])
@pytest.mark.parametrize("scale", [1e7, 1e38])
def test_tensors_blown_up_to_own_the_mean_are_refused(name: str, scale: float) -> None:
    tensors = trained()
    tensors[name] = torch.full_like(tensors[name], scale)
    refusal = reason_to_refuse_tensors(tensors, shard())
    assert refusal is not None
    assert refusal.startswith(f"{name} has a root mean square of")


def test_a_negative_variance_is_refused() -> None:
    tensors = trained()
    tensors["norm.running_var"][0] = -1e-3
    assert reason_to_refuse_tensors(tensors, shard()) == "norm.running_var is negative"


def test_other_names_and_shapes_are_refused() -> None:
    missing, surplus, reshaped = trained(), trained(), trained()
    del missing["conv.bias"]
    surplus["more"] = torch.zeros(1)
    reshaped["conv.bias"] = torch.zeros(8, 1)
    for tensors in (missing, surplus, reshaped, {}):
        assert reason_to_refuse_tensors(tensors, shard()) is not None


def test_screening_headers_needs_no_torch() -> None:
    script = "import sys, p2pcollab.screen; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
