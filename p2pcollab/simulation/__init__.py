"""Whole runs in one process: real coordinators, with simulated clocks, network, board and disks."""

from .devices import BEAT_S, GOSSIP_S, SETTINGS, Device
from .faults import SCENARIOS
from .harvest import harvest
from .invariants import INVARIANTS, Broken
from .outcome import Healing, Outcome, Takeover
from .scenarios import Cut, DevicePlan, Scenario, Stop, random_scenario, run_spec, sixteen
from .simulator import Simulation
from .training import PretendedTraining, Training

__all__ = [
    "BEAT_S",
    "GOSSIP_S",
    "INVARIANTS",
    "SCENARIOS",
    "SETTINGS",
    "Broken",
    "Cut",
    "Device",
    "DevicePlan",
    "Healing",
    "Outcome",
    "PretendedTraining",
    "Scenario",
    "Simulation",
    "Stop",
    "Takeover",
    "Training",
    "harvest",
    "random_scenario",
    "run_spec",
    "sixteen",
]
