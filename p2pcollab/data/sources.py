"""Where data come from: class folders, torchvision's sets, and the bundled digits.

`inspect` says what a source holds, for a run that is to be made from it; `load` reads it for a run that
exists, whose classes and input it then follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import platformdirs

from .. import limits
from ..errors import DataError
from ..run import InputSpec, RunSpec
from .arrays import ArrayDataset, LoadedData
from .classes import match_classes, missing_note
from .folders import ClassFiles, ImageFile, scan
from .images import decode_all, fit_array, shorter_sides, supported_formats, unreadable_note
from .known import DIGITS, TORCHVISION, KnownSet
from .partition import Indices, Labels, Share, partition, stratified_subset
from .readers import PublicArrays, not_found, read_digits, read_torchvision, relabelled
from .words import counted, listed, shown

#: Images of a folder that are looked at to choose the input of a new run.
_PROBED_MAX: Final = 96
_TINY_SIDE: Final = 40


@dataclass(frozen=True, slots=True)
class Source:
    """A data source as the user named it: `folder` with its path, `torchvision` with a set, or `digits`."""

    kind: Literal["folder", "torchvision", "digits"]
    name: str

    def __str__(self) -> str:
        return f"torchvision:{self.name}" if self.kind == "torchvision" else self.name

    @property
    def path(self) -> Path:
        """The folder."""
        assert self.kind == "folder"
        return Path(self.name)

    @property
    def known(self) -> KnownSet | None:
        """The public data set, or None for a folder."""
        if self.kind == "folder":
            return None
        return DIGITS if self.kind == "digits" else TORCHVISION[self.name]

    def describe(self) -> str:
        """The source in words."""
        if self.kind == "folder":
            return f"the folder {shown(self.name)}"
        return (
            "the bundled digits" if self.known is DIGITS else f"{TORCHVISION[self.name].title} (torchvision)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """What a source holds: enough to make a run from it.

    Fields:
        class_counts: training images of each class, as far as file names tell.
        mean, std: per channel, of pixel values in 0..1.
    """

    source: Source
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    channels: Literal[1, 3]
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Literal["none", "shift", "crop-flip"]
    notes: tuple[str, ...] = ()

    @property
    def train_images(self) -> int:
        """Training images in all."""
        return sum(self.class_counts)


def parse_source(text: str) -> Source:
    """Read what the user gave as --data. A folder called like a set is meant by `./digits`.

    Raises:
        DataError: it is empty, or a torchvision set that is not supported.
    """
    if not text.strip():
        raise DataError("the data source is empty", f"give a folder of class folders, {_known_names()}")
    if text.strip() == "digits":
        return Source("digits", "digits")
    scheme, colon, name = text.strip().partition(":")
    if scheme == "torchvision" and colon:
        wanted = name.lower().replace("-", "").replace("_", "")
        if wanted not in TORCHVISION:
            raise DataError(f"there is no data set torchvision:{shown(name)} here", f"use {_known_names()}")
        return Source("torchvision", wanted)
    return Source("folder", str(Path(text).expanduser()))


def default_root() -> Path:
    """Where torchvision's sets are kept if the user does not say."""
    return platformdirs.user_data_path("p2pcollab") / "datasets"


def inspect(source: Source | str, root: Path | None = None, *, download: bool = False) -> SourceInfo:
    """What a source holds, without reading all of it.

    Args:
        root: where torchvision's sets are kept; not used for other sources.
        download: a torchvision set that is not there will be fetched when it is loaded.

    Raises:
        DataError: the source is not there, or no run can be made from it.
    """
    source = parse_source(source) if isinstance(source, str) else source
    if source.kind == "folder":
        return _inspect_folder(source)
    known = source.known
    assert known is not None
    folder = (root or default_root()) / known.folder
    if source.kind == "torchvision" and not download and not folder.is_dir():
        raise not_found(known, root or default_root())
    return SourceInfo(
        source=source,
        classes=known.classes,
        class_counts=known.train_per_class,
        **known.input.model_dump(),
    )


def default_input(info: SourceInfo) -> InputSpec:
    """The input of a new run that is made from a source."""
    return InputSpec(
        channels=info.channels,
        height=info.height,
        width=info.width,
        mean=info.mean,
        std=info.std,
        augment=info.augment,
    )


