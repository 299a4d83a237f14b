"""Files to examples of the run's input, whether they hold images or clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import limits
from ..errors import DataError, UsageError
from ..run import InputSpec, RunSpec
from . import audio, images
from .arrays import ArrayDataset, LoadedData
from .classes import missing_note
from .features import decode_clips
from .images import Pixels, decode_all
from .listing import DataFile
from .words import counted, listed, shown


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedImages:
    """Images, or clips' spectrograms, for prediction.

    Fields:
        images: uint8 [N, C, H, W].
        paths: the file of each image; unreadable ones are left out.
        notes: what was left out, named and counted.
    """

    images: Pixels
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def read_all(
    files: Sequence[DataFile], spec: InputSpec, cache: Path | None = None
) -> tuple[Pixels, Mapping[int, str]]:
    """Read files in a thread pool; the spectrograms of clips are kept in `cache`, if one is given.

    Returns:
        Examples, uint8 [N, C, H, W], with undefined rows for the failures; and index -> reason of these.
    """
    if spec.audio is not None:
        return decode_clips(files, spec, cache)
    return decode_all([file.path for file in files], spec)


def load_images(paths: Sequence[Path], spec: RunSpec) -> LoadedImages:
    """Read images or clips for prediction; a folder stands for those directly in it, in the order of names.

    Raises:
        DataError: a path does not exist, a folder holds no example, or nothing can be read.
        UsageError: too many at once.
    """
    noun = spec.input.noun
    files = [file for path in paths for file in _expanded(path, spec.input)]
    if not files:
        raise DataError(f"no {noun} was given", _fix(noun))
    if len(files) > limits.PREDICT_IMAGES_MAX:
        raise UsageError(
            f"{len(files)} {noun}s are more than {limits.PREDICT_IMAGES_MAX}", "predict them in several calls"
        )
    examples, failures = read_all([DataFile(file.name, file) for file in files], spec.input)
    reasons = [f"{shown(files[index])} ({failures[index]})" for index in sorted(failures)]
    if len(failures) == len(files):
        raise DataError(f"no {noun} can be read: {listed(reasons)}", f"use {supported_formats(spec.input)}")
    kept = [index for index in range(len(files)) if index not in failures]
    return LoadedImages(
        images=examples[kept] if failures else examples,
        paths=tuple(files[index] for index in kept),
        notes=unreadable_note(reasons, noun),
    )


def finished(train: ArrayDataset, test: ArrayDataset, spec: RunSpec, notes: tuple[str, ...]) -> LoadedData:
    """What was read, with notes of what is missing in it.

    Raises:
        DataError: nothing is left to train on.
    """
    noun = spec.input.noun
    if len(train) == 0:
        raise DataError(f"no training {noun} is left of the data", readable_fix(spec.input))
    missing = missing_note(train.counts(len(spec.classes)), spec.classes, noun)
    untested = () if len(test) else (f"no test {noun} on this device",)
    return LoadedData(train=train, test=test, notes=(*notes, *missing, *untested))


def readable_fix(spec: InputSpec) -> str:
    """What to do about files that cannot be read."""
    return f"check the files; readable are {supported_formats(spec)}"


def supported_formats(spec: InputSpec) -> str:
    """The kinds of files that a run can read, for people."""
    return images.supported_formats() if spec.audio is None else audio.supported_formats()


def unreadable_note(reasons: Sequence[str], noun: str) -> tuple[str, ...]:
    """The note about files that could not be read, if there are any."""
    if not reasons:
        return ()
    return (f"{counted(len(reasons), noun)} cannot be read and left out: {listed(reasons)}",)


def _expanded(path: Path, spec: InputSpec) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{shown(path)} does not exist", _fix(spec.noun))
        return [path]
    suffixes = images.SUFFIXES if spec.audio is None else audio.SUFFIXES
    files = sorted(
        file
        for file in path.iterdir()
        if not file.name.startswith(".") and file.suffix.lower() in suffixes and file.is_file()
    )
    if not files:
        raise DataError(f"the folder {shown(path)} holds no {spec.noun}", f"use {supported_formats(spec)}")
    return files


def _fix(noun: str) -> str:
    kind = "image" if noun == "image" else "audio"
    return f"name {kind} files, or a folder of {noun}s"
