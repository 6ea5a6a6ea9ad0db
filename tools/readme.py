"""Fill the generated parts of README.md and docs/speed.md, so that no number in them is typed by hand.

python tools/readme.py examples          # the example architecture, task and measurement, from their files
python tools/readme.py demo RESULTS_DIR  # the table and figure of a finished quickstart
python tools/readme.py bench             # runs the CPU benchmark (minutes; leave the machine alone)
python tools/readme.py gpu               # the GPU tables, from experiments/benchmarks
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import polars as pl

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SPEED = ROOT / "docs" / "speed.md"
EXAMPLES = {
    "retnet": "tests/arena/retnet.py",
    "last_seen": "examples/leaky-arena/leaky_arena/task.py",
    "weight_norm": "examples/leaky-arena/leaky_arena/measure.py",
}
"""Section -> the tested file that it shows."""


def fill(section: str, text: str, page: Path = README) -> None:
    """Replace what stands between the markers of a section of a page."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise SystemExit(f"{page.name} should have the markers {begin} and {end} once each")
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{begin}\n{text.strip()}\n{end}", old), encoding="utf-8")


def example(section: str) -> str:
    """A tested file as a code block."""
    return f"```python\n{(ROOT / EXAMPLES[section]).read_text(encoding='utf-8').strip()}\n```"


def demo(directory: Path) -> str:
    """The overview table and the figure of a report."""
    table = pl.read_parquet(directory / "report" / "accuracy.parquet")
    longest = table.group_by("task").agg(pl.col("eval_length").max())
    cells = table.join(longest, on=["task", "eval_length"])
    tasks = list(tomllib.loads((directory / "experiment.toml").read_text(encoding="utf-8"))["tasks"])
    names = [entry["name"] for entry in tasks]
    lengths = {task: length for task, length in longest.iter_rows()}
    head = ["architecture", *(f"`{name}`, length {lengths[name]}" for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arch in cells["arch"].unique(maintain_order=True).sort():
        row = [f"`{arch}`"]
        for name in names:
            cell = cells.row(by_predicate=(pl.col("arch") == arch) & (pl.col("task") == name), named=True)
            row.append(f"{cell['mean']:.2f} ({cell['min']:.2f} to {cell['max']:.2f})")
        lines.append("| " + " | ".join(row) + " |")
    runs = cells["runs"].max()
    text = f"Accuracy at the longest test length, mean (lowest to highest) of {runs} runs:"
    shutil.copyfile(directory / "report" / "accuracy.png", ROOT / "docs" / "quickstart.png")
    figure = "![Accuracy over sequence length](docs/quickstart.png)"
    return "\n".join([text, "", *lines, "", figure])


PEERS = ("mlstm_kernels==2.0.6", "fla-core==0.6.0", "einops")
"""What the CPU benchmark compares with: installed for the time of the run, in a folder of its own."""


def bench() -> str:
    """The CPU benchmark's own Markdown."""
    command = [sys.executable, "-m", "kernels.bench", "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PEERS]
        if subprocess.run(pip, check=False).returncode:
            print("the alternatives could not be installed: the table names what stands in for them")
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        around = {**os.environ, "PYTHONPATH": path}
        table = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True, env=around
        ).stdout
    how = "Medians of runs that take turns with the alternative, from `python -m kernels.bench --threads 1`:"
    return f"{how}\n\n{table}"


def gpu() -> str:
    """What was recorded on a GPU, as tables."""
    folder = ROOT / "experiments" / "benchmarks"
    names = ("training", "operators", "gated_memory", "short_conv", "slstm")
    files = {name: json.loads((folder / f"{name}_h100.json").read_text(encoding="utf-8")) for name in names}
    links = {name: f"[`{name}_h100.json`](../experiments/benchmarks/{name}_h100.json)" for name in names}
    fleets = [
        [
            row["fleet"],
            f"{row['runs_per_hour']:.0f}",
            f"{row['times_one_by_one']:.1f}",
            f"{row['data_share']:.0%}",
        ]
        for row in files["training"]["rows"]
    ]
    paths: dict[tuple[str, ...], dict[str, float]] = {}
    for row in files["operators"]["rows"]:
        key = (row["setting"], row["shape"], row["dtype"], row["direction"])
        paths.setdefault(key, {})[row["contender"]] = row["ms"]
    times = [
        [*key, f"{ms['ours (chunked)'] / ms['ours (triton)']:.0f}"]
        for key, ms in paths.items()
        if "ours (triton)" in ms
    ]
    beside = [
        [
            row["point"],
            _shape(row["shape_BTHKV"]),
            row["pass"],
            f"{row['ratio_graph']:.2f}",
            row["goal"],
        ]
        for row in files["gated_memory"]["beside_flash_linear_attention"]
    ]
    convolutions = [
        [row["what"], f"{row['both_us'] / 1e3:.2f}", f"{row['share_of_copy_bandwidth']:.0%}"]
        for row in files["short_conv"]["times"]
    ]
    slstm = [[_shape(row["shape_BTHK"]), f"{row['both_us'] / 1e3:.2f}"] for row in files["slstm"]["times"]]
    return "\n\n".join(
        [
            f"Fleets: {files['training']['how'][0]} ({links['training']}).",
            _table(
                ["runs at once", "runs per hour", "times one run at a time", "share of data generation"],
                fleets,
            ),
            "The Triton kernels of `gated_memory` against its torch path, calls as a user makes them "
            f"(kernels of an earlier form than below; {links['operators']}).",
            _table(["gates", "shape", "dtype", "pass", "times faster"], times),
            "GPU time of `gated_memory` over that of flash-linear-attention "
            f"{files['gated_memory']['flash_linear_attention']}, in different runs: a ratio above its goal "
            f"has missed it ({links['gated_memory']} says why, and what was checked).",
            _table(["gates", "shape", "pass", "ratio", "goal"], beside),
            f"{files['short_conv']['what']}: forward and backward (the goal of 80 % is missed; "
            f"{links['short_conv']}).",
            _table(["convolution", "ms", "of the copy bandwidth"], convolutions),
            f"{files['slstm']['what']}: forward and backward ({links['slstm']}).",
            _table(["shape", "ms"], slstm),
        ]
    )


def _shape(sizes: list[int]) -> str:
    """Sizes of B, T, H, K and, where it is given and differs, V."""
    letters = "BTHKV"[: 4 if len(sizes) == 4 or sizes[3] == sizes[4] else 5]
    return " ".join(f"{letter} {size}" for letter, size in zip(letters, sizes, strict=False))


def _table(head: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def main(arguments: list[str]) -> None:
    """Fill one section."""
    match arguments:
        case ["examples"]:
            for section in EXAMPLES:
                fill(section, example(section))
        case ["demo", directory]:
            fill("demo", demo(Path(directory)))
        case ["bench"]:
            fill("bench", bench(), SPEED)
        case ["gpu"]:
            fill("gpu", gpu(), SPEED)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
