"""From data and a person's wishes to the spec of a new run: every choice that `new` makes, in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from .data import SourceInfo, default_input
from .errors import UsageError
from .grouping import Groups, sized, tasks
from .models import FAMILIES, Family
from .run import InputSpec, RunSpec, Schedule, ShardId, TaskSpec

#: Up to this side, images are digits or icons, and a large network has nothing to pool.
_SMALL_SIDE_MAX: Final = 12
#: With one class per task up to here, and as few classes per task as keep to it above, a run has enough tasks
#: for a household of devices, and a branch has enough positives per batch.
_TASKS_WANTED_MAX: Final = 20
#: How often a branch trains on its own examples in a pass where tasks hold several classes. Without, a batch
#: has three or four of them, and what tells the task's classes from each other is learnt from no others
#: (docs/results/method.md).
_POSITIVES: Final = 3
#: A task with a greater part of all classes has own examples enough.
_TASK_SHARE_MAX: Final = 0.1
#: Learning rate of such branches, in units of the stem's.
_BRANCH_RATE: Final = 0.5
#: Leases of one shard over a run. More visit everybody's data more evenly; fewer publish less and start the
#: momentum afresh less often.
_LEASES_PER_SHARD: Final = 24
#: A lease shorter than this is mostly fresh momentum; one longer loses too much when a slow device is killed.
_LEASE_BATCHES_MIN: Final = 20
_LEASE_BATCHES_MAX: Final = 200
#: Steps that one pass over all the data must at least give, so that little data still makes many updates.
_STEPS_PER_EPOCH_MIN: Final = 12
_BATCH_MIN: Final = 8
_IMAGE_SIZE: Final = re.compile(r"([0-9]{1,4})(?:[xX]([0-9]{1,4}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a person may wish for; None leaves the choice to the plan."""

    #: Network family; None goes by the data: clips or images, and the images' size.
    family: str | None = None
    #: How often each shard sees all the data.
    epochs: float | None = None
    #: Training samples of all devices together; None: as many as this source has.
    expected_samples: int | None = None
    #: Height and width of images.
    image_size: tuple[int, int] | None = None
    classes_per_task: int | None = None
    #: Classes that are trained as a unit; None: consecutive ones.
    groups: Groups | None = None
    #: Branches that score each class, each initialised and grouped in its own way.
    branches_per_class: int = 1
    seed: int = 0


def plan_run(name: str, info: SourceInfo, options: PlanOptions) -> RunSpec:
    """The spec of a new run.

    Raises:
        UsageError: a wish that cannot be, or that does not fit the data.
    """
    images = _input(info, options.image_size)
    family_name = options.family or _suitable_family(images)
    family = _family(family_name)
    expected = options.expected_samples if options.expected_samples is not None else info.train_images
    tasks_planned = _tasks(len(info.classes), options)
    try:
        return RunSpec(
            name=name,
            classes=info.classes,
            tasks=tasks_planned,
            model=family.model,
            input=images,
            schedule=_schedule(family, options.epochs, expected, _examples(family, info, tasks_planned)),
            seed=options.seed,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"]) or "it"
        raise UsageError(f"no run can be made of this: {where}: {first['msg']}") from error


def parse_image_size(text: str) -> tuple[int, int]:
    """Read `HxW`, or one number for a square; height and width.

    Raises:
        UsageError: it is neither.
    """
    match = _IMAGE_SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"the image size {text!r} is not HxW", "write for example 64x64")
    height = int(match[1])
    return height, int(match[2] or height)


def tasks_of(spec: RunSpec, names: Sequence[str]) -> frozenset[ShardId]:
    """The tasks that train any of some classes, by the classes' names; case counts only where it must.

    Raises:
        UsageError: the run has no class of that name; it names those that it has.
    """
    folded = {name.casefold(): index for index, name in reversed(list(enumerate(spec.classes)))}
    exact = {name: index for index, name in enumerate(spec.classes)}
    wanted: set[int] = set()
    for name in names:
        index = exact.get(name, folded.get(name.casefold()))
        if index is None:
            raise UsageError(f"the run has no class {name!r}", f"its classes are {_listed(spec.classes)}")
        wanted.add(index)
    return frozenset(ShardId(task.id) for task in spec.tasks if wanted.intersection(task.classes))


