"""``python -m kernels.bench``: the ratios of docs/speed.md; ``... operators``: every operator, as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from kernels.bench.contenders import ARENA, SIZES, comparisons
from kernels.bench.operators import rows
from kernels.bench.ratios import table
from kernels.bench.timing import ceilings, machine
from kernels.doctor import POINTS


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    kinds = parser.add_subparsers(dest="kind")
    each = kinds.add_parser("operators", help="time every operator beside what is installed")
    each.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    each.add_argument("--sizes", choices=tuple(SIZES), default=ARENA)
    each.add_argument("--operators", default="", help="names with commas between (default: all)")
    each.add_argument("--points", default="", help=f"of gated_memory: {', '.join(POINTS)}")
    each.add_argument("--first", type=int, help="only so many of the shapes (default: all)")
    each.add_argument("--out", help="file for the rows, JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.kind is None:
        for line in table(options.repeats):
            print(line, flush=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m kernels.bench: torch sees no GPU here")
    limits = ceilings(options.device, [SIZES[options.sizes]])
    found: dict = {"machine": machine(options.device), "ceilings": limits, "rows": []}
    print(json.dumps(found["machine"]), json.dumps(limits), flush=True)
    wanted = comparisons(
        options.device,
        options.sizes,
        operators=tuple(x for x in options.operators.split(",") if x),
        points=tuple(x for x in options.points.split(",") if x),
        first=options.first,
    )
    start = time.monotonic()
    for row in rows(wanted, options.device, limits, rounds=options.repeats):
        found["rows"].append(row)
        if row["ms"] is None:
            numbers = row["note"]
        else:
            graph = "" if row["graph_ms"] is None else f" graph {row['graph_ms']:.4f}"
            error = "" if row["error"] is None else f" error {row['error']:.1e}"
            numbers = (
                f"{row['ms']:.4f} ms{graph} x{row['ours_times_faster'] or float('nan'):.2f} "
                f"copy {row['of_copy']:.2f} {row['memory_mb']:.0f} MB{error} {row['note'][:40]}"
            )
        what = f"{row['operator']} {row['setting']} {row['shape']} {row['direction']}"
        print(f"{time.monotonic() - start:5.0f}s {what}: {row['contender']}: {numbers}", flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
