"""Experiment -> runs -> fleets -> workers -> store -> table."""

from __future__ import annotations

from arena.grid.driver import GridReport, Pending, run_experiment
from arena.grid.executors import Event, make_executor
from arena.grid.experiment import Experiment, ExperimentError, load_experiment, parse_experiment, shipped
from arena.grid.fleets import plan_fleets
from arena.grid.plan import Fleet, Run, plan_runs
from arena.grid.results import load_curves, load_environments, load_model, load_results
from arena.grid.store import Store, StoreError

__all__ = [
    "Event", "Experiment", "ExperimentError", "Fleet", "GridReport", "Pending", "Run", "Store", "StoreError",
    "load_curves", "load_environments", "load_experiment", "load_model", "load_results", "make_executor",
    "parse_experiment", "plan_fleets", "plan_runs", "run_experiment", "shipped",
]  # fmt: skip
