"""One configuration of the benchmark, and the run spec that it stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from p2pcollab.data import inspect
from p2pcollab.grouping import parse_groups
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import ModelSpec, RunSpec, Schedule

_MAY_BE_UNSET: Final[Mapping[str, type[int] | type[float]]] = {
    "branch_squeeze": float,
    "branch_lr": float,
    "positives": int,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What is trained."""

    #: Name of the data set in the tables.
    dataset: str
    source: str
    root: Path | None
    model: str
    #: Name of the settings in the tables.
    name: str
    epochs: float
    limit: int | None
    #: How fast each device is, in units of the slowest.
    speeds: tuple[float, ...]
    #: `iid`: each device has its own equal part of the data; `shared`: everybody has all of them.
    partition: Literal["iid", "shared"]
    #: File with the tasks' classes, one task a line.
    groups: Path | None
    #: Fields of the run spec's model, schedule or tasks that differ from the defaults.
    settings: Mapping[str, float]
    #: The same for the dense network alone: what suits the branches need not suit it.
    dense_settings: Mapping[str, float] = field(default_factory=dict)

    def spec(self, seed: int, column: str = "D") -> RunSpec:
        """The run spec: that of `p2pcollab new` with these options, but for the settings."""
        settings = {**self.settings, **(self.dense_settings if column == "A" else {})}
        per_task = settings.pop("classes_per_task", None)
        lease_batches = settings.pop("lease_batches", None)
        branches_per_class = int(settings.pop("branches_per_class", 1))
        info = inspect(self.source, self.root)
        images = min(self.limit or info.train_images, info.train_images)
        options = PlanOptions(
            family=self.model,
            epochs=self.epochs,
            expected_samples=images,
            seed=seed,
            classes_per_task=None if per_task is None else int(per_task),
            groups=parse_groups(self.groups.read_text(), info.classes) if self.groups else None,
            branches_per_class=branches_per_class,
        )
        spec = plan_run(f"{self.dataset} {self.model}", info, options)
        if lease_batches is not None:
            batch = settings.get("batch_size", spec.schedule.batch_size)
            settings["lease_samples"] = lease_batches * batch
        model, schedule = spec.model, spec.schedule
        for name, value in settings.items():
            if name in ModelSpec.model_fields:
                model = model.model_copy(update={name: _as(model, name, value)})
            elif name in Schedule.model_fields:
                schedule = schedule.model_copy(update={name: _as(schedule, name, value)})
            else:
                raise SystemExit(f"--set: a run spec has no field {name!r}")
        changed = spec.model_copy(update={"model": model, "schedule": schedule})
        return RunSpec.decode(changed.encode())  # validated as a whole

    def key(self, column: str, seed: int) -> str:
        """Name of a result: equal for equal work.

        The dense network's depends on nothing of the branches, the grouped one's on nothing of their losses.
        """
        spec = self.spec(seed, column).model_dump(mode="json")
        spec.pop("name")
        _drop_unset(spec)
        if column == "A":
            for field in ("stem_stages", "stem_width", "branch_width", "branch_squeeze"):
                spec["model"].pop(field, None)
            spec.pop("tasks")
        if column in "AB":
            for field in ("lease_samples", "stem_seal_fraction", "negatives", "positives", "branch_lr"):
                spec["schedule"].pop(field, None)
        described: dict[str, Any] = {"spec": spec, "source": self._data, "limit": self.limit}
        if column == "D":
            described |= {"speeds": self.speeds, "partition": self.partition}
        return f"{self.dataset}-{self.model}-{column}-{seed}-{_digest(described)}"

    @property
    def _data(self) -> str | list[object]:
        """What the source is, wherever it is: of a folder, its kind and how many examples each class has."""
        info = inspect(self.source, self.root)
        return self.source if info.source.path is None else [info.source.kind, *info.class_counts]

    @property
    def measured_key(self) -> str:
        """Name of what is measured once for all seeds (`columns.measure`)."""
        spec = self.spec(0).model_dump(mode="json")
        spec.pop("name")
        _drop_unset(spec)
        described = {"spec": spec, "source": self._data, "limit": self.limit}
        return f"{self.dataset}-{self.model}-measured-{_digest(described)}"


def _drop_unset(spec: dict[str, Any]) -> None:
    """Leave out fields that are not set, and that there were not when the first results were named."""
    for name in ("positives", "branch_lr"):
        if spec["schedule"].get(name) is None:
            spec["schedule"].pop(name, None)


def _digest(described: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def _as(part: ModelSpec | Schedule, name: str, value: float) -> float | int | None:
    """A number as a field takes it; where a field may be unset, 0 unsets it."""
    if name in _MAY_BE_UNSET:
        return _MAY_BE_UNSET[name](value) if value else None
    return type(getattr(part, name))(value)  # type: ignore[no-any-return]
