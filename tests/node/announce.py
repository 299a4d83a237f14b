"""A process that announces a device until its standard input ends: `announce.py RUN_PREFIX PEER PORT`."""

from __future__ import annotations

import asyncio
import sys

from p2pcollab.daemon.discovery import Announcement, Discovery
from p2pcollab.daemon.interfaces import choose_interface


async def main(run_prefix: str, peer: str, port: str) -> None:
    discovery = Discovery(choose_interface("127.0.0.1"), peer)
    await discovery.start(Announcement(run_prefix=run_prefix, name="pets", peer=peer, port=int(port)))
    print("announced", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await discovery.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
