"""Fuzz what reads other people's input, for as long as it is told to.

    python tools/fuzz.py toml --minutes 10      # experiment files: bytes, values, and their planning
    python tools/fuzz.py cli --minutes 10       # command lines
    python tools/fuzz.py store --minutes 10     # result folders, checksums forged or not
    python tools/fuzz.py atheris --minutes 10   # the parser, guided by coverage (pip install atheris)

Every outcome is to be success or an error of one line; the first that is not is shown, with exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def fuzz(strategy: Any, check: Callable[[Any], str], minutes: float) -> None:
    """Draw examples until the time is over; count how they ended."""
    from hypothesis import HealthCheck, Phase, given, settings

    ended: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + 60 * minutes

    @settings(
        max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], print_blob=False,
    )  # fmt: skip
    @given(strategy)
    def some(example: Any) -> None:
        if time.monotonic() < end:
            ended[check(example)] += 1

    while time.monotonic() < end:
        some()
        print(f"{sum(ended.values())} examples: {dict(ended.most_common())}", flush=True)


def guided(minutes: float) -> None:
    """LibFuzzer on the text of experiment files."""
    import atheris

    with atheris.instrument_imports(include=["arena.grid.experiment", "arena.grid.fields", "tomllib"]):
        from arena.grid.experiment import parse_text
    from arena.grid.fields import ExperimentError
    from arena.grid.toml import to_toml
    from tests.arena.fuzzing import BASE, one_line

    def target(data: bytes) -> None:
        try:
            parse_text(data)
        except ExperimentError as error:
            one_line(error)

    folder = Path(tempfile.mkdtemp())
    (folder / "right.toml").write_text(to_toml(BASE))
    for file in (Path(__file__).parents[1] / "experiments").glob("*.toml"):
        shutil.copy(file, folder)
    limits = [f"-max_total_time={int(60 * minutes)}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *limits, str(folder)], target)
    atheris.Fuzz()


def main() -> None:
    """Parse the command line and fuzz."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["toml", "cli", "store", "atheris"])
    parser.add_argument("--minutes", type=float, default=10)
    wanted = parser.parse_args()
    if wanted.what == "atheris":
        guided(wanted.minutes)
        return
    from hypothesis import strategies as st

    from tests.arena import fuzzing

    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        if wanted.what == "toml":
            either = st.one_of(fuzzing.texts(), fuzzing.experiments())

            def read(example: Any) -> str:
                return (fuzzing.read_file if isinstance(example, bytes) else fuzzing.read_data)(example, home)

            fuzz(either, read, wanted.minutes)
        elif wanted.what == "cli":
            with fuzzing.nothing_runs(home):
                fuzz(fuzzing.LINES, fuzzing.command, wanted.minutes)
        else:
            trained, folder = fuzzing.train(home), home / "attacked"

            def read_attacked(attacks: Any) -> str:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(trained, folder)
                fuzzing.attack(folder, attacks)
                return fuzzing.read_folder(folder)

            fuzz(fuzzing.ATTACKS, read_attacked, wanted.minutes)


if __name__ == "__main__":
    main()
