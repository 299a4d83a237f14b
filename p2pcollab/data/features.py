"""Clips to spectrograms: computed once in a thread pool, and kept on disk for the next start.

The cache is a folder of files, one for every 1,024 clips, so that a start that is interrupted has not been
for nothing. A file's name is the digest of what it was computed from: the audio settings, and
each clip's path, size and times. What is not what it should be is computed again. Nobody has to clean up:
beyond `limits.FEATURE_CACHE_BYTES_MAX` the files that were not used for longest go.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import platformdirs

from .. import limits
from ..errors import StorageError
from ..files import write_atomic
from ..run import AudioSpec, InputSpec
from . import audio
from .images import Pixels, check_memory
from .listing import DataFile
from .pool import for_each

#: To be changed with anything that changes a spectrogram's values or the files' layout.
_VERSION: Final = 1
_CLIPS_PER_FILE: Final = 1024
_DIGEST_BYTES: Final = 32
_SUFFIX: Final = ".features"


def default_cache() -> Path:
    """Where spectrograms are kept."""
    return platformdirs.user_cache_path("p2pcollab") / "features"


def decode_clips(
    files: Sequence[DataFile], spec: InputSpec, cache: Path | None = None
) -> tuple[Pixels, Mapping[int, str]]:
    """The spectrograms of clips.

    Args:
        cache: the folder in which they are kept; None: nowhere. One that cannot be written to is not an
            error: it only takes longer each time.

    Returns:
        uint8 [N, 1, bands, frames], with undefined rows for the failures; and index -> reason of these.

    Raises:
        DataError: they would not fit into memory, or the audio libraries do not load.
    """
    assert spec.audio is not None
    check_memory(len(files), spec)
    clips = np.empty((len(files), 1, spec.height, spec.width), dtype=np.uint8)
    failures: dict[int, str] = {}
    for start in range(0, len(files), _CLIPS_PER_FILE):
        some = slice(start, start + _CLIPS_PER_FILE)
        failed = _decode_some(files[some], spec.audio, clips[some], cache)
        failures.update({start + index: reason for index, reason in failed.items()})
    if cache is not None:
        _prune(cache)
    return clips, failures


def _decode_some(
    files: Sequence[DataFile], spec: AudioSpec, clips: Pixels, cache: Path | None
) -> dict[int, str]:
    """Fill `clips` from the cache or from the files; index -> reason of those that cannot be read."""
    entry = None if cache is None else cache / (_key(files, spec) + _SUFFIX)
    # Those that could not be read are tried again each time: it may be different now, and costs little.
    missing = np.ones(len(files), dtype=bool)
    if entry is not None:
        missing = ~_recall(entry, clips)
    wanted = np.flatnonzero(missing).tolist()
    failures: dict[int, str] = {}

    def work(position: int) -> None:
        index = wanted[position]
        try:
            clips[index] = audio.decode(files[index], spec)
            missing[index] = False
        except audio.UnreadableClipError as error:
            clips[index] = 0
            failures[index] = str(error)

    for_each(len(wanted), work)
    if entry is not None and len(failures) < len(wanted):
        _keep(entry, clips, ~missing)
    return failures


def _key(files: Sequence[DataFile], spec: AudioSpec) -> str:
    """The digest of what spectrograms are computed from."""
    digest = hashlib.sha256(f"{_VERSION} {spec.model_dump_json()}\n".encode())
    for file in files:
        try:
            status = file.path.stat()
            # The time of change as well: programs that copy and unpack set the other one to what they like.
            times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except OSError:
            times = "unknown"
        place = str(file.path.absolute()).encode("utf-8", "surrogateescape")
        digest.update(b"%d %s %s\n" % (len(place), place, f"{times} {file.start_ms} {file.gain_db}".encode()))
    return digest.hexdigest()


def _recall(entry: Path, clips: Pixels) -> npt.NDArray[np.bool_]:
    """Fill `clips` from a file of the cache; bool [N], which of them were there."""
    nothing = np.zeros(len(clips), dtype=bool)
    try:
        if entry.stat().st_size != _DIGEST_BYTES + len(clips) + clips.size:
            return nothing
        data = entry.read_bytes()
        entry.touch()
    except OSError:
        return nothing
    body = data[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != data[:_DIGEST_BYTES]:
        return nothing
    there: npt.NDArray[np.bool_] = np.frombuffer(body, dtype=np.uint8, count=len(clips)) == 1
    clips[:] = np.frombuffer(body, dtype=np.uint8, offset=len(clips)).reshape(clips.shape)
    return there


def _keep(entry: Path, clips: Pixels, there: npt.NDArray[np.bool_]) -> None:
    body = there.astype(np.uint8).tobytes() + clips.tobytes()
    with contextlib.suppress(OSError, StorageError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(entry, hashlib.sha256(body).digest() + body, mode=0o600)


def _prune(cache: Path) -> None:
    """Throw away what was not used for longest, until the rest is within its bound."""
    kept = 0
    with contextlib.suppress(OSError):
        ages = []
        for path in cache.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                ages.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(ages, reverse=True):
            kept += size
            if kept > limits.FEATURE_CACHE_BYTES_MAX:
                path.unlink(missing_ok=True)
