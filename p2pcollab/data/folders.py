"""Class folders: finding the images, their classes and their split in a folder on disk. Decodes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from ..errors import DataError
from .images import SUFFIXES, supported_formats
from .partition import split_by_name
from .words import counted, listed, shown

#: Written by file managers and archivers next to images; not worth a word.
_LITTER: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx", "labels.csv", "readme.md", "readme.txt"})
_TRAIN_NAMES: Final = ("train", "training")
_TEST_NAMES: Final = ("test", "testing", "val", "valid", "validation")
_ARCHIVES: Final = frozenset({".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz"})
_FIX: Final = "give a folder with one sub-folder of images per class, such as photos/cat and photos/dog"


class ImageFile(NamedTuple):
    """An image file: its path, and its name relative to the folder of its class, with forward slashes."""

    name: str
    path: Path


ClassFiles = Mapping[str, tuple[ImageFile, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderListing:
    """What a data folder holds. Classes and their files are sorted by name; empty classes are left out."""

    root: Path
    train: ClassFiles
    test: ClassFiles
    notes: tuple[str, ...]


def scan(root: Path) -> FolderListing:
    """List a data folder, split into training and test by its sub-folders or else by file name.

    Raises:
        DataError: there is no such folder, or no class folder with an image in it.
    """
    _check_root(root)
    walk = _Walk(root)
    for folder in (root.resolve(), *root.resolve().parents):
        walk.enter(folder)
    train_root, test_root, notes = _split_folders(root)
    for folder in filter(None, (train_root, test_root)):
        walk.enter(folder)
    found = _class_files(train_root, walk)
    _check_images(found, train_root, walk)
    if test_root is None:
        train, test = _held_out(found)
        notes.append(f"{shown(root)} has no test folder: one image in five of each class is held out")
    else:
        train, test = found, _class_files(test_root, walk)
    return FolderListing(root=root, train=train, test=test, notes=(*notes, *walk.notes()))


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

    def images(self, folder: Path, prefix: str = "") -> list[ImageFile]:
        """The image files in a folder and in its sub-folders, unsorted."""
        found: list[ImageFile] = []
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
                        found += self.images(path, f"{prefix}{entry.name}/")
                elif entry.is_file() and path.suffix.lower() in SUFFIXES:
                    found.append(ImageFile(prefix + entry.name, path))
                else:
                    self.pass_over(path)
            except OSError:  # a link that leads to itself, or a folder that may not be entered
                self.pass_over(path)
        return found

    def notes(self) -> list[str]:
        """What a person should know about the tree."""
        notes = [f"class folder '{name}' holds no image" for name in self.empty[:10]]
        if len(self.empty) > 10:
            notes.append(f"{len(self.empty) - 10} more class folders hold no image")
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
        """Count something that is not an image."""
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
        raise DataError(
            f"{shown(root)} has no class folders with training images, only {sorted(inside)}", _FIX
        )
    if train is None or not (test or only_split_names):
        return root, None, []
    used = [inside[name] for name in (train, test) if name]
    notes = [f"training images from {shown(used[0])}"]
    if test:
        notes = [f"training images from {shown(used[0])}, test images from {shown(used[1])}"]
    unused = [repr(shown(folder.name)) for folder in inside.values() if folder not in used]
    if unused:
        notes.append(f"not used in {shown(root)}: {listed(sorted(unused))}")
    return used[0], used[1] if test else None, notes


def _class_files(root: Path, walk: _Walk) -> ClassFiles:
    """Class -> its images, both sorted by name."""
    # All class folders are entered first: a link from one into another must not lend it the other's images.
    folders = []
    for folder in _folders(root):
        if walk.enter(folder):
            folders.append(folder)
        else:
            walk.pass_over(folder)
    found: dict[str, tuple[ImageFile, ...]] = {}
    for folder in folders:
        files = walk.images(folder)
        if files:
            found[folder.name] = tuple(sorted(files))
        else:
            walk.empty.append(shown(folder.relative_to(walk.root)))
    return found


def _check_images(found: ClassFiles, root: Path, walk: _Walk) -> None:
    if found:
        return
    if _folders(root):
        what = f"no class folder in {shown(root)} holds an image ({'; '.join(walk.notes())})"
        raise DataError(what, f"use {supported_formats()}")
    loose = sum(1 for entry in os.scandir(root) if Path(entry.name).suffix.lower() in SUFFIXES)
    holds = (
        f"holds {counted(loose, 'image')}, but" if loose else "has" if any(root.iterdir()) else "is empty:"
    )
    raise DataError(f"{shown(root)} {holds} no class folders", _FIX)


def _held_out(found: ClassFiles) -> tuple[ClassFiles, ClassFiles]:
    """Divide each class into training and test by file name."""
    train: dict[str, tuple[ImageFile, ...]] = {}
    test: dict[str, tuple[ImageFile, ...]] = {}
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
