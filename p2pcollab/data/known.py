"""Public data sets that are known by name: what a run needs to know about them before they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..run import InputSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSet:
    """A public data set.

    Fields:
        title: its name for people, and the name of its class in `torchvision.datasets`.
        folder: where torchvision keeps it, below the data root; empty for the bundled digits.
        train_per_class: training images of each class.
    """

    title: str
    folder: str
    classes: tuple[str, ...]
    train_per_class: tuple[int, ...]
    input: InputSpec


_CIFAR100_CLASSES: Final = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel "
    "can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
    "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion "
    "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
    "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea "
    "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table "
    "tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman "
    "worm"
)

#: 1,797 hand-written digits of 8x8 pixels that come with scikit-learn: the one set that needs no download.
DIGITS: Final = KnownSet(
    title="digits",
    folder="",
    classes=tuple("0123456789"),
    train_per_class=(142, 146, 142, 146, 145, 146, 145, 143, 139, 144),
    # Not augmented: they are centred, and a shift by 1 pixel of 8 cost a small network 1.3 points (3 seeds).
    input=InputSpec(channels=1, height=8, width=8, mean=(0.3053,), std=(0.376,), augment="none"),
)

#: By the name after `torchvision:`.
TORCHVISION: Final = {
    "cifar10": KnownSet(
        title="CIFAR10",
        folder="cifar-10-batches-py",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        train_per_class=(5000,) * 10,
        input=InputSpec(
            channels=3,
            height=32,
            width=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
            augment="crop-flip",
        ),
    ),
    "cifar100": KnownSet(
        title="CIFAR100",
        folder="cifar-100-python",
        classes=tuple(_CIFAR100_CLASSES.split()),
        train_per_class=(500,) * 100,
        input=InputSpec(
            channels=3,
            height=32,
            width=32,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            augment="crop-flip",
        ),
    ),
    # Not mirrored: all shoes point to the same side, in the test images too.
    "fashionmnist": KnownSet(
        title="FashionMNIST",
        folder="FashionMNIST",
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        train_per_class=(6000,) * 10,
        input=InputSpec(channels=1, height=28, width=28, mean=(0.286,), std=(0.353,), augment="shift"),
    ),
}
