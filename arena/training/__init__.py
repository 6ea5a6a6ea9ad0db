"""The fleet trainer: R replicas of one model on one task, trained together, each as if it were alone."""

from arena.training.config import METRICS, FleetOutOfMemory, Replica, ReplicaResult, TrainConfig
from arena.training.fleet import train_fleet
from arena.training.footprint import Footprint, measure_footprint, memory_budget

RESULT_VERSION = 1
"""Bumped by hand when results of this part change; part of every run's id."""

__all__ = [
    "METRICS",
    "RESULT_VERSION",
    "FleetOutOfMemory",
    "Footprint",
    "Replica",
    "ReplicaResult",
    "TrainConfig",
    "measure_footprint",
    "memory_budget",
    "train_fleet",
]
