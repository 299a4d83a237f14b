"""The family of decoupled networks: stem, branches, and how they become one model."""

from .build import (
    blank_aux_head,
    blank_branch,
    blank_shard,
    blank_stem,
    build_aux_head,
    build_branch,
    build_dense,
    build_stem,
    initial_shard,
)
from .grouped import GlobalModel, GroupedBranches
from .layers import Classifier, Stem
from .stages import FAMILIES, Family, TrainingHints, default_model, default_training
from .submodel import ClassScores, ScoringNetwork, SubModel, probabilities

__all__ = [
    "FAMILIES",
    "ClassScores",
    "Classifier",
    "Family",
    "GlobalModel",
    "GroupedBranches",
    "ScoringNetwork",
    "Stem",
    "SubModel",
    "TrainingHints",
    "blank_aux_head",
    "blank_branch",
    "blank_shard",
    "blank_stem",
    "build_aux_head",
    "build_branch",
    "build_dense",
    "build_stem",
    "default_model",
    "default_training",
    "initial_shard",
    "probabilities",
]
