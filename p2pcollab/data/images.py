"""Image files to pixels: decoded, turned upright, flattened and fitted to the run's input.

Files are taken as they come from phones, scanners and the web: EXIF orientation, palettes, transparency,
16 bits a channel, damage. Training, testing and prediction all read through `decode`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import limits
from ..errors import DataError
from ..run import InputSpec
from .pool import for_each

Pixels = npt.NDArray[np.uint8]

SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
#: What Pillow may try, whatever the file is called: its EPS reader, for one, runs another program.
FORMATS: Final = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")


class UnreadableImageError(Exception):
    """One file is not a usable image. Its text is the reason, a few words; never leaves `data/`."""


def decode_all(paths: Sequence[Path], spec: InputSpec) -> tuple[Pixels, Mapping[int, str]]:
    """Decode files in a thread pool (Pillow's decoders release the interpreter lock).

    Returns:
        Images, uint8 [N, C, H, W], with undefined rows for the failures; and index -> reason of these.
    """
    check_memory(len(paths), spec)
    images = np.empty((len(paths), spec.channels, spec.height, spec.width), dtype=np.uint8)
    failures: dict[int, str] = {}

    def work(index: int) -> None:
        try:
            images[index] = decode(paths[index], spec)
        except UnreadableImageError as error:
            failures[index] = str(error)

    with _quiet_pillow():
        for_each(len(paths), work)
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
        DataError: the examples take more than `limits.DATASET_BYTES_MAX`.
    """
    needed = count * spec.channels * spec.height * spec.width
    if needed > limits.DATASET_BYTES_MAX:
        raise DataError(
            f"{count} {spec.noun}s of {spec.width}x{spec.height} pixels take {needed / 2**30:.1f} GiB of "
            f"memory, more than {limits.DATASET_BYTES_MAX / 2**30:.0f} GiB",
            "use fewer with --limit, or a part of them with --share",
        )


def supported_formats() -> str:
    """The kinds of files that can be read, for people."""
    return "JPEG, PNG, WebP, BMP, GIF, TIFF or PPM files"


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
