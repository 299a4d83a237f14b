"""Image files of every kind become pixels of the run's input, and bad ones are named."""

from __future__ import annotations

import contextlib
import struct
import threading
import zlib

import numpy as np
import pytest
from data_examples import numbers, run_spec, write_classes, write_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from p2pcollab import limits
from p2pcollab.data.examples import load_images
from p2pcollab.data.images import UnreadableImageError, decode, fit_array
from p2pcollab.errors import DataError, UsageError

GRAY = run_spec(channels=1, size=16).input
COLOUR = run_spec(channels=3, size=16).input


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def test_an_image_of_the_runs_size_is_read_pixel_by_pixel(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    read = decode(saved(tmp_path / "a.png", pixels), COLOUR)
    assert read.dtype == np.uint8
    assert np.array_equal(read, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "gif", "tiff", "ppm"])
def test_every_supported_format_is_read(tmp_path, suffix):
    path = write_image(tmp_path / f"a.{suffix}", shade=200, size=(40, 30))
    assert np.abs(decode(path, COLOUR).mean(axis=(1, 2)) - (200, 100, 55)).max() < 8


def test_grey_and_colour_images_are_read_as_the_run_wants_them(tmp_path):
    gray = write_image(tmp_path / "gray.png", shade=90, mode="L")
    colour = saved(tmp_path / "colour.png", np.full((16, 16, 3), (255, 0, 0), dtype=np.uint8))
    assert (decode(gray, COLOUR) == 90).all()
    assert decode(gray, COLOUR).shape == (3, 16, 16)
    assert (decode(colour, GRAY) == 76).all()
    assert decode(colour, GRAY).shape == (1, 16, 16)


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path):
    lying = np.zeros((16, 16, 3), dtype=np.uint8)
    lying[:, :8] = 255  # left half white; turned clockwise, the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode(saved(tmp_path / "a.png", lying, exif=exif), COLOUR)
    assert (upright[:, :8] == 255).all()
    assert (upright[:, 8:] == 0).all()


@pytest.mark.filterwarnings("error")
def test_a_damaged_orientation_spoils_neither_the_image_nor_the_terminal(tmp_path):
    pixels = np.full((16, 16, 3), 80, dtype=np.uint8)
    path = saved(tmp_path / "a.jpg", pixels, exif=b"Exif\x00\x00MM\x00*garbage")
    loaded = load_images([path], run_spec())
    assert abs(int(loaded.images.mean()) - 80) < 3


def test_sixteen_bits_become_eight(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    read = decode(saved(tmp_path / "a.png", ramp), GRAY)[0]
    assert np.abs(read[0].astype(int) - np.linspace(0, 255, 16)).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floating_point_images_of_either_range_are_read(tmp_path, top):
    ramp = np.tile(np.linspace(0, top, 16).astype(np.float32), (16, 1))
    read = decode(saved(tmp_path / "a.tiff", ramp), GRAY)[0]
    assert np.abs(read[0].astype(int) - np.linspace(0, 255, 16)).max() <= 1


def test_what_is_transparent_becomes_white_whatever_colour_hides_there(tmp_path):
    hidden = np.zeros((16, 16, 4), dtype=np.uint8)
    hidden[8:, :, 3] = 255
    read = decode(saved(tmp_path / "a.png", hidden), COLOUR)
    assert (read[:, :8] == 255).all()
    assert (read[:, 8:] == 0).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=0)
    assert (decode(tmp_path / "p.png", GRAY) == 255).all()


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "LA", "YCbCr"])
def test_unusual_modes_are_read(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (20, 20), "white").convert(mode).save(path)
    assert (decode(path, COLOUR) > 250).all()


def test_a_wide_image_keeps_its_proportions_and_loses_its_sides(tmp_path):
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 255
    assert (decode(saved(tmp_path / "a.png", wide), COLOUR) == 255).all()


