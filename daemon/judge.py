"""The judge: tries contributions of others on this device's own examples."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .. import cost
from ..assembly import merged_shard
from ..data.arrays import ArrayDataset
from ..data.batches import eval_batches
from ..errors import PeerError
from ..judging import (
    EARLY,
    Comparison,
    Sample,
    compare,
    draw,
    guesses,
    judge_loss,
    losses_by_example,
)
from ..ledger import Contribution, states_digest
from ..merging import STALENESS_DISCOUNT, STALENESS_MAX
from ..models import initial_shard
from ..plans import Trial
from ..run import STEM, RunSpec, ShardId
from ..shards import ShardTensors
from ..trust import Verdict

Decode = Callable[[Contribution], ShardTensors]

#: Losses of references that are remembered: a reference is compared with several contributions.
_REFERENCES_KEPT: Final = 64


class Judge:
    """One device's judgement of others' tensors."""

    def __init__(self, spec: RunSpec, data: ArrayDataset, device: torch.device, seed: int) -> None:
        """
        Args:
            data: examples that this device does not train on; none: it cannot judge.
            seed: of the choice of examples. Nobody else should know it, or a liar would know what its lies
                are tried on.
        """
        self._spec = spec
        self._data = data
        self._device = device
        self._seed = seed
        self._samples: dict[tuple[ShardId, tuple[bool, ...]], Sample | None] = {}
        self._losses: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        #: What trying has cost since it was last read.
        self.macs = 0

    def verdict(self, trial: Trial, tensors: ShardTensors, decode: Decode) -> Verdict | None:
        """Why a contribution's tensors should not be built on, as far as this device's examples tell."""
        found = self.compare(trial, tensors, decode)
        if found is None:
            return None
        weight = STALENESS_DISCOUNT ** min(trial.behind, STALENESS_MAX)
        return judge_loss(found, weight, stem=trial.contribution.shard == STEM)

    def compare(self, trial: Trial, tensors: ShardTensors, decode: Decode) -> Comparison | None:
        """Its losses and its reference's; None if this device cannot judge."""
        shard = trial.contribution.shard
        present = tuple(count > 0 for count in trial.class_counts or ())
        sample = self._sample(shard, present)
        if sample is None:
            return None
        stem = {} if shard == STEM else self._state(STEM, trial.stem, decode)
        samples = sum(count for _, count in trial.contribution.seen)
        early = samples < EARLY * self._spec.budget(shard)
        key = (shard, present, states_digest(trial.reference), states_digest(trial.stem), early)
        reference_N = self._losses.get(key)
        if reference_N is None:
            self._losses[key] = reference_N = self._reference(trial, stem, decode, sample, early=early)
            if len(self._losses) > _REFERENCES_KEPT:
                self._losses.popitem(last=False)
        return compare(self._try(shard, tensors, stem, sample), reference_N, sample)

    def _reference(
        self, trial: Trial, stem: ShardTensors, decode: Decode, sample: Sample, *, early: bool
    ) -> Tensor:
        """The losses of what is here. If nothing is, those of guessing; early on, those of the initial state
        if that is worse.

        What is here may be worse than guessing, too: honest leases at a high learning rate leave such states,
        which the next ones mend.
        """
        shard = trial.contribution.shard
        guessed_N = guesses(self._spec, shard, self._data.labels, sample)
        if not trial.reference and not early:
            return guessed_N
        here_N = self._try(shard, self._state(shard, trial.reference, decode), stem, sample)
        if trial.reference:
            return here_N
        found = compare(here_N, guessed_N, sample)
        return guessed_N if found.candidate <= found.reference else here_N

    def _sample(self, shard: ShardId, present: tuple[bool, ...]) -> Sample | None:
        key = shard, present
        if key not in self._samples:
            if len(self._samples) >= _REFERENCES_KEPT:
                self._samples.clear()
            name = hashlib.sha256(f"{self._seed}/{shard}/{present}".encode()).digest()
            generator = np.random.default_rng(list(name))
            counts = [int(one) for one in present] or None
            self._samples[key] = draw(self._spec, shard, self._data.labels, generator, counts)
        return self._samples[key]

    def _state(self, shard: ShardId, frontier: Sequence[Contribution], decode: Decode) -> ShardTensors:
        try:
            return merged_shard(self._spec, shard, frontier, decode)
        except PeerError:
            # The disk has lost or damaged one of them meanwhile.
            return initial_shard(self._spec, shard)

    def _try(self, shard: ShardId, tensors: ShardTensors, stem: ShardTensors, sample: Sample) -> Tensor:
        chosen = self._data.subset(sample.indices)
        self.macs += len(chosen) * cost.evaluation_macs(self._spec, [shard])
        return losses_by_example(
            self._spec, shard, tensors, stem, eval_batches(chosen, self._spec), device=self._device
        )