def load(
    source: Source | str,
    spec: RunSpec,
    root: Path | None = None,
    *,
    share: Share | None = None,
    limit: int | None = None,
    download: bool = False,
    seed: int | None = None,
) -> LoadedData:
    """Read a source for a run.

    Args:
        root: where torchvision's sets are kept; not used for other sources.
        share: take only this part of the training images. Parts taken with equal seeds are disjoint.
        limit: use at most this many training images of the whole set, before it is divided into parts.
        download: fetch a torchvision set that is not there.
        seed: of the division into parts and of the limit; the run's if not given.

    Raises:
        DataError: the source is not there, or holds nothing for this run.
    """
    source = parse_source(source) if isinstance(source, str) else source
    assert limit is None or limit >= 1
    cut = _Cut(share=share, limit=limit, seed=spec.seed if seed is None else seed)
    if source.kind == "folder":
        return _load_folder(source, spec, cut)
    if source.kind == "digits":
        return _load_arrays(source, spec, cut, read_digits)
    known, data_root = TORCHVISION[source.name], root or default_root()
    return _load_arrays(source, spec, cut, lambda: read_torchvision(known, data_root, download))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """Which of the training images this device uses."""

    share: Share | None
    limit: int | None
    seed: int

    def choose(self, labels: Labels) -> tuple[Indices, list[str]]:
        """Indices of the images to use, and notes."""
        chosen: Indices = np.arange(len(labels))
        notes = []
        if self.limit is not None and self.limit < len(labels):
            chosen = stratified_subset(labels, self.limit, seed=self.seed)
            notes.append(f"limited to {self.limit} of {counted(len(labels), 'training image')}")
        if self.share is None:
            return chosen, notes
        part = partition(labels[chosen], self.share.of, seed=self.seed)[self.share.index - 1]
        if len(part) == 0:
            raise DataError(
                f"share {self.share} of {counted(len(chosen), 'training image')} is empty",
                "divide the data into fewer parts",
            )
        notes.append(f"share {self.share}: {len(part)} of {counted(len(chosen), 'training image')}")
        return chosen[part], notes


def _load_arrays(
    source: Source, spec: RunSpec, cut: _Cut, read: Callable[[], tuple[PublicArrays, PublicArrays]]
) -> LoadedData:
    known = source.known
    assert known is not None
    found = dict(zip(known.classes, known.train_per_class, strict=True))
    # Before anything is read: data that do not fit the run are refused at once.
    matched, notes = match_classes(found, spec.classes, source.describe())
    run_label = np.array([matched.get(name, -1) for name in known.classes], dtype=np.int64)
    train, test = (relabelled(arrays, run_label) for arrays in read())
    chosen, cut_notes = cut.choose(train.labels)
    return _finished(
        ArrayDataset(images=fit_array(train.images[chosen], spec.input), labels=train.labels[chosen]),
        ArrayDataset(images=fit_array(test.images, spec.input), labels=test.labels),
        spec,
        (*notes, *cut_notes),
    )


def _load_folder(source: Source, spec: RunSpec, cut: _Cut) -> LoadedData:
    listing = scan(_existing(source))
    where = source.describe()
    found = Counter({name: len(files) for name, files in listing.train.items()})
    found.update({name: len(files) for name, files in listing.test.items()})
    matched, notes = match_classes(dict(sorted(found.items())), spec.classes, where)
    train_files, train_labels = _flat(listing.train, matched)
    test_files, test_labels = _flat(listing.test, matched)
    if not train_files:
        raise DataError(f"{where} has test images of the run's classes, but none for training", "add some")
    chosen, cut_notes = cut.choose(train_labels)
    files = [train_files[index] for index in chosen] + test_files
    labels = np.concatenate([train_labels[chosen], test_labels])
    images, failures = decode_all([file.path for file in files], spec.input)
    if len(failures) == len(files):
        first = listed([f"{shown(files[index].path)} ({failures[index]})" for index in sorted(failures)])
        raise DataError(f"none of the {len(files)} images in {where} can be read: {first}", _readable_fix())
    unreadable = _unreadable_notes(source.path, files, labels, failures, spec)
    readable = np.array([index not in failures for index in range(len(files))], dtype=bool)
    boundary = len(chosen)
    return _finished(
        ArrayDataset(images=images[:boundary], labels=labels[:boundary]).where(readable[:boundary]),
        ArrayDataset(images=images[boundary:], labels=labels[boundary:]).where(readable[boundary:]),
        spec,
        (*listing.notes, *notes, *cut_notes, *unreadable),
    )


