"""The run spec: what one collaboration trains, and how. Immutable; its digest is the run id.

Every device of a run holds the same bytes. Whatever two devices must agree on to build equal models is in
here, and nothing else is: addresses, budgets and data stay with the device.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Annotated, Final, Literal, NewType

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from . import limits
from .errors import IncompatibleError, PeerError, UsageError

#: 2: momentum travels with its shard.
PROTOCOL_VERSION: Final = 2
#: Versions whose run specs, and so whose models, can be read. Only a run of the newest can be taken part in.
PROTOCOLS_READ: Final = (1, 2)
#: Classes that a task's label names.
_LABEL_CLASSES_MAX: Final = 5

RunId = NewType("RunId", str)
"""SHA-256 of the encoded run spec, 64 hexadecimal digits."""
DeviceId = NewType("DeviceId", str)
"""First 32 hexadecimal digits of the SHA-256 of a device's Ed25519 public key."""
ShardId = NewType("ShardId", str)
"""`stem`, or the id of a task."""

STEM: Final = ShardId("stem")

#: Where a spectrogram begins, and where the mel scale turns from linear to logarithmic.
LOWEST_HZ: Final = 20.0
MEL_CORNER_HZ: Final = 700.0

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=limits.NAME_CHARS_MAX, pattern=r"^[^\x00-\x1f\x7f]+$")
]


#: Unknown fields are all counted before any is told of, and telling takes a microsecond each.
_FAULTS_MAX: Final = 100


class Frozen(BaseModel):
    """A value that comes from outside: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskSpec(Frozen):
    """A sub-set of the classes that is trained as a unit. `classes` are indices into `RunSpec.classes`."""

    id: Annotated[str, StringConstraints(pattern=r"^t[0-9]{1,4}$")]
    classes: Annotated[tuple[int, ...], Field(min_length=1, max_length=limits.CLASSES_MAX, fail_fast=True)]


class ModelSpec(Frozen):
    """Which network, and how it is decoupled."""

    family: Annotated[str, StringConstraints(max_length=32, pattern=r"^[a-z0-9-]+$")]
    #: Number of convolution stages in the stem, shared by all tasks.
    stem_stages: Annotated[int, Field(ge=1, le=16)]
    #: Channels of the stem's stages as a fraction of the family's.
    stem_width: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    #: Channels of a branch's stages as a fraction of the family's.
    branch_width: Annotated[float, Field(gt=0.0, le=1.0)]
    #: A branch first brings the stem's maps down to this fraction of their channels, by a 1x1 convolution;
    #: None: it takes them as they are.
    branch_squeeze: Annotated[float, Field(gt=0.0, le=1.0)] | None = None


class AudioSpec(Frozen):
    """How a clip becomes an example: its log-mel spectrogram, one byte per band and frame."""

    #: Whole samples per millisecond, so that a frame is the same number of samples on every device.
    sample_rate_hz: Annotated[int, Field(ge=8000, le=48_000, multiple_of=1000)] = 16_000
    clip_ms: Annotated[int, Field(ge=100, le=10_000)] = 1000
    #: From one frame to the next, and the length of each.
    hop_ms: Annotated[int, Field(ge=5, le=100)] = 10
    window_ms: Annotated[int, Field(ge=10, le=200)] = 25
    bands: Annotated[int, Field(ge=8, le=128)] = 40
    #: The energies that become 0 and 255. A sine at full scale has about 34 dB.
    floor_db: Annotated[float, Field(ge=-120.0, le=0.0)] = -60.0
    top_db: Annotated[float, Field(ge=20.0, le=120.0)] = 40.0

    @model_validator(mode="after")
    def _consistent(self) -> AudioSpec:
        if self.clip_ms % self.hop_ms:
            raise ValueError("a clip needs a whole number of frames")
        if self.window_ms < self.hop_ms:
            raise ValueError("frames leave gaps between them")
        # The lowest band is the narrowest, and at least as wide as one frequency of the transform. Without
        # one, the library that computes the bands gives up.
        nyquist = self.sample_rate_hz / 2
        ratio = (MEL_CORNER_HZ + nyquist) / (MEL_CORNER_HZ + LOWEST_HZ)
        narrowest = (MEL_CORNER_HZ + LOWEST_HZ) * (ratio ** (2 / (self.bands + 1)) - 1)
        if narrowest * self.window_ms < 1000:
            raise ValueError(f"{self.bands} bands are too many for windows of {self.window_ms} ms")
        return self

    @property
    def frames(self) -> int:
        """Columns of the spectrogram."""
        return self.clip_ms // self.hop_ms

    @property
    def clip_samples(self) -> int:
        """Samples of a clip at `sample_rate_hz`."""
        return self.clip_ms * (self.sample_rate_hz // 1000)

    @property
    def db_per_level(self) -> float:
        """Decibels from one value of the spectrogram to the next."""
        return (self.top_db - self.floor_db) / 255


class InputSpec(Frozen):
    """Shape, normalisation and augmentation of an example."""

    channels: Literal[1, 3]
    height: Annotated[int, Field(ge=4, le=1024)]
    width: Annotated[int, Field(ge=4, le=1024)]
    #: Per channel, of pixel values in 0..1.
    mean: Annotated[tuple[float, ...], Field(max_length=3, fail_fast=True)]
    std: Annotated[tuple[Annotated[float, Field(gt=1e-4)], ...], Field(max_length=3, fail_fast=True)]
    #: `shift`: random translation; `crop-flip`: random translation and horizontal flip, for natural images;
    #: `speech`: random shift in time and background noise.
    augment: Literal["none", "shift", "crop-flip", "speech"]
    #: Examples are clips, seen as pictures of their spectrum; None: images.
    audio: AudioSpec | None = None

    @model_validator(mode="after")
    def _per_channel(self) -> InputSpec:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError("mean and std need one value per channel")
        return self

    @model_validator(mode="after")
    def _of_one_kind(self) -> InputSpec:
        if self.audio is None:
            if self.augment == "speech":
                raise ValueError("images cannot be augmented like speech")
        elif (self.channels, self.height, self.width) != (1, self.audio.bands, self.audio.frames):
            raise ValueError(f"the clips' spectra are 1x{self.audio.bands}x{self.audio.frames}")
        elif self.augment not in ("none", "speech"):
            raise ValueError("clips are augmented like speech or not at all")
        return self

    @property
    def noun(self) -> str:
        """What an example is called in messages."""
        return "image" if self.audio is None else "clip"


class Schedule(Frozen):
    """How much is trained, and with which learning rate. Progress, not time, is the clock."""

    #: Samples that each shard sees before it is complete.
    budget_samples: Annotated[int, Field(ge=1, le=10**12)]
    #: Samples of one lease: what a device trains before it publishes and hands on.
    lease_samples: Annotated[int, Field(ge=1, le=10**9)]
    batch_size: Annotated[int, Field(ge=2, le=4096)]
    peak_lr: Annotated[float, Field(gt=0.0, le=100.0)]
    #: That of branches; None: the same.
    branch_lr: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 5e-4
    #: Fraction of the budget over which the learning rate rises.
    warmup_fraction: Annotated[float, Field(ge=0.0, le=0.9)] = 0.2
    #: The stem's budget as a fraction of `budget_samples`; at its end the stem is sealed.
    stem_seal_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    #: Fraction of the other classes' examples that a branch trains on in each pass; its own it trains all.
    negatives: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    #: How often a branch trains on each example of its own classes in a pass, augmented anew; None: once.
    positives: Annotated[int, Field(ge=2, le=16)] | None = None

    @property
    def rarity(self) -> float:
        """How much rarer another class's example is than one of its own in what a branch trains on, 0..1."""
        return self.negatives / (self.positives or 1)


