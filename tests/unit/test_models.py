"""The networks: sizes, initial values, and the scores of the classes."""

from __future__ import annotations

import hashlib
from typing import Literal

import pytest
import torch
from model_specs import FAMILY_INPUTS, model_spec

from p2pcollab.errors import UsageError
from p2pcollab.models import (
    FAMILIES,
    Classifier,
    GlobalModel,
    SubModel,
    build_aux_head,
    build_branch,
    build_dense,
    build_stem,
    initial_shard,
    probabilities,
)
from p2pcollab.models.layers import MaxPool
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.shards import encode_shard


def _branches(spec: RunSpec, *shards: str) -> dict[ShardId, Classifier]:
    tasks = [task for task in spec.tasks if not shards or task.id in shards]
    return {ShardId(task.id): build_branch(spec, task) for task in tasks}


def _images(spec: RunSpec, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, spec.input.channels, spec.input.height, spec.input.width, generator=generator)


def _with_lively_statistics(module: torch.nn.Module) -> None:
    """Batch-norm statistics and scales that differ per channel, as after training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 1:
                low = 0.5 if name.endswith(("running_var", "norm.weight")) else -0.3
                tensor.uniform_(low, low + 0.8, generator=generator)


@pytest.mark.parametrize(("family", "channels", "side"), FAMILY_INPUTS)
def test_frozen_stem_is_the_stem_in_evaluation(family: str, channels: Literal[1, 3], side: int) -> None:
    spec = model_spec(family, channels=channels, height=side, width=side, tasks=((0,), (1,)))
    stem = build_stem(spec)
    _with_lively_statistics(stem)
    images = _images(spec, 4)
    with torch.inference_mode():
        frozen = stem.train().frozen()(images)
    assert stem.training
    with torch.inference_mode():
        torch.testing.assert_close(frozen, stem.eval()(images), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in stem.frozen().parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 6), (2, 5), (3, 3)])
def test_max_pool_is_the_same_with_and_without_a_way_back(
    height: int, width: int, dtype: torch.dtype
) -> None:
    features = torch.randn(3, 4, height, width, generator=torch.Generator().manual_seed(height)).to(dtype)
    features[0, 0, 0, 0] = -torch.inf
    expected = torch.nn.functional.max_pool2d(features, 2)
    assert torch.equal(MaxPool()(features), expected)
    trained = features.clone().requires_grad_()
    pooled = MaxPool()(trained)
    assert torch.equal(pooled, expected)
    pooled.sum().backward()
    assert trained.grad is not None
    assert int(trained.grad.count_nonzero()) == expected.numel()


@pytest.mark.parametrize(("family", "channels", "side"), FAMILY_INPUTS)
@pytest.mark.parametrize(
    "tasks", [((0,), (1,), (2,)), ((0, 1), (2,), (3, 0, 4), (4,))], ids=["equal", "mixed"]
)
def test_grouped_network_scores_as_the_branches_one_after_the_other(
    family: str, channels: Literal[1, 3], side: int, tasks: tuple[tuple[int, ...], ...]
) -> None:
    spec = model_spec(family, channels=channels, height=side, width=side, tasks=tasks)
    stem, branches = build_stem(spec), _branches(spec)
    for module in (stem, *branches.values()):
        _with_lively_statistics(module)
    with torch.inference_mode():
        apart = SubModel(spec, stem, branches).eval()(_images(spec, 3))
        grouped = GlobalModel(spec, stem, branches).eval()(_images(spec, 3))
    assert apart.shape == (3, len(spec.classes))
    torch.testing.assert_close(grouped, apart, rtol=1e-5, atol=1e-5)


def test_grouped_network_without_convolutions_in_its_branches() -> None:
    spec = model_spec(stem_stages=3)
    stem, branches = build_stem(spec), _branches(spec)
    apart = SubModel(spec, stem, branches).eval()(_images(spec, 3))
    torch.testing.assert_close(GlobalModel(spec, stem, branches).eval()(_images(spec, 3)), apart)


def test_global_model_does_not_share_memory_with_the_modules_it_was_built_from() -> None:
    spec = model_spec()
    stem, branches = build_stem(spec), _branches(spec)
    model = GlobalModel(spec, stem, branches).eval()
    before = model(_images(spec, 2))
    with torch.no_grad():
        for module in (stem, *branches.values()):
            for parameter in module.parameters():
                parameter.zero_()
    assert torch.equal(model(_images(spec, 2)), before)


def test_score_of_a_class_is_its_log_probability_in_its_branch() -> None:
    spec = model_spec(tasks=((0, 2), (1,)))
    stem, branches = build_stem(spec).eval(), _branches(spec)
    images = _images(spec, 2)
    scores = SubModel(spec, stem, branches).eval()(images)
    first = branches[ShardId("t0")](stem(images)).softmax(1)
    second = branches[ShardId("t1")](stem(images)).softmax(1)
    torch.testing.assert_close(scores.exp(), torch.stack([first[:, 0], second[:, 0], first[:, 1]], dim=1))


def test_score_of_an_overlapped_class_is_the_mean_over_its_branches() -> None:
    spec = model_spec(tasks=((0, 1), (1, 2)))
    stem, branches = build_stem(spec), _branches(spec)
    images = _images(spec, 2)
    alone = [SubModel(spec, stem, _branches(spec, shard)).eval()(images) for shard in branches]
    both = GlobalModel(spec, stem, branches).eval()(images)
    torch.testing.assert_close(both[:, 1], (alone[0][:, 1] + alone[1][:, 1]) / 2)


def test_missing_branches_leave_their_classes_without_a_chance() -> None:
    spec = model_spec(tasks=((0,), (1,), (2,)))
    scores = GlobalModel(spec, build_stem(spec), _branches(spec, "t0", "t2")).eval()(_images(spec, 2))
    assert torch.isneginf(scores[:, 1]).all()
    assert torch.isfinite(scores[:, [0, 2]]).all()
    chances = probabilities(scores)
    assert (chances[:, 1] == 0).all()
    torch.testing.assert_close(chances.sum(1), torch.ones(2))


def test_model_without_any_branch_knows_nothing() -> None:
    spec = model_spec()
    scores = GlobalModel(spec, build_stem(spec), {}).eval()(_images(spec, 2))
    assert torch.isneginf(scores).all()
    assert (probabilities(scores) == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 9), (28, 28), (48, 36)])
def test_any_input_size_trains_even_on_a_batch_of_one(
    family: str, channels: Literal[1, 3], height: int, width: int
) -> None:
    spec = model_spec(family, channels=channels, height=height, width=width, tasks=((0, 1), (2,)))
    features = build_stem(spec)(_images(spec, 1))
    assert build_aux_head(spec)(features).shape == (1, 3)
    assert build_branch(spec, spec.tasks[0])(features).shape == (1, 3)
    assert build_branch(spec, spec.tasks[1])(features).shape == (1, 2)
    assert build_dense(spec)(_images(spec, 1)).shape == (1, 3)


def test_initial_tensors_do_not_depend_on_global_randomness_or_on_what_was_built_before() -> None:
    spec = model_spec(seed=3)
    torch.manual_seed(1)
    alone = initial_shard(spec, ShardId("t2"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    build_stem(spec)
    build_dense(spec)
    again = initial_shard(spec, ShardId("t2"))
    assert alone.keys() == again.keys()
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_tensors_differ_by_shard_and_by_seed() -> None:
    name = "head.weight"
    spec = model_spec(seed=3)
    tensor = initial_shard(spec, ShardId("t0"))[name]
    assert not torch.equal(tensor, initial_shard(spec, ShardId("t1"))[name])
    assert not torch.equal(tensor, initial_shard(model_spec(seed=4), ShardId("t0"))[name])


def test_initial_tensors_are_the_same_bits_on_every_machine() -> None:
    """Devices compute them apart, so a change of these digests is a change of the protocol."""
    spec = model_spec(seed=5)
    digests = [
        hashlib.sha256(encode_shard(initial_shard(spec, s))).hexdigest()[:16] for s in (STEM, ShardId("t1"))
    ]
    assert digests == ["2316151ae9e2f5c8", "46a5d0dc7b8d087a"]


def test_initial_weights_have_the_variance_of_pytorchs_own_layers() -> None:
    spec = model_spec("alexnet", channels=3, height=32, width=32)
    weight = initial_shard(spec, ShardId("t0"))["stages.1.conv.weight"]
    assert float(weight.var()) == pytest.approx(1 / (3 * weight.shape[1] * 9), rel=0.02)
    assert abs(float(weight.mean())) < 1e-3


def test_unknown_family_and_too_deep_stem_are_refused_with_what_to_do() -> None:
    spec = model_spec()
    unknown = spec.model_copy(update={"model": spec.model.model_copy(update={"family": "resnet"})})
    with pytest.raises(UsageError, match="choose one of alexnet"):
        build_stem(unknown)
    with pytest.raises(UsageError, match="fewer stem stages"):
        build_stem(model_spec(stem_stages=4))


def test_branch_keeps_a_few_channels_however_narrow() -> None:
    spec = model_spec(branch_width=0.001)
    assert build_branch(spec, spec.tasks[0])(build_stem(spec)(_images(spec, 2))).shape == (2, 2)
