"""Class folders: finding the examples, their classes and their split in a folder on disk. Decodes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from ..errors import DataError
from . import audio, images, speech
from .listing import ClassFiles, DataFile, FolderListing, Kind
from .partition import split_by_name
from .words import counted, listed, shown

#: Written by file managers and archivers next to images; not worth a word.
_LITTER: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx", "labels.csv", "readme.md", "readme.txt"})
_TRAIN_NAMES: Final = ("train", "training")
_TEST_NAMES: Final = ("test", "testing", "val", "valid", "validation")
_ARCHIVES: Final = frozenset({".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz"})
_FIX: Final = (
    "give a folder with one sub-folder of images or audio clips per class, such as photos/cat and photos/dog"
)
_SUFFIXES: Final[Mapping[Kind, frozenset[str]]] = {"image": images.SUFFIXES, "clip": audio.SUFFIXES}


def scan(root: Path, kind: Kind | None = None) -> FolderListing:
    """List a data folder, split into training and test.

    By its sub-folders; else, of clips, by the lists or the speakers of Speech Commands; else by file name.

    Args:
        kind: what to look for; None: what there is more of.

    Raises:
        DataError: there is no such folder, or no class folder with an example in it.
    """
    _check_root(root)
    walk = _Walk(root)
    for folder in (root.resolve(), *root.resolve().parents):
        walk.enter(folder)
    train_root, test_root, notes = _split_folders(root)
    for folder in filter(None, (train_root, test_root)):
        walk.enter(folder)
    listed_files = _class_files(train_root, walk)
    kind = kind or _majority(listed_files)
    found, background = _of_kind(listed_files, kind, train_root, walk)
    _check_found(found, kind, train_root, walk)
    if test_root is not None:
        train, (test, _) = found, _of_kind(_class_files(test_root, walk), kind, test_root, walk)
    elif kind == "clip" and (parts := speech.divided(train_root, found)):
        train, test, more = parts
        notes += more
    else:
        train, test = _held_out(found)
        notes.append(f"{shown(root)} has no test folder: one {kind} in five of each class is held out")
    return FolderListing(
        root=root,
        kind=kind,
        train=train,
        test=test,
        background=background,
        notes=(*notes, *walk.notes(kind)),
    )


@dataclass(slots=True)
class _Walk:
    """One pass over a tree: what was met by the way, and which folders were seen, so that links end."""

    root: Path
    seen: set[tuple[int, int]] = field(default_factory=set)
    odd: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def enter(self, folder: Path) -> bool:
        """Whether the folder is new. A link back to a folder above or beside it is not."""
        status = folder.stat()
        key = (status.st_dev, status.st_ino)
        new = key not in self.seen
        self.seen.add(key)
        return new

    def files(self, folder: Path, prefix: str = "") -> list[DataFile]:
        """The images and clips in a folder and in its sub-folders, unsorted."""
        found: list[DataFile] = []
        try:
            entries = list(os.scandir(folder))
        except OSError:
            self.closed.append(shown(folder.relative_to(self.root)))
            return found
        for entry in entries:
            if _is_litter(entry.name):
                continue
            path = Path(entry.path)
            try:
                if entry.is_dir():
                    if self.enter(path):
                        found += self.files(path, f"{prefix}{entry.name}/")
                elif entry.is_file() and _kind_of(path) is not None:
                    found.append(DataFile(prefix + entry.name, path))
                else:
                    self.pass_over(path)
            except OSError:  # a link that leads to itself, or a folder that may not be entered
                self.pass_over(path)
        return found

    def notes(self, kind: Kind) -> list[str]:
        """What a person should know about the tree."""
        notes = [f"class folder '{name}' holds no {kind}" for name in self.empty[:10]]
        if len(self.empty) > 10:
            notes.append(f"{len(self.empty) - 10} more class folders hold no {kind}")
        if self.odd:
            hint = ""
            if any(name.lower().endswith((".heic", ".heif", ".avif")) for name in self.odd):
                hint = " (HEIC and AVIF photographs: convert them to JPEG to use them)"
            odd = counted(len(self.odd), "other entry", "other entries")
            notes.append(f"{odd} ignored: {listed(sorted(self.odd))}{hint}")
        if self.closed:
            notes.append(f"{counted(len(self.closed), 'folder')} may not be read: {listed(self.closed)}")
        return notes

    def pass_over(self, path: Path) -> None:
        """Count something that is not an example."""
        self.odd.append(shown(path.relative_to(self.root)))


def _check_root(root: Path) -> None:
    if root.is_file():
        fix = f"unpack it, and {_FIX}" if root.suffix.lower() in _ARCHIVES else _FIX
        raise DataError(f"{shown(root)} is a file, not a folder", fix)
    if not root.is_dir():
        raise DataError(f"there is no folder {shown(root)}", _FIX)
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"the folder {shown(root)} may not be read", "change its permissions, or use another")


def _split_folders(root: Path) -> tuple[Path, Path | None, list[str]]:
    """The folders that hold the class folders for training and for the test, if there is one; and notes."""
    inside = {folder.name.lower(): folder for folder in _folders(root)}
    with_classes = {name for name, folder in inside.items() if _folders(folder)}
    train = next((name for name in _TRAIN_NAMES if name in with_classes), None)
    test = next((name for name in _TEST_NAMES if name in with_classes), None)
    only_split_names = inside.keys() <= {*_TRAIN_NAMES, *_TEST_NAMES}
    if inside and only_split_names and train is None:
        raise DataError(f"{shown(root)} has no class folders with training data, only {sorted(inside)}", _FIX)
    if train is None or not (test or only_split_names):
        return root, None, []
    used = [inside[name] for name in (train, test) if name]
    notes = [f"training data from {shown(used[0])}"]
    if test:
        notes = [f"training data from {shown(used[0])}, test data from {shown(used[1])}"]
    unused = [repr(shown(folder.name)) for folder in inside.values() if folder not in used]
    if unused:
        notes.append(f"not used in {shown(root)}: {listed(sorted(unused))}")
    return used[0], used[1] if test else None, notes


def _class_files(root: Path, walk: _Walk) -> ClassFiles:
    """Class -> its images and clips, both sorted by name; of some classes there may be none."""
    # All class folders are entered first: a link from one into another must not lend it the other's images.
    folders = []
    for folder in _folders(root):
        if walk.enter(folder):
            folders.append(folder)
        else:
            walk.pass_over(folder)
    return {folder.name: tuple(sorted(walk.files(folder))) for folder in folders}


def _majority(found: ClassFiles) -> Kind:
    """What there is more of in class folders."""
    kinds = [_kind_of(file.path) for files in found.values() for file in files]
    return "clip" if kinds.count("clip") > kinds.count("image") else "image"


def _of_kind(
    found: ClassFiles, kind: Kind, root: Path, walk: _Walk
) -> tuple[ClassFiles, tuple[DataFile, ...]]:
    """Classes with their files of one kind, and the background recordings, which are no class."""
    wanted: dict[str, tuple[DataFile, ...]] = {}
    for name, files in found.items():
        kept = tuple(file for file in files if _kind_of(file.path) == kind)
        if kept:
            wanted[name] = kept
        else:
            walk.empty.append(shown((root / name).relative_to(walk.root)))
        for file in files:
            if _kind_of(file.path) != kind:
                walk.pass_over(file.path)
    background = wanted.pop(speech.BACKGROUND, ()) if kind == "clip" else ()
    return wanted, background


def _check_found(found: ClassFiles, kind: Kind, root: Path, walk: _Walk) -> None:
    if found:
        return
    if _folders(root):
        what = f"no class folder in {shown(root)} holds {_with_article(kind)} ({'; '.join(walk.notes(kind))})"
        formats = images.supported_formats() if kind == "image" else audio.supported_formats()
        raise DataError(what, f"use {formats}")
    loose = [_kind_of(Path(entry.name)) for entry in os.scandir(root)]
    kinds: tuple[Kind, ...] = ("image", "clip")
    holds = [counted(loose.count(one), one) for one in kinds if one in loose]
    what = f"holds {' and '.join(holds)}, but" if holds else "has" if any(root.iterdir()) else "is empty:"
    raise DataError(f"{shown(root)} {what} no class folders", _FIX)


def _held_out(found: ClassFiles) -> tuple[ClassFiles, ClassFiles]:
    """Divide each class into training and test by file name."""
    train: dict[str, tuple[DataFile, ...]] = {}
    test: dict[str, tuple[DataFile, ...]] = {}
    for name, files in found.items():
        kept, held = split_by_name(np.zeros(len(files), np.int64), [file.name for file in files])
        train[name] = tuple(files[index] for index in kept)
        if len(held):
            test[name] = tuple(files[index] for index in held)
    return train, test


def _folders(root: Path) -> Sequence[Path]:
    """The visible sub-folders, sorted by name."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(root) if _is_folder(entry))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return not _is_litter(entry.name) and entry.is_dir()
    except OSError:
        return False


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _kind_of(path: Path) -> Kind | None:
    """What a file seems to be, by its name."""
    suffix = path.suffix.lower()
    return next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)


def _with_article(kind: Kind) -> str:
    return "an image" if kind == "image" else "a clip"
