"""A rehearsal in which some devices lie, and what the honest ones refuse."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from p2pcollab.assembly import merged_shard
from p2pcollab.coordinator import JobPlan, Trial
from p2pcollab.daemon import judge
from p2pcollab.daemon.rehearsal import Rehearsal
from p2pcollab.errors import P2PCollabError
from p2pcollab.judging import Comparison, judge_loss
from p2pcollab.ledger import Contribution
from p2pcollab.models import initial_shard
from p2pcollab.run import ShardId
from p2pcollab.shards import ShardTensors, decode_shard, encode_shard
from p2pcollab.simulation import Broken, Device, Scenario, Simulation
from p2pcollab.simulation.checks import Checks
from p2pcollab.trust import Verdict
from p2pcollab.wire import sign_contribution

from .attacks import CLAIMED_LEASES, ON_TENSORS

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(slots=True)
class Tally:
    """What honest devices thought of what they were given, by whether its maker lies."""

    tried: Counter[bool] = field(default_factory=Counter)
    refused: Counter[bool] = field(default_factory=Counter)
    #: Of these, those that do not count any more.
    gross: Counter[bool] = field(default_factory=Counter)
    #: Contributions that liars have made, and that some honest device has kept.
    lies: set[str] = field(default_factory=set)
    lies_kept: set[str] = field(default_factory=set)
    #: Reasons that honest devices gave, with how often.
    reasons: Counter[str] = field(default_factory=Counter)
    #: Whether the maker lies, the shard's progress, losses of contribution and reference, error, and weight.
    comparisons: list[tuple[bool, float, float, float, float, float]] = field(default_factory=list)


class _Checks(Checks):
    """Without the one promise that a device which signs two stories cannot keep.

    The one with the greater digest is its newest in every ledger; its own disk has the other's tensors.
    """

    def __init__(self, simulation: Simulation, equivocators: frozenset[int]) -> None:
        super().__init__(simulation)
        self._equivocators = equivocators

    def stored_before_named(self, device: Device) -> None:
        if device.index not in self._equivocators:
            super().stored_before_named(device)


class LyingSimulation(Simulation):
    """A simulation whose promises hold for the honest devices only."""

    def __init__(self, scenario: Scenario, seed: int, training: LyingRehearsal) -> None:
        super().__init__(scenario, seed, training)
        self._liars = training.liars
        equivocators = training.liars if training.attack == "equivocation" else frozenset()
        self.checks = _Checks(self, equivocators)

    def honest(self) -> list[Device]:
        return [device for device in self.live() if device.index not in self._liars]

    def complete(self) -> bool:
        honest = self.honest()
        return bool(honest) and all(one.coordinator.complete and one.job is None for one in honest)

    def converged(self) -> bool:
        return len({device.coordinator.ledger.digest() for device in self.honest()}) == 1

    def trained_by(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        made = self.training.train(device, plan)
        for one in made:
            self.sizes[one.tensors_digest] = one.tensors_bytes
        return made

    def _close(self) -> None:
        self.outcome.finished_at = self.now


class LyingRehearsal(Rehearsal):
    """A rehearsal in which the devices of `liars` attack."""

    def __init__(
        self, *arguments: Any, attack: str | None, liars: Sequence[int], limit_s: float, **named: Any
    ) -> None:
        self.attack = attack
        self.liars = frozenset(liars) if attack else frozenset()
        self.tally = Tally()
        self.incomplete = False
        self._limit_s = limit_s
        self._generator = torch.Generator().manual_seed(named.get("seed", 0))
        #: Of each liar and shard, the tensors that `stale-replay` gives again and again.
        self._replayed: dict[tuple[int, ShardId], ShardTensors] = {}
        #: What each liar has signed before, to be sent again.
        self._sent: dict[int, list[Contribution]] = {}
        super().__init__(*arguments, **named)

    def _simulate(self, scenario: Scenario, seed: int) -> Simulation:
        return LyingSimulation(replace(scenario, limit_s=self._limit_s), seed, self)

    def run(self) -> Any:
        try:
            return super().run()
        except Broken as broken:
            self.tally.reasons[f"ended early: {broken}"] += 1
            # Under attack a run need not end: what there is, is assembled.
            self.incomplete = True
            self._simulation.run = lambda: self._simulation.outcome  # type: ignore[method-assign]
            return super().run()

    # What the devices do

    def check(self, device: Device, trial: Trial) -> Verdict | None:
        found: list[tuple[Comparison, float]] = []

        def note(
            comparison: Comparison, weight: float, *, stem: bool, settled: Comparison | None
        ) -> Verdict | None:
            found.append((comparison, weight))
            return judge_loss(comparison, weight, stem=stem, settled=settled)

        with mock.patch.object(judge, "judge_loss", note):
            verdict = super().check(device, trial)
        author = self.devices.index(trial.contribution.device)
        if device.index not in self.liars:
            lies = author in self.liars
            self.tally.tried[lies] += 1
            self.tally.refused[lies] += verdict is not None
            self.tally.gross[lies] += verdict is not None and verdict.gross
            samples = sum(count for _, count in trial.contribution.seen)
            self.tally.comparisons += [
                (lies, samples / self.spec.budget(trial.contribution.shard), *astuple(comparison), weight)
                for comparison, weight in found
            ]
            if verdict is not None:
                self.tally.reasons[verdict.reason.split(":")[0]] += 1
            elif lies:
                self.tally.lies_kept.add(trial.contribution.tensors_digest)
        return verdict

    def distrusted(self, *, lying: bool) -> int:
        """Pairs of an honest device and one that it distrusts in the end."""
        honest = [device for device in self._simulation.devices if device.index not in self.liars]
        return sum(
            device.coordinator.distrusts(other)
            for device in honest
            for index, other in enumerate(self.devices)
            if (index in self.liars) == lying
        )

    def train(self, device: Device, plan: JobPlan) -> tuple[Contribution, ...]:
        try:
            made = super().train(device, plan)
        except P2PCollabError:
            # On tensors that are not numbers nobody can train: what was there is given back.
            made = tuple(
                self._publish(device, plan, job.shard, self._raw(job.parents, job.shard))
                for job in plan.shards
            )
        if device.index not in self.liars:
            return made
        lies = tuple(self._lie(device, plan, one) for one in made)
        self.tally.lies.update(one.tensors_digest for one in lies)
        return lies

    def sign_again(self, device: Device, contribution: Contribution) -> Contribution:
        """A liar accuses nobody."""
        if device.index in self.liars:
            return contribution
        return super().sign_again(device, contribution)

    def _lie(self, device: Device, plan: JobPlan, made: Contribution) -> Contribution:
        attack, shard = self.attack, made.shard
        assert attack is not None
        if attack == "label-flip":
            # It was trained on wrong labels. Signed anew, because a liar accuses nobody.
            return self._resigned(device, made, self._decode(made))
        parents = next(job.parents for job in plan.shards if job.shard == shard)
        try:
            parent = merged_shard(self.spec, shard, parents, self._decode)
            after = self._decode(made)
        except P2PCollabError:
            return made
        if attack in ON_TENSORS:
            return self._resigned(device, made, ON_TENSORS[attack](parent, after, self._generator))
        if attack == "stale-replay":
            first = self._replayed.setdefault((device.index, shard), after)
            self._send_again(device, shard)
            return self._resigned(device, made, first)
        if attack == "equivocation":
            other = self._resigned(device, made, ON_TENSORS["sign-flip"](parent, after, self._generator))
            self.tally.lies.add(other.tensors_digest)
            self._tell_some(device, other)
            return made
        assert attack == "false-counts", attack
        more = CLAIMED_LEASES * self.spec.schedule.lease_samples
        seen = dict(made.seen)
        for one in self.devices:
            if one != device.id:
                seen[one] = seen.get(one, 0) + more
        return self._resigned(device, made, parent, seen=seen)

    def _resigned(
        self, device: Device, made: Contribution, tensors: ShardTensors, **changes: Any
    ) -> Contribution:
        data = raw_bytes(tensors)
        digest = hashlib.sha256(data).hexdigest()
        self._blobs[digest] = data
        fields = {
            name: getattr(made, name)
            for name in (
                "run_id",
                "shard",
                "generation",
                "seen",
                "lease_samples",
                "stem_digest",
                "loss",
                "accuracy",
            )
        }
        fields |= {"tensors_digest": digest, "tensors_bytes": len(data), **changes}
        identity = self._identities[device.index]
        return sign_contribution(identity, **fields)

    def _publish(self, device: Device, plan: JobPlan, shard: ShardId, data: bytes) -> Contribution:
        outcome = {
            "samples": plan.samples,
            "shards": {shard: {"data": data, "loss": 0.0, "accuracy": 0.0}},
        }
        return self._contribution(device, plan, shard, outcome)

    def _raw(self, parents: Sequence[Contribution], shard: ShardId) -> bytes:
        if parents:
            return self._blobs[parents[0].tensors_digest]
        return encode_shard(initial_shard(self.spec, shard))

    def _decode(self, contribution: Contribution) -> ShardTensors:
        return decode_shard(self._blobs[contribution.tensors_digest], self.spec, contribution.shard)

    def _send_again(self, device: Device, shard: ShardId) -> None:
        """Everybody's newest entries, once more, and what this device had signed before."""
        old = self._sent.setdefault(device.index, [])
        now = self._simulation.now
        for other in self._simulation.devices:
            if other is not device:
                self._simulation.at(now, lambda other=other, old=tuple(old): other.receive(old))  # type: ignore[misc]
        own = device.coordinator.ledger.get(shard, device.id)
        if own is not None:
            old.append(own)

    def _tell_some(self, device: Device, other: Contribution) -> None:
        """One half of the devices hears the other story first."""
        device.held.add(other.tensors_digest)
        rng = random.Random(len(self.tally.lies))
        some = rng.sample(self._simulation.devices, len(self._simulation.devices) // 2)
        for listener in some:
            if listener is not device:
                self._simulation.at(
                    self._simulation.now,
                    lambda listener=listener: listener.receive([other]),  # type: ignore[misc]
                )


def raw_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A shard's bytes, whatever its values are: `encode_shard` refuses to write what is not finite."""
    data = bytearray(encode_shard({name: tensor.nan_to_num() for name, tensor in tensors.items()}))
    length = int.from_bytes(data[:8], "little")
    places = json.loads(data[8 : 8 + length])
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            begin, end = (8 + length + offset for offset in places[name]["data_offsets"])
            raw = tensor.to(_DTYPES[places[name]["dtype"]]).contiguous().reshape(-1)
            data[begin:end] = raw.view(torch.uint8).numpy().tobytes()
    return bytes(data)