class RunSpec(Frozen):
    """One collaboration: its classes, tasks, model, input and schedule."""

    protocol: Literal[1, 2] = PROTOCOL_VERSION
    name: Name
    classes: Annotated[tuple[Name, ...], Field(min_length=2, max_length=limits.CLASSES_MAX, fail_fast=True)]
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1, max_length=limits.TASKS_MAX, fail_fast=True)]
    model: ModelSpec
    input: InputSpec
    schedule: Schedule
    seed: Annotated[int, Field(ge=0, lt=2**31)]

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("class names must be unique")
        ids = [task.id for task in self.tasks]
        if len(set(ids)) != len(ids):
            raise ValueError("task ids must be unique")
        covered: set[int] = set()
        for task in self.tasks:
            if len(set(task.classes)) != len(task.classes):
                raise ValueError(f"task {task.id} names a class twice")
            if not all(0 <= index < len(self.classes) for index in task.classes):
                raise ValueError(f"task {task.id} names a class that does not exist")
            covered.update(task.classes)
        if covered != set(range(len(self.classes))):
            raise ValueError("every class needs a task")
        return self

    def encode(self) -> bytes:
        """Canonical bytes: JSON with sorted keys and no white space, UTF-8; what is None is left out."""
        return json.dumps(
            self.model_dump(mode="json", exclude_none=True),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        ).encode()

    @classmethod
    def decode(cls, data: bytes, protocols: tuple[int, ...] = (PROTOCOL_VERSION,)) -> RunSpec:
        """Parse bytes from outside.

        Args:
            protocols: versions that will do.

        Raises:
            IncompatibleError: the spec is of another protocol version.
            PeerError: anything else is wrong with it.
        """
        if len(data) > limits.RUN_SPEC_BYTES_MAX:
            raise PeerError(f"the run spec has {len(data)} bytes, more than {limits.RUN_SPEC_BYTES_MAX}")
        # Counted, brackets and commas in names included, before any of them becomes an object.
        containers = data.count(b"[") + data.count(b"{")
        if containers > limits.RUN_SPEC_LISTS_MAX or data.count(b",") > limits.RUN_SPEC_ITEMS_MAX:
            raise PeerError("the run spec has more parts than any run")
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise PeerError("the run spec is not JSON") from error
        if not isinstance(fields, dict):
            raise PeerError("the run spec is not an object")
        protocol = fields.get("protocol")
        if isinstance(protocol, int) and protocol not in protocols:
            raise IncompatibleError(
                f"the run uses protocol version {str(protocol)[:20]}, this program speaks {PROTOCOL_VERSION}",
                "install the same version of p2pcollab on all devices",
            )
        try:
            # Not from the bytes once more: pydantic would make them into objects anew for each of its errors.
            spec = cls.model_validate(fields)
        except ValidationError as error:
            raise PeerError(f"the run spec is not valid: {first_fault(error)}") from error
        if spec.encode() != data:
            raise PeerError("the run spec is not in canonical form")
        return spec

    @property
    def run_id(self) -> RunId:
        """SHA-256 of the canonical bytes."""
        return RunId(hashlib.sha256(self.encode()).hexdigest())

    def task(self, shard: ShardId) -> TaskSpec:
        """The task that a shard serves.

        Raises:
            UsageError: the run has no such task.
        """
        for task in self.tasks:
            if task.id == shard:
                return task
        raise UsageError(f"the run has no task {shard!r}")

    @property
    def shards(self) -> tuple[ShardId, ...]:
        """The stem, then the tasks in order."""
        return (STEM, *(ShardId(task.id) for task in self.tasks))

    def budget(self, shard: ShardId) -> int:
        """Samples after which a shard is complete."""
        if shard == STEM:
            return max(1, round(self.schedule.budget_samples * self.schedule.stem_seal_fraction))
        return self.schedule.budget_samples

    def label(self, shard: ShardId) -> str:
        """A shard's name for people: `stem`, or its classes joined by `+`, and a number where that is taken.

        Long names are cut: a task may have hundreds of classes.
        """
        if shard == STEM:
            return "stem"
        classes = self.task(shard).classes
        names = "+".join(self.classes[index] for index in classes[:_LABEL_CLASSES_MAX])
        if len(classes) > _LABEL_CLASSES_MAX:
            names += f"+{len(classes) - _LABEL_CLASSES_MAX} more"
        alike = [ShardId(task.id) for task in self.tasks if task.classes == classes]
        return names if shard == alike[0] else f"{names} ({alike.index(shard) + 1})"


