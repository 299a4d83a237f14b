"""`python -m p2pcollab.cli`: the same as the `p2pcollab` command."""

import sys

from .main import main

sys.exit(main())
