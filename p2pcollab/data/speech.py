"""The conventions of Speech Commands: how its clips are divided, and what `_silence_` and `_unknown_` are.

Source: Warden 2018, arXiv:1804.03209, and the README of the data set. Recordings of one's own may follow
them: `WORD/SPEAKER_nohash_N.wav`, the folder `_background_noise_`, the two lists.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from .. import limits
from ..errors import DataError
from . import audio
from .classes import folded
from .listing import ClassFiles, DataFile, FolderListing
from .words import counted, listed, shown

SILENCE: Final = "_silence_"
UNKNOWN: Final = "_unknown_"
#: Long recordings, of which `_silence_` and the noise that is mixed into clips are cut.
BACKGROUND: Final = "_background_noise_"
WORDS: Final = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
#: The classes of the usual task with twelve of them.
TASK_CLASSES: Final = (*WORDS, SILENCE, UNKNOWN)

Part = Literal["train", "validation", "test"]

_TEST_LIST: Final = "testing_list.txt"
_VALIDATION_LIST: Final = "validation_list.txt"
_SPEAKER: Final = re.compile(r"([^_/]*)_nohash_")
#: Of the published rule.
_HASH_MAX: Final = 2**27 - 1
_VALIDATION_PERCENT: Final = 10.0
_TEST_PERCENT: Final = 10.0
#: The last part of each background recording is for the test.
_TEST_FRACTION: Final = 0.2
#: How loud cuts of `_silence_` are, in turn: the recordings are louder than most rooms.
_SILENCE_GAINS_DB: Final = (0.0, -10.0, -20.0, -30.0, -40.0)


def speaker_of(name: str) -> str | None:
    """Who speaks in a clip, by its file's name, or None where that does not say.

    In the archive a file's name up to `_nohash_` is the speaker's. Where the word has been put before it, as
    in `_unknown_/WORD_SPEAKER_nohash_N.wav`, the speaker is what comes last.
    """
    found = _SPEAKER.search(PurePosixPath(name).name)
    return found[1] if found else None


def published_part(name: str) -> Part:
    """Where the published rule puts a clip: by the digest of its speaker, so that none is on two sides."""
    who = speaker_of(name) or PurePosixPath(name).name
    digest = hashlib.sha1(who.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()
    percent = int(digest, 16) % (_HASH_MAX + 1) * (100.0 / _HASH_MAX)
    if percent < _VALIDATION_PERCENT:
        return "validation"
    return "test" if percent < _VALIDATION_PERCENT + _TEST_PERCENT else "train"


def divided(root: Path, found: ClassFiles) -> tuple[ClassFiles, ClassFiles, list[str]] | None:
    """Training and test clips, and notes, by the lists in the folder or by the speakers in the clips' names.

    None if there is neither.

    Raises:
        DataError: a list cannot be read.
    """
    clips = [(label, file) for label, files in found.items() for file in files]
    if (root / _TEST_LIST).is_file():
        test, validation = _read_list(root / _TEST_LIST), _read_list(root / _VALIDATION_LIST)
        parts = [_listed_part(f"{label}/{file.name}", test, validation) for label, file in clips]
        note = f"{shown(root)}: test clips are those of {_TEST_LIST}"
    elif sum(speaker_of(file.name) is not None for _, file in clips) * 2 > len(clips):
        parts = [published_part(file.name) for _, file in clips]
        note = f"{shown(root)}: divided by speaker, with the rule of Speech Commands"
    else:
        return None
    left_out = parts.count("validation")
    if left_out:
        note += f"; {counted(left_out, 'validation clip')} not used"
    return _of_part(clips, parts, "train"), _of_part(clips, parts, "test"), [note]


def with_task_classes(listing: FolderListing, classes: Sequence[str], clip_ms: int) -> FolderListing:
    """A listing in which `_silence_` and `_unknown_`, if a run has them and the folder has not, are made up.

    Both get as many clips as the run's other classes have on average. `_silence_` is cut out of the
    background recordings, `_unknown_` is drawn from the words that the run does not know: always the same.

    Raises:
        DataError: the audio libraries do not load.
    """
    there = sorted(listing.train.keys() | listing.test.keys())
    known = {folded(name) for name in classes}
    words = [name for name in there if folded(name) in known and name not in (SILENCE, UNKNOWN)]
    others = [name for name in there if folded(name) not in known]
    if SILENCE in classes and SILENCE not in there and listing.background:
        listing = _with_silence(listing, words, clip_ms)
    if UNKNOWN in classes and UNKNOWN not in there and others:
        listing = _with_unknown(listing, words, others)
    return listing


def check_task(listing: FolderListing) -> None:
    """Refuse a folder that cannot give the task with twelve classes.

    Raises:
        DataError: words are missing, or there is nothing to make `_silence_` or `_unknown_` of.
    """
    fix = "for a run with the folder's own classes, give the folder without `speech-commands:`"
    missing = [word for word in WORDS if word not in listing.train]
    if missing:
        what = f"{shown(listing.root)} has no training clips of {listed(missing)}"
        raise DataError(f"{what}, of the ten words of Speech Commands", fix)
    if SILENCE not in listing.train and not listing.background:
        raise DataError(f"{shown(listing.root)} has neither {SILENCE} nor {BACKGROUND}", fix)
    if UNKNOWN not in listing.train and set(listing.train) <= set(TASK_CLASSES):
        raise DataError(f"{shown(listing.root)} has neither {UNKNOWN} nor other words", fix)


def background_cuts(files: Sequence[DataFile], count: int, clip_ms: int, part: Part) -> list[DataFile]:
    """Clips evenly spread over long recordings: for training over the first four fifths of each.

    Those for the test are spread over the rest. Recordings that cannot be read, or whose part is shorter than
    a clip, give none.

    Raises:
        DataError: the audio libraries do not load.
    """
    spans: list[tuple[DataFile, int, int]] = []
    for file in files:
        try:
            length_ms = audio.duration_ms(file.path)
        except audio.UnreadableClipError:
            continue
        border_ms = round(length_ms * (1 - _TEST_FRACTION))
        first_ms, end_ms = (0, border_ms) if part == "train" else (border_ms, length_ms)
        if end_ms - first_ms >= clip_ms:
            spans.append((file, first_ms, end_ms - clip_ms + 1 - first_ms))
    # Laid end to end, the moments at which a clip can begin, and where each recording's end.
    ends_ms = list(accumulate(starts for _, _, starts in spans))
    cuts = []
    for index in range(count if spans else 0):
        moment_ms = (2 * index + 1) * ends_ms[-1] // (2 * count)
        which = bisect_right(ends_ms, moment_ms)
        file, first_ms, starts = spans[which]
        start_ms = first_ms + moment_ms - (ends_ms[which] - starts)
        cuts.append(file._replace(name=f"{file.name}@{start_ms}", start_ms=start_ms))
    return cuts


def _with_silence(listing: FolderListing, words: Sequence[str], clip_ms: int) -> FolderListing:
    def plus_silence(files: ClassFiles, part: Part) -> ClassFiles:
        count = _mean_size(files, words) if words else limits.NOISE_CLIPS_MAX
        cuts = background_cuts(listing.background, count, clip_ms, part)
        quieter = tuple(
            cut._replace(gain_db=_SILENCE_GAINS_DB[index % len(_SILENCE_GAINS_DB)])
            for index, cut in enumerate(cuts)
        )
        return {**files, SILENCE: quieter} if quieter else files

    train, test = plus_silence(listing.train, "train"), plus_silence(listing.test, "test")
    made = counted(_count(train, test, SILENCE), "clip")
    return listing.with_files(train, test, f"{SILENCE}: {made} cut out of {BACKGROUND}")


def _with_unknown(listing: FolderListing, words: Sequence[str], others: Sequence[str]) -> FolderListing:
    def plus_unknown(files: ClassFiles) -> ClassFiles:
        spoken = [
            file._replace(name=f"{label}/{file.name}") for label in others for file in files.get(label, ())
        ]
        if words:
            spoken = sorted(spoken, key=_draw)[: _mean_size(files, words)]
        kept = {name: some for name, some in files.items() if name not in others}
        return {**kept, UNKNOWN: tuple(sorted(spoken))} if spoken else kept

    train, test = plus_unknown(listing.train), plus_unknown(listing.test)
    made = counted(_count(train, test, UNKNOWN), "clip")
    return listing.with_files(
        train, test, f"{UNKNOWN}: {made} of {counted(len(others), 'other word')} ({listed(others)})"
    )


def _count(train: ClassFiles, test: ClassFiles, name: str) -> int:
    return len(train.get(name, ())) + len(test.get(name, ()))


def _mean_size(files: ClassFiles, words: Sequence[str]) -> int:
    return round(sum(len(files.get(word, ())) for word in words) / len(words))


def _draw(file: DataFile) -> bytes:
    return hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).digest()


def _listed_part(name: str, test: frozenset[str], validation: frozenset[str]) -> Part:
    return "test" if name in test else "validation" if name in validation else "train"


def _of_part(clips: Iterable[tuple[str, DataFile]], parts: Iterable[Part], part: Part) -> ClassFiles:
    chosen: dict[str, list[DataFile]] = {}
    for (label, file), its_part in zip(clips, parts, strict=True):
        if its_part == part:
            chosen.setdefault(label, []).append(file)
    return {label: tuple(files) for label, files in chosen.items()}


def _read_list(path: Path) -> frozenset[str]:
    """Clips as `WORD/FILE`, one a line; none if there is no such list."""
    try:
        if path.stat().st_size > limits.SPLIT_LIST_BYTES_MAX:
            raise DataError(
                f"{shown(path)} is larger than {limits.SPLIT_LIST_BYTES_MAX // limits.MIB} MiB",
                "it should name one clip a line",
            )
        return frozenset(path.read_text("utf-8", "surrogateescape").splitlines())
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        what = f"{shown(path)} cannot be read: {error.strerror}"
        raise DataError(what, "change its permissions") from error
