"""Train one model together on the devices you already own, with no server.

The modules of this package compute: they open no socket, read no clock and touch no file but where a
name says so. `p2pcollab.daemon` performs, `p2pcollab.cli` shows.
"""

__version__ = "0.1.0"