def first_fault(error: ValidationError) -> str:
    """What is wrong with a value from outside, in a few words."""
    if error.error_count() > _FAULTS_MAX:
        return f"it has {error.error_count()} faults"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # A field's name may be the peer's invention: escaped and cut, so that it cannot write to a terminal.
    where = ascii(".".join(str(part) for part in first["loc"]))[1:-1][:80]
    return f"{where}: {first['msg']}" if where else str(first["msg"])


SECRET_BYTES: Final = 16
_RUN_PREFIX_BYTES: Final = 7
_CHECK_BYTES: Final = 2
#: A code has 53; the rest is for spaces.
_CODE_CHARS_MAX: Final = 256


def _check(body: bytes) -> bytes:
    # CRC-16 and not a hash: it finds every error within 16 adjacent bits, so any one mistyped letter and any
    # two adjacent letters swapped. Two bytes of a hash missed some letter of one code in fifty.
    return binascii.crc_hqx(body, 0).to_bytes(_CHECK_BYTES, "big")


class JoinCode(Frozen):
    """What a person types on the next device: the run secret, and enough of the run id to find the run."""

    secret: Annotated[bytes, Field(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    run_prefix: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * _RUN_PREFIX_BYTES}}}$")]

    @classmethod
    def create(cls, secret: bytes, run_id: RunId) -> JoinCode:
        """The code of a run."""
        return cls(secret=secret, run_prefix=run_id[: 2 * _RUN_PREFIX_BYTES])

    def __str__(self) -> str:
        body = self.secret + bytes.fromhex(self.run_prefix)
        text = base64.b32encode(body + _check(body)).decode()
        return "P2P-" + "-".join(text[start : start + 4] for start in range(0, len(text), 4))

    def __repr__(self) -> str:  # the secret must not reach a log by accident
        return f"JoinCode(run_prefix={self.run_prefix!r})"

    @classmethod
    def parse(cls, text: str) -> JoinCode:
        """Read a join code, whatever the case and however the groups are separated.

        Raises:
            UsageError: it is not a join code, or was mistyped.
        """
        fix = "copy it from the device that created the run (`p2pcollab new` or `p2pcollab status` prints it)"
        if len(text) > _CODE_CHARS_MAX:
            raise UsageError(f"a join code does not have {len(text)} characters", fix)
        compact = "".join(text.split()).replace("-", "").upper()
        if not compact.startswith("P2P"):
            raise UsageError("a join code starts with P2P-", fix)
        try:
            raw = base64.b32decode(compact[3:].encode())
        except ValueError as error:
            raise UsageError("the join code has a wrong length or a character that none has", fix) from error
        body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if len(body) != SECRET_BYTES + _RUN_PREFIX_BYTES:
            raise UsageError("the join code has a wrong length", fix)
        if _check(body) != check:
            raise UsageError("the join code is mistyped: its check letters do not fit", fix)
        return cls(secret=body[:SECRET_BYTES], run_prefix=body[SECRET_BYTES:].hex())
