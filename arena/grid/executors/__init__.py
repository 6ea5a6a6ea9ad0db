"""Where fleets train: processes of this machine, a Ray cluster, or Slurm.

Each engine does its own scheduling, notices by itself what is lost, and runs it again by its own rules; the
toolkit adds none. All of them give the driver the same events, and the driver alone writes the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arena.grid.executors.base import Event, Executor, Slots, Work
from arena.grid.executors.local import LocalExecutor
from arena.grid.fields import ExperimentError, near

NAMES = ("local", "ray", "slurm")


def make_executor(
    name: str,
    *,
    directory: str | Path,
    device: str = "cpu",
    workers: int | None = None,
    address: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    slurm: Mapping[str, Any] | None = None,
    shared: bool = False,
) -> Executor:
    """The engine of a name; nothing is started or connected yet.

    Args:
        name: of :data:`NAMES`.
        directory: the result folder.
        device: ``cpu`` or ``cuda``.
        workers: of ``local``: processes, None for one a core or one a GPU; of ``slurm``: fleets at once.
        address: of ``ray``: a cluster; None: one on this machine.
        cpus: of ``ray`` and ``slurm``: CPUs of a fleet; default 1.
        gpus: of ``ray`` and ``slurm``: GPUs of a fleet; of ``ray`` also a fraction of one; default 1 for
            ``cuda``.
        slurm: of ``slurm``: parameters of ``sbatch``; ``cluster``: submitit's engine, default ``slurm``.
        shared: several drivers use the folder.

    Raises:
        ExperimentError: no such engine; an option that it does not have; a value out of range; no GPU for
            ``local`` on ``cuda``.
    """
    if name not in NAMES:
        raise ExperimentError(f"no executor {name!r}{near(name, NAMES)}")
    for option, value, owners in (
        ("workers", workers, ("local", "slurm")),
        ("address", address, ("ray",)),
        ("cpus", cpus, ("ray", "slurm")),
        ("gpus", gpus, ("ray", "slurm")),
        ("slurm", slurm or None, ("slurm",)),
    ):
        if value is not None and name not in owners:
            raise ExperimentError(f"--{option} is of --executor {' and '.join(owners)}, not of {name}")
    if cpus is not None and not cpus > 0:
        raise ExperimentError(f"--cpus is a number above 0, not {cpus:g}")
    if gpus is not None and not gpus >= 0:
        raise ExperimentError(f"--gpus is 0 or more, not {gpus:g}")
    if device == "cpu" and gpus:
        raise ExperimentError("--gpus is of --device cuda")
    if device == "cuda" and gpus == 0:
        raise ExperimentError("--device cuda: a fleet needs a GPU or a fraction of one, not --gpus 0")
    if name == "local":
        return LocalExecutor(workers=workers, gpus=gpu_count(device))
    wanted_gpus = gpus if gpus is not None else float(device == "cuda")
    if wanted_gpus > 1:
        raise ExperimentError(f"a fleet trains on one GPU or a fraction of one, not on {wanted_gpus:g}")
    wanted_cpus = 1 if cpus is None else cpus
    if name == "ray":
        from arena.grid.executors.ray import RayExecutor

        return RayExecutor(address=address, cpus=wanted_cpus, gpus=wanted_gpus)
    from arena.grid.executors.slurm import SlurmExecutor

    if wanted_cpus != int(wanted_cpus) or wanted_gpus != int(wanted_gpus):
        raise ExperimentError("--executor slurm: --cpus and --gpus are whole numbers")
    parameters = dict(slurm or {})
    cluster = parameters.pop("cluster", "slurm")
    if cluster not in ("slurm", "local", "debug"):
        raise ExperimentError(f"--slurm cluster is slurm, local or debug, not {cluster!r}")
    return SlurmExecutor(
        folder=Path(directory) / "slurm",
        cluster=cluster,
        workers=workers,
        cpus=int(wanted_cpus),
        gpus=int(wanted_gpus),
        parameters=parameters,
        shared=shared,
    )


def gpu_count(device: str) -> int:
    """GPUs of this machine to use: 0 on the CPU.

    Raises:
        ExperimentError: ``cuda`` without one.
    """
    if device != "cuda":
        return 0
    import torch

    if torch.cuda.device_count() == 0:
        raise ExperimentError("--device cuda: torch sees no GPU on this machine (arena doctor says more)")
    return torch.cuda.device_count()


__all__ = ["NAMES", "Event", "Executor", "LocalExecutor", "Slots", "Work", "gpu_count", "make_executor"]
