"""The method's identity (DESIGN.md, section 3): branches trained apart equal the jointly trained network.

With the stem held fixed, same initial tensors and same batches, branches trained one at a time in
processes of their own become what a central grouped network becomes, whose loss is the sum of the
branches'. The central one is written here a second time: grouped convolutions, one backward pass through
all branches, an optimiser by hand.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
from model_specs import examples, model_spec

from p2pcollab.models import GlobalModel, GroupedBranches, build_branch, initial_shard
from p2pcollab.optimiser import learning_rate
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.shards import ShardTensors, restore_branch, restore_stem
from p2pcollab.training import local_labels, train_branches, train_stem

#: Equal up to rounding means up to the first kink, of a ReLU or a max-pool, that rounding decides: on one
#: processor a single channel parted from its twin in the 23rd step; until then all differences were 1e-7.
STEPS = 10
BATCH = 16


def _spec() -> RunSpec:
    return model_spec(tasks=((0,), (1, 2), (3,)))


def _trained_stem(spec: RunSpec) -> ShardTensors:
    """A stem whose batch-norm statistics are not the initial ones."""
    batches = examples(spec, batches=10, seed=1)
    return train_stem(spec, initial_shard(spec, STEM), batches, start_progress=0.3, samples=160).tensors[STEM]


def _train_alone(encoded_spec: bytes, shard: ShardId) -> tuple[int, ShardTensors]:
    """Runs in a process of its own: its id, and the branch it made."""
    torch.set_num_threads(1)
    spec = RunSpec.decode(encoded_spec)
    result = train_branches(
        spec,
        _trained_stem(spec),
        {shard: initial_shard(spec, shard)},
        examples(spec, batches=STEPS, seed=2),
        start_progress={shard: 0.0},
        samples=STEPS * BATCH,
    )
    return os.getpid(), result.tensors[shard]


def _train_apart(spec: RunSpec, shards: tuple[ShardId, ...]) -> dict[ShardId, ShardTensors]:
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(max_workers=1, mp_context=spawn) for _ in shards]
    try:
        started = [pool.submit(_train_alone, spec.encode(), s) for pool, s in zip(pools, shards, strict=True)]
        results = [future.result(timeout=60) for future in started]
    finally:
        for pool in pools:
            pool.shutdown()
    assert len({pid for pid, _ in results} | {os.getpid()}) == len(shards) + 1
    return {shard: tensors for shard, (_, tensors) in zip(shards, results, strict=True)}


def _train_jointly(spec: RunSpec, shards: tuple[ShardId, ...]) -> GroupedBranches:
    """All branches as one grouped network under the sum of their losses."""
    stem = restore_stem(spec, _trained_stem(spec)).eval()
    network = GroupedBranches(spec, [build_branch(spec, spec.task(shard)) for shard in shards]).train()
    parameters = dict(network.named_parameters())
    means = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    momentum = spec.schedule.momentum
    for step, (images, labels) in enumerate(examples(spec, batches=STEPS, seed=2), start=1):
        features = stem(images).detach()
        losses = [
            -logits.log_softmax(1)[torch.arange(len(labels)), local_labels(spec, shard)[labels]].mean()
            for shard, logits in zip(shards, network(features), strict=True)
        ]
        gradients = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
        rate = learning_rate(spec.schedule, (step - 0.5) * BATCH / spec.schedule.budget_samples)
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                decay = 0.0 if "bias" in name or ".norm." in name else spec.schedule.weight_decay
                means[name] = momentum * means[name] + (1 - momentum) * (gradient + decay * parameter)
                # The bias-corrected mean; SGD with momentum m takes steps 1 / (1 - m) times as long.
                parameter.sub_(rate / (1 - momentum) * means[name] / (1 - momentum**step))
    return network


def test_branches_trained_apart_equal_the_jointly_trained_network() -> None:
    spec = _spec()
    shards = tuple(shard for shard in spec.shards if shard != STEM)
    apart = _train_apart(spec, shards)
    joint = _train_jointly(spec, shards)

    branches = {shard: restore_branch(spec, spec.task(shard), apart[shard]) for shard in shards}
    together = GroupedBranches(spec, list(branches.values())).state_dict()
    initial = GroupedBranches(spec, [build_branch(spec, spec.task(shard)) for shard in shards]).state_dict()
    for name, tensor in joint.state_dict().items():
        assert torch.allclose(together[name], tensor, rtol=1e-4, atol=1e-5), f"{name} differs"
        assert not torch.equal(tensor, initial[name]), f"{name} was not trained"

    stem = restore_stem(spec, _trained_stem(spec))
    assembled = GlobalModel(spec, stem, branches).eval()
    central = GlobalModel(spec, stem, branches).eval()
    central.branches = joint
    images, _ = next(examples(spec, batches=1, seed=3))
    with torch.inference_mode():
        torch.testing.assert_close(assembled(images), central.eval()(images), rtol=1e-4, atol=1e-4)
