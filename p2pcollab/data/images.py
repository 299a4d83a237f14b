"""Image files to pixels: decoded, turned upright, flattened and fitted to the run's input.

Files are taken as they come from phones, scanners and the web: EXIF orientation, palettes, transparency,
16 bits a channel, damage. Training, testing and prediction all read through `decode`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import limits
from ..errors import DataError, UsageError
from ..run import InputSpec, RunSpec
from .words import counted, listed, shown

Pixels = npt.NDArray[np.uint8]

SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
#: What Pillow may try, whatever the file is called: its EPS reader, for one, runs another program.
FORMATS: Final = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")

_THREADS_MAX: Final = 8
#: Enough per job that the pool's own cost does not count against files of 100 microseconds.
_FILES_PER_JOB: Final = 32


class UnreadableImageError(Exception):
    """One file is not a usable image. Its text is the reason, a few words; never leaves `data/`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedImages:
    """Images for prediction.

    Fields:
        images: uint8 [N, C, H, W].
        paths: the file of each image; unreadable ones are left out.
        notes: what was left out, named and counted.
    """

    images: Pixels
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def load_images(paths: Sequence[Path], spec: RunSpec) -> LoadedImages:
    """Read images for prediction; a folder stands for the images directly in it, in the order of names.

    Raises:
        DataError: a path does not exist, a folder holds no image, or nothing can be read.
        UsageError: too many images at once.
    """
    files = [file for path in paths for file in _expanded(path)]
    if not files:
        raise DataError("no image was given", "name image files, or a folder of images")
    if len(files) > limits.PREDICT_IMAGES_MAX:
        raise UsageError(
            f"{len(files)} images are more than {limits.PREDICT_IMAGES_MAX}", "predict them in several calls"
        )
    images, failures = decode_all(files, spec.input)
    if len(failures) == len(files):
        raise DataError(
            f"no image can be read: {listed(_reasons(files, failures))}", f"use {supported_formats()}"
        )
    kept = [index for index in range(len(files)) if index not in failures]
    notes = unreadable_note(_reasons(files, failures))
    return LoadedImages(
        images=images[kept] if failures else images, paths=tuple(files[index] for index in kept), notes=notes
    )


def decode_all(paths: Sequence[Path], spec: InputSpec) -> tuple[Pixels, Mapping[int, str]]:
    """Decode files in a thread pool (Pillow's decoders release the interpreter lock).

    Returns:
        Images, uint8 [N, C, H, W], with undefined rows for the failures; and index -> reason of these.
    """
    check_memory(len(paths), spec)
    images = np.empty((len(paths), spec.channels, spec.height, spec.width), dtype=np.uint8)
    failures: dict[int, str] = {}

    def job(start: int) -> None:
        for index in range(start, min(start + _FILES_PER_JOB, len(paths))):
            try:
                images[index] = decode(paths[index], spec)
            except UnreadableImageError as error:
                failures[index] = str(error)

    threads = min(_THREADS_MAX, os.cpu_count() or 1)
    with _quiet_pillow(), ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for _ in pool.map(job, range(0, len(paths), _FILES_PER_JOB)):
            pass
    return images, failures


