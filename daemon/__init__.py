"""The daemon: one device's life. It performs what `p2pcollab` decides."""
