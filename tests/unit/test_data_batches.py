"""Batches are the same for the same seed, full, and carry each image's own label."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from data_examples import run_spec
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab.data.arrays import ArrayDataset
from p2pcollab.data.batches import Thinning, batches, eval_batches, normalised, offered_batch
from p2pcollab.errors import DataError
from p2pcollab.run import STEM, ShardId

AUGMENTS = ["none", "shift", "crop-flip"]


def marked(count: int, *, size: int = 8, channels: int = 1) -> ArrayDataset:
    """Images of one shade each; the shade, 0..250, is the label."""
    labels = np.arange(count, dtype=np.int64) % 251
    images = np.broadcast_to(
        labels.astype(np.uint8)[:, None, None, None], (count, channels, size, size)
    ).copy()
    return ArrayDataset(images=images, labels=labels)


def noise(count: int, *, size: int = 16, channels: int = 3) -> ArrayDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return ArrayDataset(images=pixels, labels=np.arange(count, dtype=np.int64))


def shades(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation of `run_spec`."""
    return (images * 127.5 + 127.5).round()


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(2, 40),
    samples=st.integers(0, 200),
    augment=st.sampled_from(AUGMENTS),
    seed=st.integers(0, 2**63),
)
def test_batches_are_full_and_never_of_one_and_keep_labels(count, batch_size, samples, augment, seed):
    spec = run_spec(channels=1, size=8, batch_size=batch_size, augment=augment)
    size = max(2, min(batch_size, count))
    total = 0
    for images, labels in batches(marked(count), spec, seed=seed, samples=samples):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.shape == (size, 1, 8, 8)
        assert torch.equal(shades(images), labels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).float())
        total += len(labels)
    assert samples <= total < samples + size


@given(count=st.integers(1, 40), batch_size=st.integers(2, 50), passes=st.integers(1, 4))
def test_every_pass_sees_every_image_once(count, batch_size, passes):
    spec = run_spec(channels=1, size=8, batch_size=batch_size)
    stream = [
        label
        for _, labels in batches(marked(count), spec, seed=1, samples=passes * count)
        for label in labels.tolist()
    ]
    for start in range(0, passes * count, count):
        assert Counter(stream[start : start + count]) == Counter(range(count))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_the_same_seed_gives_the_same_batches_and_another_gives_others(augment):
    spec, data = run_spec(augment=augment), noise(30)
    first, second, other = ([*batches(data, spec, seed=seed, samples=60)] for seed in (7, 7, 8))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert any(not torch.equal(one[0], two[0]) for one, two in zip(first, other, strict=True))


