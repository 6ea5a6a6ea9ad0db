"""The fleet trainer: R replicas of one model on one task, trained together, each as if it were alone."""

from arena.training.config import METRICS, FleetOutOfMemory, Replica, ReplicaResult, TrainConfig
from arena.training.fleet import train_fleet

__all__ = ["METRICS", "FleetOutOfMemory", "Replica", "ReplicaResult", "TrainConfig", "train_fleet"]
