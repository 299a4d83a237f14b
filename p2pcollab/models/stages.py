"""The network families as tables, and the plans that a run spec makes of them.

A family is a row of convolution stages (3x3 convolution, batch normalisation, ReLU, perhaps a 2x2 max-
pool), one hidden fully connected layer and a head. The stem is the first `stem_stages` of them; a branch
is the rest at `branch_width`, perhaps behind a 1x1 convolution (`branch_squeeze`); the dense network, the
baseline, is all of them at full width. Building and counting work from the same `Plan`, so a cost cannot
drift from what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..errors import UsageError
from ..run import ModelSpec, RunSpec

#: Channels are rounded to a multiple of this: vector units work on several channels at once.
CHANNEL_STEP: Final = 4
#: A pool that would leave a side shorter than this is skipped. Two, because batch normalisation in training
#: needs more than one value per channel even when the last batch holds a single example.
SIDE_MIN: Final = 2
#: Side of the map that the auxiliary head reads.
AUX_GRID: Final = 2


@dataclass(frozen=True, slots=True)
class Stage:
    """One convolution stage of a family at full width."""

    channels: int
    pool: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of network, how it is divided by default, and the training settings that suit it."""

    stages: tuple[Stage, ...]
    #: Units of the hidden fully connected layer.
    hidden: int
    #: Longest side of the map before the fully connected layers; longer ones are averaged down to it.
    grid: int
    #: Channels of the auxiliary head's convolution, which stands for the branches while the stem trains.
    aux_channels: int
    model: ModelSpec
    training: TrainingHints


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingHints:
    """Schedule settings that train a family well. `peak_lr` is that of SGD with momentum 0.9."""

    batch_size: int
    peak_lr: float
    weight_decay: float
    #: Times each shard sees the whole of the data.
    epochs: int
    #: Fraction of the other classes' examples that a branch trains on in each pass.
    negatives: float = 1.0
    #: Fraction of the budget at which the stem is sealed.
    seal: float = 0.7


def _vgg(*stages: int | str) -> tuple[Stage, ...]:
    """Stages from the notation of the VGG paper: channels, with "M" after a stage that is pooled."""
    pooled = (*(after == "M" for after in stages[1:]), False)
    return tuple(
        Stage(item, pool) for item, pool in zip(stages, pooled, strict=True) if isinstance(item, int)
    )


#: All of the other classes' examples: a VGG's branches are cheap beside the dense network, and end half a
#: point higher than with three quarters of them (docs/results/method.md).
_VGG_TRAINING: Final = TrainingHints(batch_size=64, peak_lr=0.02, weight_decay=5e-4, epochs=30, seal=0.95)