def test_batches_do_not_depend_on_the_global_generators():
    spec, data = run_spec(augment="crop-flip"), noise(30)
    torch.manual_seed(1)
    first = [*batches(data, spec, seed=7, samples=16)]
    np.random.seed(5)
    torch.manual_seed(2)
    second = [*batches(data, spec, seed=7, samples=16)]
    assert all(torch.equal(one[0], two[0]) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize(("augment", "mirrors"), [("shift", False), ("crop-flip", True)])
def test_augmented_images_are_the_image_moved_by_at_most_an_eighth(augment, mirrors):
    """Against a plain second implementation: pad by reflection, cut out, perhaps mirror."""
    spec, data = run_spec(augment=augment, batch_size=64), noise(4)
    seen = set()
    for images, labels in batches(data, spec, seed=1, samples=256):
        for image, label in zip(shades(images).numpy().astype(np.uint8), labels.tolist(), strict=True):
            seen.add(moved(data.images[label], image))
    assert None not in seen
    assert {flipped for _, _, flipped in seen} == ({False, True} if mirrors else {False})
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == {-2, -1, 0, 1, 2}


def moved(original: np.ndarray, image: np.ndarray) -> tuple[int, int, bool] | None:
    """How `image` was made from `original`: rows, columns, mirrored; None if it was not."""
    padded = np.pad(original, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    for down in range(5):
        for right in range(5):
            window = padded[:, down : down + 16, right : right + 16]
            for flipped in (False, True):
                if np.array_equal(window[..., ::-1] if flipped else window, image):
                    return down - 2, right - 2, flipped
    return None


def test_augmentation_leaves_the_data_set_as_it_is():
    data = noise(10)
    before = data.images.copy()
    for _ in batches(data, run_spec(augment="crop-flip"), seed=1, samples=100):
        pass
    assert np.array_equal(data.images, before)


def test_augmentation_can_be_switched_off():
    data = noise(10)
    for images, labels in batches(data, run_spec(augment="crop-flip"), seed=1, samples=20, augment=False):
        assert np.array_equal(shades(images).numpy(), data.images[labels.numpy()])


def test_an_empty_data_set_is_refused_before_the_first_batch_is_asked_for():
    with pytest.raises(DataError, match="no training images"):
        batches(noise(0), run_spec(), seed=1, samples=10)


def test_evaluation_sees_everything_once_in_order_without_augmentation():
    data = noise(25)
    parts = [*eval_batches(data, run_spec(augment="crop-flip"), 10)]
    assert [len(labels) for _, labels in parts] == [10, 10, 5]
    assert torch.equal(torch.cat([labels for _, labels in parts]), torch.from_numpy(data.labels))
    assert np.array_equal(shades(torch.cat([images for images, _ in parts])).numpy(), data.images)
    assert [*eval_batches(noise(0), run_spec(), 10)] == []


def test_normalisation_uses_each_channels_mean_and_deviation():
    spec = run_spec(channels=3)
    spec = spec.model_copy(
        update={"input": spec.input.model_copy(update={"mean": (0.0, 0.5, 1.0), "std": (1.0, 0.5, 0.25)})}
    )
    pixels = np.full((1, 3, 16, 16), 255, dtype=np.uint8)
    assert normalised(pixels, spec)[0, :, 0, 0].tolist() == pytest.approx([1.0, 1.0, 0.0])


def labelled(labels: list[int]) -> ArrayDataset:
    return ArrayDataset(images=np.zeros((len(labels), 1, 8, 8), np.uint8), labels=np.array(labels, np.int64))


@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=5).filter(lambda counts: sum(counts) > 1),
    kept=st.floats(0.05, 1.0),
    repeats=st.integers(1, 4),
    batch_size=st.integers(2, 40),
    samples=st.integers(1, 300),
)
def test_thinned_batches_are_as_many_and_of_one_size(counts, kept, repeats, batch_size, samples):
    dataset = labelled([label for label, count in enumerate(counts) for _ in range(count)])
    spec = run_spec(channels=1, size=8, batch_size=batch_size, augment="none")
    thinning = Thinning(own=frozenset({0}), kept=kept, repeats=repeats)
    whole = list(batches(dataset, spec, seed=0, samples=samples))
    thinned = list(batches(dataset, spec, seed=0, samples=samples, thinning=thinning))
    assert len(thinned) == len(whole) == -(-samples // offered_batch(dataset, spec))
    sizes = {len(labels) for _, labels in thinned}
    assert len(sizes) == 1
    expected = offered_batch(dataset, spec) * thinning.trained_per_offered(dataset.labels)
    assert sizes.pop() == max(2, round(expected))


def test_thinning_keeps_all_own_examples_of_a_pass_and_other_examples_in_turn():
    dataset = marked(200)
    spec = run_spec(channels=1, size=8, batch_size=20, augment="none")
    thinning = Thinning(own=frozenset(range(40)), kept=0.25)
    assert thinning.trained_per_offered(dataset.labels) == pytest.approx((40 + 160 / 4) / 200)
    seen = Counter(
        label
        for _, labels in batches(dataset, spec, seed=1, samples=2000, thinning=thinning)
        for label in labels.tolist()
    )
    # Ten passes: each own example about ten times, each other one 2.5 times, and hardly any never.
    assert all(8 <= seen[label] <= 12 for label in range(40))
    others = [seen[label] for label in range(40, 200)]
    assert 2 <= sum(others) / len(others) <= 3
    assert sum(count == 0 for count in others) < 30


def test_own_examples_are_repeated_in_every_pass_apart_from_each_other():
    dataset = marked(200)
    spec = run_spec(channels=1, size=8, batch_size=20, augment="none")
    thinning = Thinning(own=frozenset(range(20)), kept=0.5, repeats=3)
    assert thinning.trained_per_offered(dataset.labels) == pytest.approx((3 * 20 + 180 / 2) / 200)
    parts = [labels.tolist() for _, labels in batches(dataset, spec, seed=1, samples=2000, thinning=thinning)]
    seen = Counter(label for labels in parts for label in labels)
    # Ten passes: each own example about 30 times, each other one about five.
    assert all(27 <= seen[label] <= 33 for label in range(20))
    others = [seen[label] for label in range(20, 200)]
    assert 4.5 <= sum(others) / len(others) <= 5.5
    # In the 15 places of a batch there are six own examples, mostly different ones.
    together = [len(labels) - len(set(labels)) for labels in parts]
    assert sum(together) / len(together) < 1.5


def test_the_stem_is_not_thinned():
    schedule = run_spec(channels=1, size=8, batch_size=20, augment="none").schedule
    spec = run_spec(channels=1, size=8, batch_size=20, augment="none")
    changed = schedule.model_copy(update={"negatives": 0.1, "positives": 2})
    spec = spec.model_copy(update={"schedule": changed})
    assert Thinning.of(spec, [STEM]) == Thinning(own=frozenset(), kept=1.0)
    task = ShardId(spec.tasks[0].id)
    assert Thinning.of(spec, [task]) == Thinning(own=frozenset(spec.tasks[0].classes), kept=0.1, repeats=2)
