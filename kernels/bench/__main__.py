"""``python -m kernels.bench``: the ratios of docs/speed.md; ``... operators``: every operator, as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kernels.backends import OPERATORS
from kernels.bench.contenders import ARENA, DTYPES, SIZES, comparisons
from kernels.bench.operators import rows
from kernels.bench.ratios import table
from kernels.bench.timing import ceilings, machine
from kernels.bench.tuning import tuning
from kernels.doctor import POINTS


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    kinds = parser.add_subparsers(dest="kind")
    each = kinds.add_parser("operators", help="time every operator beside what is installed")
    each.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    each.add_argument("--sizes", default=ARENA, help=f"{', '.join(SIZES)}; commas between")
    each.add_argument("--dtype", choices=tuple(DTYPES), help="default: by size")
    each.add_argument("--operators", default="", help="names with commas between (default: all)")
    each.add_argument("--points", default="", help=f"of gated_memory: {', '.join(POINTS)}")
    each.add_argument("--first", type=int, help="only so many of the shapes (default: all)")
    each.add_argument("--without", default="", help="contenders with one of these in their name are left out")
    each.add_argument(
        "--peer-configs", type=int, help="settings that autotuning tries a kernel (default: all)"
    )
    each.add_argument("--out", help="file for the rows, JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.kind is None:
        for line in table(options.repeats):
            print(line, flush=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m kernels.bench: torch sees no GPU here")
    sizes, points, operators, without = (
        tuple(x for x in text.split(",") if x)
        for text in (options.sizes, options.points, options.operators, options.without)
    )
    for given, known in ((sizes, SIZES), (points, POINTS), (operators, OPERATORS)):
        if unknown := [x for x in given if x not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    dtype = DTYPES[options.dtype] if options.dtype else None
    limits = ceilings(options.device, sorted({dtype or SIZES[x] for x in sizes}, key=str))
    found: dict = {"machine": machine(options.device), "ceilings": limits, "rows": []}
    print(json.dumps(found["machine"]), json.dumps(limits), flush=True)
    wanted = comparisons(
        options.device, sizes, dtype=dtype, operators=operators, points=points, first=options.first
    )
    with tuning(options.peer_configs) as found["settings"]:
        measured = rows(wanted, options.device, limits, rounds=options.repeats, without=without)
        _tell(measured, found, options.out)


def _tell(measured: Iterator[dict[str, Any]], found: dict[str, Any], out: str | None) -> None:
    """Print the rows as they come; the file holds those so far."""
    start = time.monotonic()
    for row in measured:
        found["rows"].append(row)
        if row["ms"] is None:
            numbers = row["note"]
        else:
            graph = "" if row["graph_ms"] is None else f" graph {row['graph_ms']:.4f}"
            error = "" if row["error"] is None else f" error {row['error']:.1e} {row['gradient_error']:.1e}"
            numbers = (
                f"{row['ms']:.4f} ms{graph} x{row['ours_times_faster'] or float('nan'):.2f} "
                f"copy {row['of_copy']:.2f} {row['memory_mb']:.0f} MB{error} {row['note'][:40]}"
            )
        what = f"{row['operator']} {row['setting']} {row['shape']} {row['direction']}"
        print(f"{time.monotonic() - start:5.0f}s {what}: {row['contender']}: {numbers}", flush=True)
        if out:
            Path(out).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
