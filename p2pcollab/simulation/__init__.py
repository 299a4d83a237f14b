"""Whole runs in one process: real coordinators, with a simulated clock, network and board."""

from .devices import BEAT_S, SETTINGS, Device
from .scenarios import DevicePlan, Partition, Scenario, random_scenario, run_spec, sixteen
from .simulator import Broken, Outcome, Simulation
from .training import PretendedTraining, Training

__all__ = [
    "BEAT_S",
    "SETTINGS",
    "Broken",
    "Device",
    "DevicePlan",
    "Outcome",
    "Partition",
    "PretendedTraining",
    "Scenario",
    "Simulation",
    "Training",
    "random_scenario",
    "run_spec",
    "sixteen",
]
