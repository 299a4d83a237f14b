"""The end of a run: every device assembles the global model, and all models are to be the same one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..ledger import Contribution
from ..run import DeviceId, ShardId

if TYPE_CHECKING:
    from .devices import Device
    from .simulator import Simulation


def harvest(device: Device) -> Mapping[ShardId, tuple[Contribution, ...]]:
    """What a device assembles, after it has fetched what that takes: as `daemon.member` does it.

    The others answer at once, those too that stand still: an assembly would wait for them.
    """
    simulation, coordinator = device.simulation, device.coordinator
    coordinator.ask_again()
    while True:
        wants = [want for want in coordinator.harvest(device.held, simulation.now) if want.holders]
        if not wants:
            return {shard: coordinator.assembled_of(shard, device.held) for shard in simulation.budget}
        for want in wants:
            authors = coordinator.authors(want.shard, want.digest)
            giver = simulation.by_id[want.holders[0]]
            instead = giver.give(want.digest, want.shard, authors)
            if instead is None:
                device.keep_tensors(want.digest)
            else:
                device.take_refusal(want.digest, giver.id, instead)


def differing(simulation: Simulation) -> Mapping[ShardId, Mapping[DeviceId, tuple[str, ...]]]:
    """Shards that live devices assemble of different tensors, and of which each does."""
    found = {device.id: harvest(device) for device in simulation.live()}
    differing = {}
    for shard in simulation.budget:
        named = {
            device: tuple(entry.tensors_digest for entry in states[shard]) for device, states in found.items()
        }
        if len(set(named.values())) > 1:
            differing[shard] = named
    return differing