def test_a_large_photograph_is_reduced_without_aliasing(tmp_path):
    stripes = np.zeros((512, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    read = decode(saved(tmp_path / "a.png", stripes), COLOUR)
    assert 120 < read.min() <= read.max() < 136


def png_header(width: int, height: int) -> bytes:
    """A PNG file that declares its size and then ends."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    assert side**2 > limits.IMAGE_PIXELS_MAX
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(side, side) + b"\x00\x00\x00\x00IDAT")
    good = write_image(tmp_path / "good.png")
    loaded = load_images([bomb, good], run_spec())
    assert loaded.paths == (good,)
    assert "bomb.png" in loaded.notes[0]
    assert "pixels" in loaded.notes[0]


def test_a_file_of_another_kind_is_refused_whatever_it_is_called(tmp_path):
    """Pillow reads PostScript by running another program on it."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")
    with pytest.raises(UnreadableImageError, match="not an image"):
        decode(path, COLOUR)


def test_a_truncated_image_is_refused(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.webp"):
        path = saved(tmp_path / name, pixels)
        path.write_bytes(path.read_bytes()[:-1500])
        with pytest.raises(UnreadableImageError, match=r"damaged|not an image"):
            decode(path, COLOUR)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\x00", b"BM"]),
)
def test_any_bytes_are_an_image_or_unreadable(tmp_path_factory, data, magic):
    path = tmp_path_factory.getbasetemp() / f"any-{threading.get_ident()}"
    path.write_bytes(magic + data)
    with contextlib.suppress(UnreadableImageError):
        assert decode(path, COLOUR).shape == (3, 16, 16)


def test_a_folder_stands_for_its_images_in_the_order_of_names(tmp_path):
    write_classes(tmp_path, cat=3)
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    single = write_image(tmp_path / "single.png", shade=50)
    loaded = load_images([single, tmp_path / "cat"], run_spec())
    assert [path.name for path in loaded.paths] == ["single.png", "000.png", "001.png", "002.png"]
    assert loaded.images[:, 0, 0, 0].tolist() == [50, 0, 1, 2]
    assert loaded.notes == ()


def test_unreadable_images_are_named_and_the_others_keep_their_paths(tmp_path):
    paths = []
    for number in range(100):
        path = tmp_path / f"{number:03}.png"
        if number % 10 == 0:
            path.write_bytes(b"broken")
        else:
            write_image(path, shade=number)
        paths.append(path)
    loaded = load_images(paths, run_spec())
    assert [int(path.stem) for path in loaded.paths] == loaded.images[:, 0, 0, 0].tolist()
    assert numbers(loaded.images) == [number for number in range(100) if number % 10]
    assert loaded.notes[0].startswith("10 images cannot be read and left out: ")
    assert "000.png" in loaded.notes[0]
    assert loaded.notes[0].endswith("and 7 more")


@pytest.mark.parametrize("name", ["missing.png", "empty", "broken.png"])
def test_nothing_to_predict_is_refused_with_the_reason(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(DataError, match=name) as caught:
        load_images([tmp_path / name], run_spec())
    assert caught.value.fix
    with pytest.raises(DataError):
        load_images([], run_spec())


def test_too_many_images_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PREDICT_IMAGES_MAX", 2)
    write_classes(tmp_path, cat=3)
    with pytest.raises(UsageError, match="3 images are more than 2"):
        load_images([tmp_path / "cat"], run_spec())


def test_more_images_than_memory_may_hold_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "DATASET_BYTES_MAX", 1000)
    write_classes(tmp_path, cat=3)
    with pytest.raises(DataError, match="memory"):
        load_images([tmp_path / "cat"], run_spec())


def test_arrays_of_another_shape_are_fitted_and_others_left_alone():
    images = np.random.default_rng(1).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    assert fit_array(images, COLOUR).shape == (4, 3, 16, 16)
    assert np.array_equal(fit_array(images, run_spec(channels=1, size=8).input), images)
