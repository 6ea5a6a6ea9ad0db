"""Slurm's commands for one machine: ``python slurm_fakes.py sbatch|srun|sacct|scancel ...``.

Jobs are processes; their scripts, pids and names are in the folder $FAKE_SLURM.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path


def sbatch(folder: Path, arguments: list[str]) -> None:
    text = Path(arguments[-1]).read_text()
    number = 100 + len(list(folder.glob("*.sh")))
    script = folder / f"{number}.sh"
    script.write_text(text)
    array = re.search(r"#SBATCH --array=0-([0-9]+)%", text)
    name = re.search(r"#SBATCH --job-name=(.*)", text)[1]
    for index in range(int(array[1]) + 1) if array else [None]:
        job = f"{number}_{index}" if array else f"{number}"
        ids = {"SLURM_JOB_ID": str(number)}
        if array:
            ids |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
        process = subprocess.Popen(
            ["bash", str(script)],
            env={
                **os.environ, **ids, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
                "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            },
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (folder / f"{job}.name").write_text(name)
        (folder / f"{job}.pid").write_text(str(process.pid))
    print(f"Submitted batch job {number}")


def srun(folder: Path, arguments: list[str]) -> None:
    while arguments[0].startswith("-"):
        arguments = arguments[1 if arguments[0] == "--unbuffered" else 2 :]
    os.execvp(arguments[0], arguments)


def sacct(folder: Path, arguments: list[str]) -> None:
    print("JobID|State|NodeList")
    for path in folder.glob("*.pid"):
        print(f"{path.stem}|{'RUNNING' if alive(int(path.read_text())) else 'COMPLETED'}|here")


def scancel(folder: Path, arguments: list[str]) -> None:
    names = [text.removeprefix("--name=") for text in arguments if text.startswith("--name=")]
    for path in folder.glob("*.pid"):
        job = path.stem
        if job.split("_")[0] in arguments or (folder / f"{job}.name").read_text() in names:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scancel": scancel}[sys.argv[1]](
        Path(os.environ["FAKE_SLURM"]), sys.argv[2:]
    )
