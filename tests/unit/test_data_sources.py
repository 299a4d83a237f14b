"""What people have on disk becomes the run's data, and what cannot be used is said."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_examples import numbers, run_spec, write_classes, write_image
from PIL import Image

from p2pcollab.data import sources
from p2pcollab.data.known import DIGITS, TORCHVISION
from p2pcollab.data.partition import Share
from p2pcollab.data.sources import Source, default_input, inspect, load, parse_source
from p2pcollab.errors import DataError

DIGITS_RUN = run_spec(DIGITS.classes, channels=1, size=8)


# Naming a source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("digits", Source("digits", "digits")),
        ("./digits", Source("folder", "digits")),
        ("torchvision:cifar10", Source("torchvision", "cifar10")),
        ("torchvision:Fashion-MNIST", Source("torchvision", "fashionmnist")),
        ("/a/b c", Source("folder", "/a/b c")),
        ("cifar10", Source("folder", "cifar10")),
    ],
)
def test_a_source_is_read(text, source):
    assert parse_source(text) == source
    assert source.describe()


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(parse_source("~/photos")) == "/home/someone/photos"


@pytest.mark.parametrize("text", ["torchvision:imagenet", "torchvision:", " "])
def test_an_unknown_set_is_refused_with_the_known_ones(text):
    with pytest.raises(DataError) as caught:
        parse_source(text)
    assert all(name in caught.value.fix for name in (*TORCHVISION, "digits"))


# Class folders


def test_class_folders_are_loaded_with_one_image_in_five_held_out(tmp_path):
    data = load(str(write_classes(tmp_path, cat=20, dog=10)), run_spec())
    assert data.train.counts(2) == (16, 8)
    assert data.test.counts(2) == (4, 2)
    assert numbers(np.concatenate([data.train.images, data.test.images])) == sorted([*range(20), *range(10)])
    assert any("one image in five of each class is held out" in note for note in data.notes)


def test_the_split_is_the_same_on_another_device_and_in_another_run(tmp_path):
    first = load(str(write_classes(tmp_path / "a", cat=20, dog=20)), run_spec())
    other_run = run_spec(("dog", "cat")).model_copy(update={"seed": 9})
    second = load(str(write_classes(tmp_path / "b", cat=20, dog=20)), other_run)
    assert numbers(first.test.images) == numbers(second.test.images)


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val"), ("training", "validation")])
def test_train_and_test_folders_are_used_as_they_are(tmp_path, names):
    write_classes(tmp_path / names[0], cat=7, dog=5)
    write_classes(tmp_path / names[1], cat=2, dog=3)
    data = load(str(tmp_path), run_spec())
    assert data.train.counts(2) == (7, 5)
    assert data.test.counts(2) == (2, 3)
    assert names[0] in data.notes[0]
    assert names[1] in data.notes[0]


def test_the_test_folder_goes_before_the_validation_folder_which_is_said(tmp_path):
    for name, count in (("train", 5), ("val", 2), ("test", 3)):
        write_classes(tmp_path / name, cat=count, dog=count)
    data = load(str(tmp_path), run_spec())
    assert len(data.test) == 6
    assert any("not used" in note and "'val'" in note for note in data.notes)


def test_a_lone_train_folder_is_divided(tmp_path):
    write_classes(tmp_path / "train", cat=10, dog=10)
    data = load(str(tmp_path), run_spec())
    assert (len(data.train), len(data.test)) == (16, 4)


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, train=5, bus=5)
    assert inspect(str(tmp_path)).classes == ("bus", "train")


def test_a_class_that_the_run_does_not_know_is_skipped_named_and_counted(tmp_path):
    data = load(str(write_classes(tmp_path, cat=5, dog=5, fox=12)), run_spec())
    assert len(data.train) + len(data.test) == 10
    assert "class 'fox' is not in this run: 12 images skipped" in data.notes


def test_many_unknown_classes_take_one_line(tmp_path):
    write_classes(tmp_path, cat=1, dog=1, **{f"x{number}": 2 for number in range(9)})
    notes = [note for note in load(str(tmp_path), run_spec()).notes if "not in this run" in note]
    assert notes == ["9 classes are not in this run ('x0', 'x1', 'x2' and 6 more): 18 images skipped"]


def test_only_unknown_classes_are_refused_with_both_sides_names(tmp_path):
    with pytest.raises(DataError, match="'fox'") as caught:
        load(str(write_classes(tmp_path, fox=3)), run_spec())
    assert "'cat'" in caught.value.fix


def test_class_names_match_whatever_the_case_and_unicode_form_and_that_is_said(tmp_path):
    decomposed = {"cafe\u0301": 4}
    write_classes(tmp_path, Cat=3, **decomposed)
    data = load(str(tmp_path), run_spec(("cat", "caf\u00e9")))
    assert data.train.counts(2) == (2, 3)
    assert any("'Cat' is taken for the run's class 'cat'" in note for note in data.notes)


def test_exact_names_go_before_similar_ones(tmp_path):
    write_classes(tmp_path, Cat=3, cat=6)
    data = load(str(tmp_path), run_spec(("cat", "Cat")))
    assert data.train.counts(2) == (5, 2)
    write_classes(tmp_path / "other", CAT=3, cat=3)
    other = load(str(tmp_path / "other"), run_spec(("cat", "Cat")))
    assert "class 'CAT' is not in this run: 3 images skipped" in other.notes


def test_a_device_may_hold_few_classes_and_few_images(tmp_path):
    data = load(str(write_classes(tmp_path, cat=1)), run_spec(("cat", "dog", "fox")))
    assert data.train.counts(3) == (1, 0, 0)
    assert len(data.test) == 0
    assert "no training image of 2 of the run's 3 classes: 'dog', 'fox'" in data.notes
    assert "no test image on this device" in data.notes


def test_litter_is_ignored_and_odd_files_are_counted(tmp_path):
    write_classes(tmp_path, cat=5, dog=5)
    for name in (".DS_Store", "Thumbs.db", "._000.png"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    assert not any("other entr" in note for note in load(str(tmp_path), run_spec()).notes)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "dog" / "IMG_1.HEIC").write_bytes(b"x")
    notes = load(str(tmp_path), run_spec()).notes
    assert any(note.startswith("2 other entries ignored: cat/notes.txt, dog/IMG_1.HEIC") for note in notes)
    assert any("convert them to JPEG" in note for note in notes)


def test_sub_folders_of_a_class_belong_to_it(tmp_path):
    write_classes(tmp_path, cat=2, dog=2)
    write_classes(tmp_path / "cat", summer=2, winter=1)
    data = load(str(tmp_path), run_spec())
    assert len(data.train) + len(data.test) == 7


def test_links_that_lead_round_in_circles_or_into_other_classes_are_harmless(tmp_path):
    root = write_classes(tmp_path / "photos", cat=3, dog=3)
    write_image(tmp_path / "outside.png")
    (root / "cat" / "up").symlink_to(root, target_is_directory=True)
    (root / "cat" / "above").symlink_to(tmp_path, target_is_directory=True)
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    (root / "cat" / "neighbour").symlink_to(root / "dog", target_is_directory=True)
    (root / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    data = load(str(root), run_spec())
    assert data.train.counts(2) == (2, 2)
    assert data.test.counts(2) == (1, 1)


def test_a_class_folder_may_be_a_link(tmp_path):
    write_classes(tmp_path / "elsewhere", cat=5)
    write_classes(tmp_path / "photos", dog=5)
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere" / "cat", target_is_directory=True)
    assert inspect(str(tmp_path / "photos")).classes == ("cat", "dog")


def test_unreadable_images_are_skipped_named_and_counted(tmp_path):
    write_classes(tmp_path, cat=10, dog=10)
    for number in (3, 4):
        (tmp_path / "cat" / f"{number:03}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    data = load(str(tmp_path), run_spec())
    assert 3 not in numbers(data.train.images[data.train.labels == 0])
    assert len(data.train) + len(data.test) == 18
    (note,) = (note for note in data.notes if "cannot be read" in note)
    assert note.startswith("2 images cannot be read")
    assert f"cat{os.sep}003.png" in note


def test_labels_stay_with_their_images_when_some_are_unreadable(tmp_path):
    write_classes(tmp_path, cat=40)
    for number in range(50):
        write_image(tmp_path / "dog" / f"{number}.png", shade=200)
    for number in range(0, 40, 3):
        (tmp_path / "cat" / f"{number:03}.png").write_bytes(b"broken")
    data = load(str(tmp_path), run_spec())
    for part in (data.train, data.test):
        assert np.array_equal(part.labels == 1, part.images[:, 0, 0, 0] == 200)


def test_a_class_without_a_readable_image_is_named(tmp_path):
    write_classes(tmp_path, cat=5)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.jpg").write_bytes(b"broken")
    assert "no image at all can be read of 'dog'" in load(str(tmp_path), run_spec()).notes


def test_an_empty_class_folder_is_said(tmp_path):
    write_classes(tmp_path, cat=5, dog=0)
    assert "class folder 'dog' holds no image" in load(str(tmp_path), run_spec()).notes


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: None, "there is no folder"),
        (lambda root: root.write_bytes(b"x"), "is a file, not a folder"),
        (lambda root: root.mkdir(), "is empty"),
        (lambda root: write_image(root / "a.png"), "holds 1 image, but no class folders"),
        (lambda root: write_classes(root, cat=0, dog=0), "no class folder in .* holds an image"),
        (lambda root: write_classes(root, train=3, test=3), "no class folders with training data"),
        (lambda root: write_classes(root / "test", cat=3, dog=3), "no class folders with training data"),
        (
            lambda root: write_classes(root / "train", cat=0) and write_classes(root / "test", cat=3),
            "no class folder",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_what_to_do(tmp_path, make, reason):
    root = tmp_path / "photos"
    make(root)
    for use in (lambda: load(str(root), run_spec()), lambda: inspect(str(root))):
        with pytest.raises(DataError, match=reason) as caught:
            use()
        assert caught.value.fix


def test_a_folder_without_one_readable_image_is_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"broken")
    for use in (lambda: load(str(tmp_path), run_spec()), lambda: inspect(str(tmp_path))):
        with pytest.raises(DataError, match="can be read"):
            use()


def test_an_archive_is_refused_with_the_advice_to_unpack_it(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "photos.zip"), run_spec())
    assert "unpack" in caught.value.fix


def test_a_set_named_without_its_prefix_is_explained():
    with pytest.raises(DataError) as caught:
        load("cifar10", run_spec())
    assert "torchvision:cifar10" in caught.value.fix


def test_control_characters_in_file_names_do_not_reach_the_terminal(tmp_path):
    write_classes(tmp_path, cat=3, dog=3, **{"\x1b[31mred": 1})
    (tmp_path / "cat" / "\x1b]0;title\x07.txt").write_text("x")
    (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"broken")
    assert all(note.isprintable() for note in load(str(tmp_path), run_spec()).notes)


# Shares and limits


def test_shares_are_disjoint_cover_the_training_images_and_leave_the_test_whole(tmp_path):
    write_classes(tmp_path, cat=20, dog=30)
    whole = load(str(tmp_path), run_spec())
    parts = [load(str(tmp_path), run_spec(), share=Share(index, 3)) for index in (1, 2, 3)]
    assert numbers(np.concatenate([part.train.images for part in parts])) == numbers(whole.train.images)
    assert all(numbers(part.test.images) == numbers(whole.test.images) for part in parts)
    assert any(note.startswith("share 1/3: ") for note in parts[0].notes)


def test_a_limit_is_applied_before_the_share(tmp_path):
    write_classes(tmp_path, cat=50, dog=50)
    data = load(str(tmp_path), run_spec(), share=Share(1, 2), limit=20)
    assert data.train.counts(2) == (5, 5)
    assert len(data.test) == 20
    assert "limited to 20 of 80 training images" in data.notes


def test_an_empty_share_is_refused(tmp_path):
    write_classes(tmp_path, cat=1, dog=1)
    with pytest.raises(DataError, match="share 5/5 of 2 training images is empty"):
        load(str(tmp_path), run_spec(), share=Share(5, 5))


# Making a run from a source


def test_a_folder_of_photographs_suggests_natural_colour_images(tmp_path):
    write_classes(tmp_path, dog=5, cat=10)
    for number in range(20):
        write_image(tmp_path / "cat" / f"large{number}.jpg", size=(200, 150))
    info = inspect(str(tmp_path))
    assert info.classes == ("cat", "dog")
    assert info.class_counts == (24, 4)
    assert info.train_images == 28
    assert (info.channels, info.height, info.width, info.augment) == (3, 64, 64, "crop-flip")


def test_a_folder_of_tiny_grey_images_saved_in_colour_suggests_one_channel(tmp_path):
    for name, shade in (("one", 51), ("two", 153)):
        for number in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (28, 28), (shade,) * 3).save(tmp_path / name / f"{number}.png")
    info = inspect(str(tmp_path))
    assert (info.channels, info.height, info.width, info.augment) == (1, 32, 32, "shift")
    spec = default_input(info)
    assert spec.mean == pytest.approx((0.4,), abs=0.01)
    assert spec.std == pytest.approx((0.2,), abs=0.01)


def test_images_of_one_shade_suggest_an_input_that_is_valid(tmp_path):
    for name in ("one", "two"):
        write_image(tmp_path / name / "a.png", shade=100)
    assert min(default_input(inspect(str(tmp_path))).std) >= 0.05


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        ({"cat": 3}, "one class only"),
        ({"cat": 3, "x" * 65: 3}, "cannot name a class"),
        ({"cat": 3, "a\nb": 3}, "cannot name"),
    ],
)
def test_no_run_is_made_from_classes_that_a_run_cannot_have(tmp_path, folders, reason):
    with pytest.raises(DataError, match=reason):
        inspect(str(write_classes(tmp_path, **folders)))


@pytest.mark.parametrize(
    "text", ["digits", "torchvision:cifar10", "torchvision:cifar100", "torchvision:fashionmnist"]
)
def test_a_public_set_makes_a_valid_run(text):
    info = inspect(text, download=True)
    assert len(set(info.classes)) == len(info.classes) == len(info.class_counts)
    spec = run_spec(info.classes).model_copy(update={"input": default_input(info)})
    assert type(spec).decode(spec.encode()) == spec


# The digits


def test_the_digits_load_completely_without_importing_scikit_learn_or_torch():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from p2pcollab.data.sources import load; "
        "from data_examples import run_spec; "
        "data = load('digits', run_spec(tuple('0123456789'), channels=1, size=8)); "
        "print(len(data.train), len(data.test), data.train.images.max(), "
        "[name for name in ('sklearn', 'torch', 'torchvision') if name in sys.modules])"
    )
    folder = str(Path(__file__).parent)
    out = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1438", "359", "255", "[]"]


def test_what_is_known_about_the_digits_is_what_is_in_the_file():
    data = load("digits", DIGITS_RUN)
    assert data.train.counts(10) == inspect("digits").class_counts
    pixels = np.concatenate([data.train.images, data.test.images]) / 255.0
    assert DIGITS.input.mean == pytest.approx((pixels.mean(),), abs=1e-3)
    assert DIGITS.input.std == pytest.approx((pixels.std(),), abs=1e-3)
    assert data.notes == ()


def test_a_run_may_have_some_of_a_sets_classes_in_another_order_and_shape():
    data = load("digits", run_spec(("7", "3"), channels=3, size=16))
    assert data.train.images.shape == (143 + 146, 3, 16, 16)
    assert data.train.counts(2) == (143, 146)
    assert any(note.startswith("8 classes are not in this run") for note in data.notes)


# torchvision's sets


def test_a_set_that_is_not_there_is_refused_without_importing_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for use in (
        lambda: load("torchvision:cifar10", run_spec(TORCHVISION["cifar10"].classes), tmp_path),
        lambda: inspect("torchvision:cifar10", tmp_path),
    ):
        with pytest.raises(DataError, match="CIFAR10 is not in") as caught:
            use()
        assert "--download" in caught.value.fix
        assert "--data-root" in caught.value.fix


def test_a_torchvision_that_does_not_fit_torch_is_explained(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="torchvision cannot be imported"):
        load("torchvision:cifar10", run_spec(TORCHVISION["cifar10"].classes), tmp_path)


def test_a_forged_set_is_refused_and_never_unpickled(tmp_path):
    """Its files are pickles: torchvision opens them only if their MD5 sums are the published ones."""
    pytest.importorskip("torchvision", exc_type=Exception)
    proof = tmp_path / "executed"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(_Touch(str(proof))))
    with pytest.raises(DataError, match="no intact cifar-10-batches-py"):
        load("torchvision:cifar10", run_spec(TORCHVISION["cifar10"].classes), tmp_path)
    assert not proof.exists()


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path(self.path).touch, ()


def test_a_failed_download_is_explained(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", exc_type=Exception)

    def unreachable(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", unreachable)
    with pytest.raises(DataError, match=r"cannot be fetched to .*no route to host"):
        load("torchvision:cifar10", run_spec(TORCHVISION["cifar10"].classes), tmp_path, download=True)


def test_fashionmnist_is_read_from_torchvisions_files(tmp_path):
    pytest.importorskip("torchvision", exc_type=Exception)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.broadcast_to(labels[:, None, None], (count, 28, 28)).astype(np.uint8)
        header = b"\x00\x00\x08\x03" + b"".join(size.to_bytes(4, "big") for size in images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + labels.tobytes()
        )
    spec = run_spec(TORCHVISION["fashionmnist"].classes, channels=1, size=28)
    data = load("torchvision:fashionmnist", spec, tmp_path)
    assert (len(data.train), len(data.test)) == (20, 10)
    assert np.array_equal(data.train.images[:, 0, 0, 0], data.train.labels)


def test_cifar10_is_what_is_known_about_it():
    root = os.environ.get("P2PCOLLAB_DATA_ROOT")
    if not root or not (Path(root) / "cifar-10-batches-py").is_dir():
        pytest.skip("set P2PCOLLAB_DATA_ROOT to a folder with cifar-10-batches-py to check it")
    known = TORCHVISION["cifar10"]
    data = load("torchvision:cifar10", run_spec(known.classes, size=32), Path(root), limit=10_000)
    assert data.train.counts(10) == data.test.counts(10) == (1000,) * 10
    pixels = data.train.images / 255.0
    assert pixels.mean(axis=(0, 2, 3)) == pytest.approx(known.input.mean, abs=0.01)
    assert pixels.std(axis=(0, 2, 3)) == pytest.approx(known.input.std, abs=0.01)


def test_a_share_is_of_the_whole_and_seeded_by_the_run_unless_said_otherwise():
    one = load("digits", DIGITS_RUN, share=Share(1, 2))
    same = load("digits", DIGITS_RUN, share=Share(1, 2), seed=DIGITS_RUN.seed)
    other = load("digits", DIGITS_RUN, share=Share(1, 2), seed=DIGITS_RUN.seed + 1)
    assert np.array_equal(one.train.images, same.train.images)
    assert not np.array_equal(one.train.images, other.train.images)


def test_sets_are_kept_in_the_users_data_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert sources.default_root() == tmp_path / "p2pcollab" / "datasets"
