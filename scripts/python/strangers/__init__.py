"""The parts of scripts/attack-strangers: the recording, the stranger, and the devices that it attacks."""
