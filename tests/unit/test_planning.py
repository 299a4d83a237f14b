"""The plan of a new run: sensible choices where nothing is wished, one clear line where a wish cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.data import SourceInfo
from p2pcollab.data.batches import Thinning
from p2pcollab.data.sources import Source
from p2pcollab.errors import UsageError
from p2pcollab.models import FAMILIES
from p2pcollab.planning import PlanOptions, parse_image_size, plan_run, tasks_of
from p2pcollab.run import RunSpec, ShardId


def source(classes: int = 10, side: int = 32, per_class: int = 500) -> SourceInfo:
    """A folder of colour images."""
    return SourceInfo(
        source=Source("folder", "photos"),
        classes=tuple(f"class-{index:03d}" for index in range(classes)),
        class_counts=(per_class,) * classes,
        channels=3,
        height=side,
        width=side,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augment="crop-flip",
    )


def plan(info: SourceInfo, **wishes: object) -> RunSpec:
    return plan_run("pets", info, PlanOptions(**wishes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("side", "family"), [(8, "digits"), (12, "digits"), (28, "alexnet"), (64, "alexnet")]
)
def test_family_goes_by_the_size_of_the_images(side: int, family: str) -> None:
    assert plan(source(side=side)).model.family == family


@pytest.mark.parametrize("classes", [2, 10, 12, 13, 20])
def test_up_to_twenty_classes_each_has_a_task_of_its_own(classes: int) -> None:
    assert [task.classes for task in plan(source(classes)).tasks] == [(index,) for index in range(classes)]


@pytest.mark.parametrize("classes", [21, 37, 40, 41, 100, 257, 1000])
def test_more_classes_are_grouped_into_ten_to_twenty_tasks_of_nearly_equal_size(classes: int) -> None:
    tasks = plan(source(classes)).tasks
    sizes = {len(task.classes) for task in tasks}
    assert 10 <= len(tasks) <= 20
    assert max(sizes) - min(sizes) <= 1


def test_classes_per_task_is_obeyed() -> None:
    assert [task.classes for task in plan(source(5), classes_per_task=2).tasks] == [(0,), (1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("classes", "wishes", "positives"),
    [(10, {}, None), (20, {}, None), (21, {}, 3), (100, {}, 3), (10, {"classes_per_task": 2}, None)],
)
def test_own_examples_are_repeated_where_tasks_hold_several_of_many_classes(
    classes: int, wishes: dict[str, object], positives: int | None
) -> None:
    schedule = plan(source(classes), **wishes).schedule
    assert schedule.positives == positives
    assert schedule.branch_lr == (None if positives is None else pytest.approx(schedule.peak_lr / 2))


@pytest.mark.parametrize("family", ["alexnet", "vgg16"])
@pytest.mark.parametrize("classes", [40, 100, 250])
def test_repeating_own_examples_costs_a_device_with_one_task_nothing(family: str, classes: int) -> None:
    spec = plan(source(classes), family=family)
    labels = np.arange(classes)
    trained = Thinning.of(spec, [ShardId("t0")]).times(labels).mean()
    once = Thinning(own=frozenset(spec.tasks[0].classes), kept=FAMILIES[family].training.negatives)
    assert trained == pytest.approx(once.times(labels).mean(), abs=0.01)


def test_every_shard_sees_all_data_as_often_as_wished() -> None:
    assert plan(source(), epochs=2.5).schedule.budget_samples == 12_500
    assert plan(source(), epochs=2, expected_samples=40_000).schedule.budget_samples == 80_000
    assert plan(source()).schedule.budget_samples >= 5_000


def test_wishes_for_size_model_and_seed_are_obeyed() -> None:
    spec = plan(source(), image_size=(48, 40), family="vgg11", seed=7)
    assert (spec.input.height, spec.input.width, spec.model.family, spec.seed) == (48, 40, "vgg11", 7)


def test_a_lease_is_a_small_part_of_a_run_and_whole_batches() -> None:
    schedule = plan(source(per_class=5000), epochs=12).schedule
    assert schedule.lease_samples % schedule.batch_size == 0
    assert 12 <= schedule.budget_samples / schedule.lease_samples <= 60


def test_little_data_still_give_many_steps_with_a_learning_rate_to_match() -> None:
    few, many = plan(source(per_class=12)).schedule, plan(source(per_class=5000)).schedule
    assert few.batch_size < many.batch_size
    assert few.peak_lr / few.batch_size == pytest.approx(many.peak_lr / many.batch_size)


@given(
    classes=st.integers(2, 200),
    per_class=st.integers(1, 10_000),
    side=st.integers(4, 300),
    epochs=st.floats(0.01, 200),
)
def test_every_plan_survives_its_own_encoding(classes: int, per_class: int, side: int, epochs: float) -> None:
    spec = plan(source(classes, side, per_class), epochs=epochs)
    assert RunSpec.decode(spec.encode()) == spec
    assert 1 <= spec.schedule.lease_samples <= spec.schedule.budget_samples


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"family": "resnet"}, "no model 'resnet'"),
        ({"epochs": 0}, "0 epochs"),
        ({"epochs": -1.0}, "-1.0 epochs"),
        ({"epochs": float("nan")}, "nan epochs"),
        ({"epochs": float("inf")}, "inf epochs"),
        ({"expected_samples": 0}, "none are expected"),
        ({"classes_per_task": 0}, "0 classes per task"),
        ({"classes_per_task": 11}, "11 classes per task"),
        ({"image_size": (2, 2)}, "2x2 is out of range"),
        ({"image_size": (5000, 32)}, "5000x32"),
        ({"seed": -1}, "seed"),
        ({"epochs": 1e12}, "budget_samples"),
    ],
)
def test_a_wish_that_cannot_be_is_a_usage_error_that_names_it(wishes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(source(), **wishes)


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "\x1b[2J"])
def test_a_name_that_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        plan_run(name, source(), PlanOptions())


def test_more_tasks_than_a_run_may_have_are_refused_with_what_would_do() -> None:
    with pytest.raises(UsageError, match=f"more than {limits.TASKS_MAX}.*--classes-per-task 8"):
        plan(source(1000), classes_per_task=1)


@pytest.mark.parametrize(("text", "size"), [("64x48", (64, 48)), ("32", (32, 32)), (" 8X8 ", (8, 8))])
def test_image_size_is_height_by_width(text: str, size: tuple[int, int]) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "-1x5", "64x64x3", "99999", "six"])
def test_an_image_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="HxW"):
        parse_image_size(text)


def test_tasks_are_found_by_class_name_whatever_the_case() -> None:
    spec = plan(source(5), classes_per_task=2)
    assert tasks_of(spec, ["class-001", "CLASS-004"]) == {"t1", "t2"}
    assert tasks_of(spec, []) == frozenset()


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no class 'unicorn'.*class-000, class-001"):
        tasks_of(plan(source(2)), ["unicorn"])