def _finished(train: ArrayDataset, test: ArrayDataset, spec: RunSpec, notes: tuple[str, ...]) -> LoadedData:
    if len(train) == 0:
        raise DataError("no training image is left of the data", _readable_fix())
    missing = missing_note(train.counts(len(spec.classes)), spec.classes)
    untested = () if len(test) else ("no test image on this device",)
    return LoadedData(train=train, test=test, notes=(*notes, *missing, *untested))


def _flat(files: ClassFiles, matched: Mapping[str, int]) -> tuple[list[ImageFile], Labels]:
    """The files of the run's classes in one list, in the order of the run's classes, and their labels."""
    known = sorted((label, name) for name, label in matched.items() if name in files)
    flat = [file for _, name in known for file in files[name]]
    labels = [label for label, name in known for _ in files[name]]
    return flat, np.array(labels, dtype=np.int64)


def _unreadable_notes(
    root: Path, files: list[ImageFile], labels: Labels, failures: Mapping[int, str], spec: RunSpec
) -> tuple[str, ...]:
    failed = sorted(failures)
    reasons = [f"{shown(files[index].path.relative_to(root))} ({failures[index]})" for index in failed]
    total = np.bincount(labels, minlength=len(spec.classes))
    lost = np.bincount(labels[failed], minlength=len(spec.classes))
    whole = [
        repr(name) for name, all_, bad in zip(spec.classes, total, lost, strict=True) if bad and bad == all_
    ]
    notes = unreadable_note(reasons)
    return (*notes, f"no image at all can be read of {listed(whole)}") if whole else notes


def _inspect_folder(source: Source) -> SourceInfo:
    listing = scan(_existing(source))
    classes = tuple(listing.train)
    _check_classes(classes, source)
    files = [file.path for name in classes for file in listing.train[name]]
    labels = np.repeat(np.arange(len(classes)), [len(listing.train[name]) for name in classes])
    probed = [files[index] for index in stratified_subset(labels, max(_PROBED_MAX, len(classes)))]
    sides = shorter_sides(probed)
    side = 32 if sides and sides[len(sides) // 2] <= _TINY_SIDE else 64
    plain = InputSpec(channels=3, height=side, width=side, mean=(0,) * 3, std=(1,) * 3, augment="none")
    images, failures = decode_all(probed, plain)
    readable = images[[index for index in range(len(probed)) if index not in failures]]
    if len(readable) == 0:
        reasons = listed([f"{shown(probed[index])} ({failures[index]})" for index in sorted(failures)])
        raise DataError(f"no image in {source.describe()} can be read: {reasons}", _readable_fix())
    gray = bool((readable == readable[:, :1]).all())
    pixels = (readable[:, :1] if gray else readable) / 255.0
    return SourceInfo(
        source=source,
        classes=classes,
        class_counts=tuple(len(listing.train[name]) for name in classes),
        channels=1 if gray else 3,
        height=side,
        width=side,
        mean=tuple(round(float(value), 4) for value in pixels.mean(axis=(0, 2, 3))),
        # Images that are nearly all of one colour must not be scaled up to noise.
        std=tuple(max(0.05, round(float(value), 4)) for value in pixels.std(axis=(0, 2, 3))),
        # Grey images are writing, symbols or scans as often as not: mirrored, they would be something else.
        augment="shift" if gray else "crop-flip",
        notes=listing.notes,
    )


def _check_classes(classes: tuple[str, ...], source: Source) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{source.describe()} has images of one class only, {classes[0]!r}",
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


def _existing(source: Source) -> Path:
    path = source.path
    bare = path.name.lower().replace("-", "").replace("_", "")
    if not path.exists() and bare in TORCHVISION:
        raise DataError(
            f"there is no folder {shown(path)}", f"for the public data set, write torchvision:{bare}"
        )
    return path


def _known_names() -> str:
    return ", ".join(f"torchvision:{name}" for name in TORCHVISION) + " or digits"


def _readable_fix() -> str:
    return f"check the files; readable are {supported_formats()}"
