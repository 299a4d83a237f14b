"""Work on many files at once, in threads: decoders release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

_THREADS_MAX: Final = 8
#: Enough per job that the pool's own cost does not count against files of 100 microseconds.
_FILES_PER_JOB: Final = 32


def for_each(count: int, work: Callable[[int], None]) -> None:
    """Call `work` with 0, 1, … count - 1, from several threads, in no particular order."""

    def job(start: int) -> None:
        for index in range(start, min(start + _FILES_PER_JOB, count)):
            work(index)

    threads = min(_THREADS_MAX, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for _ in pool.map(job, range(0, count, _FILES_PER_JOB)):
            pass