def _input(info: SourceInfo, size: tuple[int, int] | None) -> InputSpec:
    default = default_input(info)
    if size is None:
        return default
    if default.audio is not None:
        raise UsageError("--image-size is for images, and these are audio clips", "leave it out")
    height, width = size
    if not (4 <= height <= 1024 and 4 <= width <= 1024):
        raise UsageError(f"an image size of {height}x{width} is out of range", "use sides from 4 to 1024")
    return default.model_copy(update={"height": height, "width": width})


def _suitable_family(images: InputSpec) -> str:
    if images.audio is not None:
        return "kws"
    return "digits" if max(images.height, images.width) <= _SMALL_SIDE_MAX else "alexnet"


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise UsageError(f"there is no model {name!r}", f"choose one of {', '.join(FAMILIES)} or auto")
    return FAMILIES[name]


def _tasks(classes: int, options: PlanOptions) -> tuple[TaskSpec, ...]:
    if options.groups is not None and options.classes_per_task is not None:
        raise UsageError("groups and classes per task were both given", "give one of the two")
    size = options.classes_per_task
    if size is None:
        size = math.ceil(classes / _TASKS_WANTED_MAX)
    groups = options.groups or sized(classes, size)
    return tasks(groups, options.branches_per_class)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Examples:
    """On which part of the other classes' examples a branch trains, and how often on its own."""

    negatives: float
    positives: int | None
    #: The branch's learning rate in units of the stem's; None: the same.
    rate: float | None


def _examples(family: Family, info: SourceInfo, planned: tuple[TaskSpec, ...]) -> _Examples:
    """The family's. Where own examples are repeated, others make room: for one task it costs no more."""
    negatives = family.training.negatives
    share = sum(len(task.classes) for task in planned) / len(planned) / len(info.classes)
    if all(len(task.classes) == 1 for task in planned) or share > _TASK_SHARE_MAX:
        return _Examples(negatives=negatives, positives=None, rate=None)
    room = (_POSITIVES - 1) * share / (1 - share)
    negatives = round(max(negatives - room, negatives / 2), 2)
    return _Examples(negatives=negatives, positives=_POSITIVES, rate=_BRANCH_RATE)


def _schedule(family: Family, epochs: float | None, expected: int, examples: _Examples) -> Schedule:
    hints = family.training
    times = epochs if epochs is not None else hints.epochs
    if not (math.isfinite(times) and times > 0):
        raise UsageError(f"{times} epochs cannot be trained", "give a number greater than 0")
    if expected < 1:
        raise UsageError(
            "a run needs training samples, and none are expected", "say how many: --expect-samples"
        )
    budget = max(1, round(times * expected))
    batch = _batch_size(hints.batch_size, expected)
    batches = round(budget / batch / _LEASES_PER_SHARD)
    # Linear scaling: half the batch, twice the steps, half the length of each.
    peak_lr = hints.peak_lr * batch / hints.batch_size
    return Schedule(
        budget_samples=budget,
        lease_samples=min(budget, batch * min(_LEASE_BATCHES_MAX, max(_LEASE_BATCHES_MIN, batches))),
        batch_size=batch,
        peak_lr=peak_lr,
        branch_lr=None if examples.rate is None else examples.rate * peak_lr,
        weight_decay=hints.weight_decay,
        stem_seal_fraction=hints.seal,
        negatives=examples.negatives,
        positives=examples.positives,
    )


def _batch_size(wanted: int, expected: int) -> int:
    """The family's batch, halved while one pass over the data gives too few steps."""
    while wanted > _BATCH_MIN and expected / wanted < _STEPS_PER_EPOCH_MIN:
        wanted //= 2
    return wanted


def _listed(names: Sequence[str], shown_max: int = 20) -> str:
    rest = f" and {len(names) - shown_max} more" if len(names) > shown_max else ""
    return ", ".join(names[:shown_max]) + rest
