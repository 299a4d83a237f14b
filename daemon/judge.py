"""The judge: tries contributions of others on this device's own examples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import cost, limits
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
    features_by_example,
    guesses,
    is_gross,
    judge_loss,
    losses_by_example,
)
from ..lease import Batches
from ..ledger import Contribution, states_digest
from ..merging import STALENESS_DISCOUNT, STALENESS_MAX
from ..models import initial_shard
from ..plans import Trial
from ..run import STEM, RunSpec, ShardId
from ..shards import ShardTensors
from ..trust import SUSPECT_EARLY, Verdict

Decode = Callable[[Contribution], ShardTensors]


class MakeFeatures(Protocol):
    """As `features_by_example`."""

    def __call__(
        self, spec: RunSpec, stem_tensors: Mapping[str, Tensor], batches: Batches, *, device: torch.device
    ) -> Tensor: ...


#: Losses of references that are remembered: a reference is compared with several contributions.
_REFERENCES_KEPT: Final = 64
#: What devices with native bfloat16 compute in, in half the memory of what others do: a state and what it is
#: compared with are rounded alike.
_KEPT_AS: Final = torch.bfloat16


class Judge:
    """One device's judgement of others' tensors."""

    def __init__(
        self,
        spec: RunSpec,
        data: ArrayDataset,
        device: torch.device,
        seed: int,
        features_bytes: int = limits.TRIED_FEATURES_BYTES_MAX,
        make_features: MakeFeatures = features_by_example,
    ) -> None:
        """
        Args:
            data: examples that this device does not train on; none: it cannot judge.
            seed: of the choice of examples. Nobody else should know it, or a liar would know what its lies
                are tried on.
            features_bytes: memory for what stems make of these examples; with less, more is computed again.
            make_features: in place of the computation, where only its price is wanted.
        """
        self._spec = spec
        self._data = data
        self._device = device
        #: The same for all shards, so that they are tried on the same examples as far as can be.
        self._order = np.random.default_rng(seed).permutation(len(data))
        self._features = _Features(spec, data, device, features_bytes, make_features)
        self._samples: dict[tuple[ShardId, tuple[bool, ...]], Sample | None] = {}
        self._losses: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._head_macs = 0

    @property
    def macs(self) -> int:
        """What trying has cost so far."""
        return self._head_macs + self._features.macs

    def verdict(self, trial: Trial, tensors: ShardTensors, decode: Decode) -> Verdict | None:
        """Why a contribution's tensors should not be built on, as far as this device's examples tell."""
        found = self.compare(trial, tensors, decode)
        if found is None:
            return None
        weight = STALENESS_DISCOUNT ** min(trial.behind, STALENESS_MAX)
        stem = trial.contribution.shard == STEM
        settled = None
        if not stem and is_gross(found) and self._progress(trial) < SUSPECT_EARLY:
            # At a high rate, running statistics of a few rows a batch are those of weights that are gone. One
            # honest branch of the digits had a loss of 3.7 with them, and 0.5 without.
            settled = self.compare(trial, tensors, decode, settled=True)
        verdict = judge_loss(found, weight, stem=stem, settled=settled)
        if verdict is not None and trial.behind and found.candidate <= self._guessed(trial):
            return replace(verdict, gross=False, excused=True)
        return verdict

    def _guessed(self, trial: Trial) -> float:
        """The mean loss of guessing on the examples that a contribution is tried on.

        Late work is held to that, because what it began with may not be here any more.
        """
        shard = trial.contribution.shard
        sample = self._sample(shard, _present(trial))
        assert sample is not None, "it was compared on it"
        guessed_N = guesses(self._spec, shard, self._data.labels, sample)
        return float((torch.from_numpy(sample.weights) * guessed_N).sum())

    def compare(
        self, trial: Trial, tensors: ShardTensors, decode: Decode, *, settled: bool = False
    ) -> Comparison | None:
        """Its losses and its reference's; None if this device cannot judge.

        Args:
            settled: as in `State`.
        """
        shard = trial.contribution.shard
        present = _present(trial)
        sample = self._sample(shard, present)
        if sample is None:
            return None
        on = None if shard == STEM else self._state(STEM, trial.stem, decode)
        early = self._progress(trial) < EARLY
        key = (shard, present, states_digest(trial.reference), states_digest(trial.stem), early)
        reference_N = self._losses.get(key)
        if reference_N is None:
            self._losses[key] = reference_N = self._reference(trial, on, decode, sample, early=early)
            if len(self._losses) > _REFERENCES_KEPT:
                self._losses.popitem(last=False)
        candidate = State(states_digest((trial.contribution,)), tensors, settled=settled)
        return compare(self._try(shard, candidate, on, sample), reference_N, sample)

    def _progress(self, trial: Trial) -> float:
        """The part of its shard's budget that a contribution has seen."""
        samples = sum(count for _, count in trial.contribution.seen)
        return samples / self._spec.budget(trial.contribution.shard)

    def _reference(
        self, trial: Trial, stem: State | None, decode: Decode, sample: Sample, *, early: bool
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
            counts = [int(one) for one in present] or None
            self._samples[key] = draw(self._spec, shard, self._data.labels, self._order, counts)
        return self._samples[key]

    def _state(self, shard: ShardId, frontier: Sequence[Contribution], decode: Decode) -> State:
        try:
            return State(states_digest(frontier), merged_shard(self._spec, shard, frontier, decode))
        except PeerError:
            # The disk has lost or damaged one of them meanwhile.
            return State(states_digest(()), initial_shard(self._spec, shard))

    def _try(self, shard: ShardId, state: State, stem: State | None, sample: Sample) -> Tensor:
        features_N = self._features.of(stem or state, sample.indices)
        self._head_macs += len(sample.indices) * cost.head_macs(self._spec, shard)
        return self._losses_of(shard, state, features_N, self._data.labels[sample.indices])

    def _losses_of(
        self, shard: ShardId, state: State, features_N: Tensor, labels: npt.NDArray[np.int64]
    ) -> Tensor:
        return losses_by_example(self._spec, shard, state.tensors, features_N, labels, settled=state.settled)


def _present(trial: Trial) -> tuple[bool, ...]:
    """Of each class, whether the author has examples; empty: unknown."""
    return tuple(count > 0 for count in trial.class_counts or ())


@dataclass(frozen=True, slots=True)
class State:
    """A state of a shard, and its name (`ledger.states_digest`)."""

    digest: str
    tensors: ShardTensors
    #: Of a branch: normalise by the statistics of what it is tried on (`losses_by_example`).
    settled: bool = False


class _Features:
    """What stems make of this device's examples. Each is computed once, as far as memory goes.

    Without it nearly all that trying costs is the stem's forward pass, again and again on the same images.
    """

    def __init__(
        self,
        spec: RunSpec,
        data: ArrayDataset,
        device: torch.device,
        bytes_max: int,
        make: MakeFeatures,
    ) -> None:
        self._spec = spec
        self._data = data
        self._device = device
        #: Row in `_rows` by stem and example, the longest unused first.
        self._kept: OrderedDict[tuple[str, int], int] = OrderedDict()
        #: One block: single ones, each kept for long, left holes in the heap as large as themselves.
        self._rows: Tensor | None = None
        self._bytes_max = bytes_max
        self._make = make
        #: Of what stems make, in the arithmetic of training.
        self._dtype = torch.float32
        self.macs = 0

    def of(self, stem: State, indices: npt.NDArray[np.intp]) -> Tensor:
        """Features of some examples, [N, channels, height, width]."""
        keys = [(stem.digest, int(index)) for index in indices]
        known = [place for place, key in enumerate(keys) if key in self._kept]
        missing = [place for place, key in enumerate(keys) if key not in self._kept]
        parts = []
        if known:
            assert self._rows is not None
            parts.append(self._rows[[self._kept[keys[place]] for place in known]])
        for place in known:
            self._kept.move_to_end(keys[place])
        if missing:
            images = eval_batches(self._data.subset(np.asarray(indices)[missing]), self._spec)
            made_N = self._make(self._spec, stem.tensors, images, device=self._device)
            self._dtype = made_N.dtype
            self.macs += len(missing) * cost.macs_stem(self._spec)
            parts.append(made_N.to(_KEPT_AS))
            self._keep([keys[place] for place in missing], parts[-1])
        in_order = np.argsort(known + missing)
        features_N = torch.cat(parts)[torch.from_numpy(in_order)].to(self._dtype)
        return features_N.contiguous(memory_format=torch.channels_last)

    def _keep(self, keys: Sequence[tuple[str, int]], made_N: Tensor) -> None:
        """Put rows in the place of those that were not used for longest."""
        room = self._bytes_max // made_N[0].nbytes
        if room == 0:
            return
        if self._rows is None:
            self._rows = torch.empty(room, *made_N.shape[1:], dtype=made_N.dtype, device=made_N.device)
        for key, made in zip(keys, made_N, strict=True):
            row = len(self._kept) if len(self._kept) < room else self._kept.popitem(last=False)[1]
            self._rows[row] = made
            self._kept[key] = row
