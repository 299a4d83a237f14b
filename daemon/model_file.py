"""The assembled global model on its way from the trainer to the user."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """The global model as a safetensors file's bytes, and what is missing in it."""

    data: bytes
    #: Shard ids of the tasks that nobody has trained yet.
    missing: tuple[str, ...]
    #: Fraction of the classes that the model can tell, 0..1.
    coverage: float