def decode(path: Path, spec: InputSpec) -> Pixels:
    """One file as uint8 [C, H, W].

    Raises:
        UnreadableImageError: it is damaged, too large, not an image, or may not be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > limits.IMAGE_PIXELS_MAX:
                raise UnreadableImageError(f"{image.width}x{image.height} pixels are too many")
            # JPEG files are decoded at a half, a quarter or an eighth of their size where that still leaves
            # twice the pixels that are needed: five times as fast for a photograph.
            side = 2 * max(spec.width, spec.height)
            image.draft(None, (side, side))
            image.load()
            # A damaged EXIF block does not spoil the pixels.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return fit(image, spec)
    except UnreadableImageError:
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError("does not exist") from error
    except PermissionError as error:
        raise UnreadableImageError("may not be read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("too many pixels") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image, or of an unknown format") from error
    except Exception as error:  # Pillow's decoders raise anything from OSError to IndexError on damaged bytes
        raise UnreadableImageError("damaged") from error


def shorter_sides(paths: Sequence[Path]) -> list[int]:
    """The shorter side of each image in pixels, from headers alone, sorted; unreadable ones are left out."""
    sides: list[int] = []
    with _quiet_pillow():
        for path in paths:
            # As in `decode`, which names the reason.
            with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
    return sorted(sides)


def fit(image: Image.Image, spec: InputSpec) -> Pixels:
    """An image as uint8 [C, H, W]: what exceeds the input's proportions is cut off evenly on two sides."""
    flat = _flattened(image).convert("L" if spec.channels == 1 else "RGB")
    size = (spec.width, spec.height)
    if flat.size != size:
        flat = ImageOps.fit(flat, size, Image.Resampling.BICUBIC)
    pixels = np.asarray(flat, dtype=np.uint8)
    return pixels[None] if spec.channels == 1 else pixels.transpose(2, 0, 1)


def fit_array(images: Pixels, spec: InputSpec) -> Pixels:
    """Images in memory, uint8 [N, C', H', W'], fitted to the run's input, uint8 [N, C, H, W]."""
    if images.shape[1:] == (spec.channels, spec.height, spec.width):
        return np.ascontiguousarray(images)
    check_memory(len(images), spec)
    fitted = np.empty((len(images), spec.channels, spec.height, spec.width), dtype=np.uint8)
    for index, pixels in enumerate(images):
        gray = len(pixels) == 1
        fitted[index] = fit(Image.fromarray(pixels[0] if gray else pixels.transpose(1, 2, 0)), spec)
    return fitted


def check_memory(count: int, spec: InputSpec) -> None:
    """Refuse what would not fit before it is allocated.

    Raises:
        DataError: the images take more than `limits.DATASET_BYTES_MAX`.
    """
    needed = count * spec.channels * spec.height * spec.width
    if needed > limits.DATASET_BYTES_MAX:
        raise DataError(
            f"{count} images of {spec.width}x{spec.height} pixels take {needed / 2**30:.1f} GiB of memory, "
            f"more than {limits.DATASET_BYTES_MAX / 2**30:.0f} GiB",
            "use fewer with --limit, or a part of them with --share",
        )


def supported_formats() -> str:
    """The kinds of files that can be read, for people."""
    return "JPEG, PNG, WebP, BMP, GIF, TIFF or PPM files"


def unreadable_note(reasons: Sequence[str]) -> tuple[str, ...]:
    """The note about files that could not be read, if there are any."""
    if not reasons:
        return ()
    return (f"{counted(len(reasons), 'image')} cannot be read and left out: {listed(reasons)}",)


def _reasons(files: Sequence[Path], failures: Mapping[int, str]) -> list[str]:
    return [f"{shown(files[index])} ({failures[index]})" for index in sorted(failures)]


def _expanded(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{shown(path)} does not exist", "name image files, or a folder of images")
        return [path]
    files = sorted(
        file
        for file in path.iterdir()
        if not file.name.startswith(".") and file.suffix.lower() in SUFFIXES and file.is_file()
    )
    if not files:
        raise DataError(f"the folder {shown(path)} holds no image", f"use {supported_formats()}")
    return files


def _flattened(image: Image.Image) -> Image.Image:
    """8 bits a channel, without palette or transparency: what is transparent becomes white."""
    if image.mode.startswith(("I", "F")):
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # Floating-point files hold 0..1 or 0..255; whole numbers beyond 8 bits are 16-bit scans.
        top = 65535.0 if image.mode != "F" else 255.0 if pixels.max() > 1.0 else 1.0
        return Image.fromarray((pixels.clip(0.0, top) * (255.0 / top)).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Bad images are refused and named; Pillow's warnings would come on top. Not for use in a thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
