"""Class folders as a data source: what a run can be made of them, and their data for a run that exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from .. import limits
from ..errors import DataError
from ..run import AudioSpec, InputSpec, RunSpec
from . import audio
from .arrays import ArrayDataset, LoadedData
from .classes import match_classes
from .examples import finished, read_all, readable_fix, unreadable_note
from .features import default_cache
from .folders import scan
from .images import Pixels, shorter_sides
from .listing import ClassFiles, DataFile, FolderListing
from .naming import Source, SourceInfo, existing_folder
from .partition import Cut, Labels, stratified_subset
from .speech import SILENCE, TASK_CLASSES, background_cuts, check_task, with_task_classes
from .words import listed, shown

#: Examples of a folder that are looked at to choose the input of a new run.
_PROBED_MAX: Final = 96
_TINY_SIDE: Final = 40
#: Clips of a run are about as long as the first device's files usually are, within these bounds.
_CLIP_MS_STEP: Final = 500
_CLIP_MS_MIN: Final = 1000
_CLIP_MS_MAX: Final = 3000


def load_folder(source: Source, spec: RunSpec, cut: Cut) -> LoadedData:
    """Read class folders for a run.

    Raises:
        DataError: they are not there, or hold nothing for this run.
    """
    root, where, noun = existing_folder(source), source.describe(), spec.input.noun
    listing = scan(root, "image" if spec.input.audio is None else "clip")
    if spec.input.audio is not None:
        listing = with_task_classes(listing, spec.classes, spec.input.audio.clip_ms)
    found = Counter({name: len(files) for name, files in listing.train.items()})
    found.update({name: len(files) for name, files in listing.test.items()})
    matched, notes = match_classes(dict(sorted(found.items())), spec.classes, where, noun)
    train_files, train_labels = _flat(listing.train, matched)
    test_files, test_labels = _flat(listing.test, matched)
    if not train_files:
        raise DataError(f"{where} has test {noun}s of the run's classes, but none for training", "add some")
    chosen, cut_notes = cut.choose(train_labels, noun)
    files = [train_files[index] for index in chosen] + test_files
    labels = np.concatenate([train_labels[chosen], test_labels])
    images, failures = read_all(files, spec.input, default_cache())
    if len(failures) == len(files):
        first = listed([f"{shown(files[index].path)} ({failures[index]})" for index in sorted(failures)])
        what = f"none of the {len(files)} {noun}s in {where} can be read: {first}"
        raise DataError(what, readable_fix(spec.input))
    unreadable = _unreadable_notes(listing, files, labels, failures, spec)
    readable = np.array([index not in failures for index in range(len(files))], dtype=bool)
    boundary = len(chosen)
    train = ArrayDataset(images=images[:boundary], labels=labels[:boundary]).where(readable[:boundary])
    test = ArrayDataset(images=images[boundary:], labels=labels[boundary:]).where(readable[boundary:])
    return finished(
        replace(train, noise=_noise(listing, train, spec)),
        test,
        spec,
        (*listing.notes, *notes, *cut_notes, *unreadable),
    )


def inspect_folder(source: Source) -> SourceInfo:
    """What class folders hold, from their names and some of their files.

    Raises:
        DataError: they are not there, or no run can be made of them.
    """
    listing = scan(existing_folder(source), "clip" if source.kind == "speech-commands" else None)
    classes = tuple(listing.train)
    spec = AudioSpec()
    if source.kind == "speech-commands":
        check_task(listing)
        classes, listing = TASK_CLASSES, with_task_classes(listing, TASK_CLASSES, spec.clip_ms)
    _check_classes(classes, source)
    files = [file for name in classes for file in listing.train.get(name, ())]
    counts = [len(listing.train.get(name, ())) for name in classes]
    probed = [
        files[index]
        for index in stratified_subset(
            np.repeat(np.arange(len(classes)), counts), max(_PROBED_MAX, len(classes))
        )
    ]
    shape = _image_shape(probed) if listing.kind == "image" else _clip_shape(probed)
    images, failures = read_all(probed, shape)
    readable = images[[index for index in range(len(probed)) if index not in failures]]
    if len(readable) == 0:
        reasons = listed([f"{shown(probed[index].path)} ({failures[index]})" for index in sorted(failures)])
        raise DataError(f"no {shape.noun} in {source.describe()} can be read: {reasons}", readable_fix(shape))
    gray = bool((readable == readable[:, :1]).all())
    pixels = (readable[:, :1] if gray else readable) / 255.0
    # Grey images are writing, symbols or scans as often as not: mirrored, they would be something else.
    augment = shape.augment if shape.audio else "shift" if gray else "crop-flip"
    return SourceInfo(
        source=source,
        classes=classes,
        class_counts=tuple(counts),
        channels=1 if gray else 3,
        height=shape.height,
        width=shape.width,
        mean=tuple(round(float(value), 4) for value in pixels.mean(axis=(0, 2, 3))),
        # Images that are nearly all of one colour must not be scaled up to noise.
        std=tuple(max(0.05, round(float(value), 4)) for value in pixels.std(axis=(0, 2, 3))),
        augment=augment,
        audio=shape.audio,
        notes=listing.notes,
    )


def _image_shape(probed: Sequence[DataFile]) -> InputSpec:
    """The size for images like these; colour, normalisation and augmentation are still to be chosen."""
    sides = shorter_sides([file.path for file in probed])
    side = 32 if sides and sides[len(sides) // 2] <= _TINY_SIDE else 64
    return InputSpec(channels=3, height=side, width=side, mean=(0,) * 3, std=(1,) * 3, augment="none")


def _clip_shape(probed: Sequence[DataFile]) -> InputSpec:
    """The size for clips like these; the normalisation is still to be chosen."""
    lengths_ms = []
    for file in probed:
        if file.start_ms is None:
            try:
                lengths_ms.append(audio.duration_ms(file.path))
            except audio.UnreadableClipError:
                continue  # whoever reads the clip gives the reason
    usual_ms = sorted(lengths_ms)[len(lengths_ms) // 2] if lengths_ms else 0
    rounded_ms = round(usual_ms / _CLIP_MS_STEP) * _CLIP_MS_STEP
    spec = AudioSpec(clip_ms=min(_CLIP_MS_MAX, max(_CLIP_MS_MIN, rounded_ms)))
    return InputSpec(
        channels=1, height=spec.bands, width=spec.frames, mean=(0,), std=(1,), augment="speech", audio=spec
    )


def _noise(listing: FolderListing, train: ArrayDataset, spec: RunSpec) -> Pixels | None:
    """Backgrounds to add to clips: cuts of the recordings that the folder has, else clips of silence."""
    if spec.input.audio is None:
        return None
    cuts = background_cuts(listing.background, limits.NOISE_CLIPS_MAX, spec.input.audio.clip_ms, "train")
    clips, failures = read_all(cuts, spec.input, default_cache())
    noise = clips[[index for index in range(len(cuts)) if index not in failures]]
    if len(noise) == 0 and SILENCE in spec.classes:
        silent = np.flatnonzero(train.labels == spec.classes.index(SILENCE))
        noise = train.images[silent[:: -(-len(silent) // limits.NOISE_CLIPS_MAX) or 1]]
    return noise if len(noise) else None


def _flat(files: ClassFiles, matched: Mapping[str, int]) -> tuple[list[DataFile], Labels]:
    """The files of the run's classes in one list, in the order of the run's classes, and their labels."""
    known = sorted((label, name) for name, label in matched.items() if name in files)
    flat = [file for _, name in known for file in files[name]]
    labels = [label for label, name in known for _ in files[name]]
    return flat, np.array(labels, dtype=np.int64)


def _unreadable_notes(
    listing: FolderListing,
    files: Sequence[DataFile],
    labels: Labels,
    failures: Mapping[int, str],
    spec: RunSpec,
) -> tuple[str, ...]:
    failed, noun = sorted(failures), spec.input.noun
    paths = [shown(files[index].path.relative_to(listing.root)) for index in failed]
    reasons = [f"{path} ({failures[index]})" for path, index in zip(paths, failed, strict=True)]
    total = np.bincount(labels, minlength=len(spec.classes))
    lost = np.bincount(labels[failed], minlength=len(spec.classes))
    whole = [
        repr(name) for name, all_, bad in zip(spec.classes, total, lost, strict=True) if bad and bad == all_
    ]
    notes = unreadable_note(reasons, noun)
    return (*notes, f"no {noun} at all can be read of {listed(whole)}") if whole else notes


def _check_classes(classes: tuple[str, ...], source: Source) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{source.describe()} has data of one class only, {classes[0]!r}",
            "a classifier needs two classes or more: add a class folder, for example one of anything else",
        )
    if len(classes) > limits.CLASSES_MAX:
        raise DataError(
            f"{source.describe()} has {len(classes)} class folders, more than {limits.CLASSES_MAX}",
            "merge some of them",
        )
    for name in classes:
        if len(name) > limits.NAME_CHARS_MAX or shown(name) != name:
            raise DataError(
                f"the class folder {shown(name)!r} cannot name a class",
                f"rename it: at most {limits.NAME_CHARS_MAX} printable characters",
            )
