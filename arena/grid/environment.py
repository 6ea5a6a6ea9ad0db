"""What a result was made with: packages, machine, commit; and the check that ``kernels`` is ours."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "memory-arena",
    "torch",
    "numpy",
    "numba",
    "triton",
    "flash-linear-attention",
    "mlstm-kernels",
    "mamba-ssm",
    "safetensors",
    "polars",
)
ROOT = Path(__file__).parents[2]
"""The folder that holds arena, kernels, synthetic_tasks and experiments: a checkout or site-packages."""


def foreign_kernels() -> str | None:
    """One line when the import name ``kernels`` is, or may be, another distribution's; None when it is ours.

    The public index has a distribution of that name (transformers imports it when it is there). Installed
    beside ours it overwrites files in the same folder, so its mere presence is refused.
    """
    try:
        other = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        other = None
    if other is not None:
        return (
            f"the distribution 'kernels' {other.version} is installed and owns the same import name as this "
            "toolkit's kernels: pip uninstall kernels, then reinstall memory-arena"
        )
    spec = importlib.util.find_spec("kernels")
    where = Path(spec.origin).parent if spec is not None and spec.origin else None
    if where is None or not (where / "gated_memory").is_dir():
        return f"the import name 'kernels' leads to {where}, not to this toolkit's kernels"
    return None


@functools.cache
def environment() -> dict[str, Any]:
    """Package versions, machine and commit: recorded beside every result."""
    import torch

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    packages["torch"] = torch.__version__  # with its build, as 2.13.0+cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": packages,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def cpu_count() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def memory_bytes() -> float:
    """Memory of this machine; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on Windows
        return float("inf")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """The checkout's commit, with ``+changes`` when tracked files differ; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if head.returncode or status.returncode:
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