FAMILIES: Final[dict[str, Family]] = {
    # For images of 32x32. Source of the widths: AlexNet in its usual CIFAR form, 171 M MAC dense. A stem of
    # three narrow stages ends 1.2 points higher than one of two whole ones, at less computation; batches of
    # 64 end 2.4 points higher than batches of 128 (docs/results/method.md).
    "alexnet": Family(
        stages=(Stage(64, True), Stage(192, True), Stage(384), Stage(256), Stage(256, True)),
        hidden=1024,
        grid=4,
        aux_channels=128,
        model=ModelSpec(
            family="alexnet", stem_stages=3, stem_width=0.67, branch_width=0.25, branch_squeeze=0.25
        ),
        training=TrainingHints(
            batch_size=64, peak_lr=0.02, weight_decay=5e-4, epochs=12, negatives=0.75, seal=0.95
        ),
    ),
    # Source: Simonyan & Zisserman 2015, configurations A and D; here with batch norm and one hidden layer.
    "vgg11": Family(
        stages=_vgg(64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
        hidden=512,
        grid=1,
        aux_channels=128,
        model=ModelSpec(
            family="vgg11", stem_stages=4, stem_width=0.5, branch_width=0.25, branch_squeeze=0.25
        ),
        training=_VGG_TRAINING,
    ),
    "vgg16": Family(
        stages=_vgg(64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
        hidden=512,
        grid=1,
        aux_channels=128,
        model=ModelSpec(
            family="vgg16", stem_stages=7, stem_width=0.5, branch_width=0.25, branch_squeeze=0.25
        ),
        training=_VGG_TRAINING,
    ),
    # For keyword spotting: spectrograms of 40 bands and 100 frames. 47 M MAC dense there, AlexNet 652 M.
    # A stem of three stages at half width: with two whole ones, a device with one task saves 4x only.
    # Assembled, 92.0 % of all clips in five folds where the dense network has 91.7 (20 epochs, 12 classes;
    # docs/results/method.md).
    "kws": Family(
        stages=(Stage(32, True), Stage(64, True), Stage(128, True), Stage(128, True)),
        hidden=128,
        grid=4,
        aux_channels=64,
        model=ModelSpec(family="kws", stem_stages=3, stem_width=0.5, branch_width=0.5),
        training=TrainingHints(
            batch_size=64, peak_lr=0.02, weight_decay=5e-4, epochs=20, negatives=0.6, seal=0.95
        ),
    ),
    # For the bundled digits, 8x8 pixels in one channel.
    "digits": Family(
        stages=(Stage(32, True), Stage(64), Stage(128, True)),
        hidden=128,
        grid=2,
        aux_channels=32,
        model=ModelSpec(family="digits", stem_stages=1, branch_width=0.1875),
        # Thinned to 0.3, branches end 0.2 points lower (99.2 against 99.4 %, 3 seeds) at 0.45 of the work.
        training=TrainingHints(batch_size=32, peak_lr=0.05, weight_decay=5e-4, epochs=30, negatives=0.3),
    ),
}


def family(name: str) -> Family:
    """A family by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in FAMILIES:
        raise UsageError(f"there is no model family {name!r}", f"choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def default_model(name: str) -> ModelSpec:
    """How a family is divided unless the user says otherwise."""
    return family(name).model


def default_training(name: str) -> TrainingHints:
    """Batch size, learning rate, weight decay and epochs that suit a family."""
    return family(name).training


def scaled(channels: int, width: float) -> int:
    """Channels at a fraction of the full width: the nearest multiple of `CHANNEL_STEP`, at least one step."""
    return max(CHANNEL_STEP, CHANNEL_STEP * round(channels * width / CHANNEL_STEP))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvPlan:
    """A convolution stage in its place. `height` and `width` are the map's before the pool."""

    inputs: int
    outputs: int
    height: int
    width: int
    pool: bool
    #: Side of the kernel, odd.
    kernel: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """What follows the last convolution: averaging to a grid, a hidden layer (0: none), logits."""

    grid: tuple[int, int]
    features: int
    hidden: int
    logits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A network with all its sizes. A stem has no head."""

    convs: tuple[ConvPlan, ...]
    head: HeadPlan | None


@dataclass(frozen=True, slots=True)
class _Map:
    """Shape of a feature map."""

    channels: int
    height: int
    width: int


def stem_plan(spec: RunSpec) -> Plan:
    """The stem of a run."""
    convs, _ = _stem(spec)
    return Plan(convs=convs, head=None)


def aux_plan(spec: RunSpec) -> Plan:
    """The stem's own all-class head: one convolution, then logits. Not scaled: it stands for the branches."""
    _, at = _stem(spec)
    convs, at = _convs(at, (Stage(family(spec.model.family).aux_channels),), 1.0)
    return Plan(convs=convs, head=_head(at, AUX_GRID, 0, len(spec.classes)))


def branch_plan(spec: RunSpec, classes: int) -> Plan:
    """The branch of a task with so many classes: one logit for each, and the last for "other"."""
    table, width = family(spec.model.family), spec.model.branch_width
    _, at = _stem(spec)
    squeeze, at = _squeezed(at, spec.model.branch_squeeze)
    convs, at = _convs(at, table.stages[spec.model.stem_stages :], width)
    return Plan(
        convs=(*squeeze, *convs), head=_head(at, table.grid, scaled(table.hidden, width), classes + 1)
    )


def dense_plan(spec: RunSpec) -> Plan:
    """The undivided network at full width, to compare with."""
    table = family(spec.model.family)
    convs, at = _convs(_input(spec), table.stages, 1.0)
    return Plan(convs=convs, head=_head(at, table.grid, table.hidden, len(spec.classes)))


def _stem(spec: RunSpec) -> tuple[tuple[ConvPlan, ...], _Map]:
    stages = family(spec.model.family).stages
    if spec.model.stem_stages > len(stages):
        raise UsageError(
            f"{spec.model.family} has {len(stages)} stages, the stem cannot have {spec.model.stem_stages}",
            "choose fewer stem stages",
        )
    return _convs(_input(spec), stages[: spec.model.stem_stages], spec.model.stem_width)


def _squeezed(at: _Map, fraction: float | None) -> tuple[tuple[ConvPlan, ...], _Map]:
    """The 1x1 convolution that brings a map down to a fraction of its channels, if any, and the map then.

    Without it the first 3x3 convolution of a narrow branch, which reads all channels of a wide stem, is most
    of the branch's work (AlexNet: 10.6 of 16.8 M MAC). Source: the bottleneck of He et al. 2016.
    """
    if fraction is None:
        return (), at
    outputs = scaled(at.channels, fraction)
    conv = ConvPlan(
        inputs=at.channels, outputs=outputs, height=at.height, width=at.width, pool=False, kernel=1
    )
    return (conv,), _Map(outputs, at.height, at.width)


def _input(spec: RunSpec) -> _Map:
    return _Map(spec.input.channels, spec.input.height, spec.input.width)


def _convs(at: _Map, stages: tuple[Stage, ...], width: float) -> tuple[tuple[ConvPlan, ...], _Map]:
    """The stages' plans from a map on, and the map after them."""
    convs = []
    for stage in stages:
        pool = stage.pool and min(at.height, at.width) // 2 >= SIDE_MIN
        conv = ConvPlan(
            inputs=at.channels,
            outputs=scaled(stage.channels, width),
            height=at.height,
            width=at.width,
            pool=pool,
        )
        convs.append(conv)
        at = (
            _Map(conv.outputs, at.height // 2, at.width // 2)
            if pool
            else _Map(conv.outputs, at.height, at.width)
        )
    return tuple(convs), at


def _head(at: _Map, grid: int, hidden: int, logits: int) -> HeadPlan:
    rows, columns = min(at.height, grid), min(at.width, grid)
    return HeadPlan(grid=(rows, columns), features=at.channels * rows * columns, hidden=hidden, logits=logits)
