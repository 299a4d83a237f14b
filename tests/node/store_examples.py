"""What the tests of the store and of its index share."""

from __future__ import annotations

import hashlib
from typing import Final

from p2pcollab.run import RunId

SPEC: Final = b'{"name":"the store does not parse it"}'
RUN_ID: Final = RunId(hashlib.sha256(SPEC).hexdigest())
SECRET: Final = bytes(range(16))
