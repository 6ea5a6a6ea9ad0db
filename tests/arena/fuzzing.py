"""Hostile input, drawn at random: experiment files, command lines, result folders.

What holds for all of it: the outcome is success, or an error of one line that says what is wrong. The tests
(``test_fuzz.py``) draw a few; ``tools/fuzz.py`` goes on for as long as it is told to.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st

from arena.grid.experiment import Experiment, load_experiment
from arena.grid.fields import ExperimentError
from arena.grid.plan import plan_runs
from arena.grid.results import load_curves, load_environments, load_model, load_results
from arena.grid.store import Store, StoreError
from arena.grid.toml import to_toml

BASE = {
    "name": "tiny",
    "archs": ["gdn", "wide"],
    "seeds": [0, 1],
    "lr": [1e-3],
    "weight_decay": [0.1],
    "fleet_size": 4,
    "model": {"d_model": 8, "n_layers": 1, "n_heads": 2, "options": {}},
    "arms": {"wide": {"arch": "gdn", "d_model": 16}},
    "overrides": {"gdn": {"n_heads": 1}},
    "train": {"steps": 2, "batch_size": 4, "warmup": 0.1, "clip": 1.0},
    "tasks": [
        {"name": "parity", "train_lengths": [4, 8], "eval_lengths": [12], "params": {}},
        {"name": "mqar", "train_lengths": 32, "eval_lengths": 64, "params": {"n_pairs": 4}},
    ],
    "tuning": {"points": 2, "report_seeds": 2, "space": {"lr": [1e-3, 1e-1]}},
}
"""An experiment that is right."""

HOSTILE = st.sampled_from(
    ["", ".", "..", "../../up", "/nonexistent/up", "a/../b", "~", "x.toml", "-", "--", "+", "gdn+gdn",
    "gdn+", "a" * 300,
     "xlstm[1:0]", "xlstm[0:0]", "xlstm[99999999999:1]", "deltaproduct[0]",
     "deltaproduct[99999999999999999999]",
     "gdn2+swa[3:1]", "gdn[", "\x1b[31m", "\u202e", "\ud7ff", "%s%n", "{0}", "$(id)", "`id`", "nan",
     "inf", "1e999",
     "parity", "mqar", "gdn", "quickstart", "None", "null", "éé", "\x7f", "a\tb"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 10**30, -(2**63), 10_000_000, 1_000_000]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("nan"), -1.5]),
)
LEAVES = st.one_of(HOSTILE, NUMBERS, st.booleans(), st.text(max_size=8))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(HOSTILE, st.text(max_size=6)), inner, max_size=3),
    ),
    max_leaves=8,
)


@st.composite
def experiments(draw):
    """The right experiment with up to three of its values replaced, removed or joined by others."""
    data = json.loads(json.dumps(BASE))
    for _ in range(draw(st.integers(1, 3))):
        place = data
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            deeper = isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)) > 0
            if deeper:
                place = place[key]
                continue
            what = draw(st.sampled_from(["value", "value", "remove", "add"]))
            if what == "value":
                place[key] = draw(VALUES)
            elif what == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.one_of(HOSTILE, st.text(max_size=8)))] = draw(VALUES)
            else:
                place.append(draw(VALUES))
            break
    return data


@st.composite
def texts(draw):
    """A file: the TOML of an experiment with bytes changed, or anything."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(to_toml(BASE).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        new = draw(st.one_of(st.binary(max_size=6), LEAVES.map(lambda x: str(x).encode("utf-8", "replace"))))
        if draw(st.integers(0, 20)) == 0:
            new = draw(
                st.sampled_from([b"[" * 3000, b"x=" + b"[" * 3000, b"9" * 5000, b"a." * 3000 + b"a = 1"])
            )
        data[at : at + length] = new
    return bytes(data)


def one_line(error: Exception) -> None:
    """The message of an error is what a command prints."""
    text = str(error)
    assert text.strip() and "\n" not in text.strip(), repr(text)
    assert len(text) < 5000


def read_file(data: bytes, folder: Path) -> str:
    """Read an experiment file; how it ended."""
    path = folder / "fuzz.toml"
    path.write_bytes(data)
    try:
        return plan(load_experiment(path))
    except ExperimentError as error:
        one_line(error)
        return "refused"


def read_data(data: dict, folder: Path) -> str:
    """The same of a mapping that TOML can hold."""
    return read_file(to_toml(data).encode("utf-8", "surrogatepass"), folder)


def plan(experiment: Experiment) -> str:
    """Plan an experiment, where that takes a moment only."""
    small = all(
        max(entry.train_lengths) < 200 and max(entry.eval_lengths) < 200 for entry in experiment.tasks
    )
    widths = [experiment.model, *experiment.arms.values(), *experiment.overrides.values()]
    small = small and all((w.d_model or 1) * (w.n_layers or 1) <= 2000 for w in widths)
    if not small:
        return "read"
    plan_runs(experiment)
    return "planned"


COMMANDS = (
    "list", "show", "grid", "tune", "ablate", "dynamics", "report", "check-block", "compare", "help",
)  # fmt: skip
OPTIONS = (
    "--arch", "--task", "--seeds", "--steps", "--out", "--device", "--workers", "--trials", "--storage",
    "--preset",
    "--decay", "--erase", "--coupling", "--erase-range", "--length", "--examples", "--param",
    "--intervene", "--arm",
    "--outer", "--d-model", "--n-heads", "--plugin", "--version", "--help", "-h", "--executor",
    "--address", "--x",
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(COMMANDS),
    st.sampled_from(OPTIONS),
    HOSTILE,
    st.sampled_from(
        ["gdn", "parity", "tiny.toml", "out", "cpu", "cuda", "n_pairs=8", "erase:clamp:0:1", "1", "-1", "0"]
    ),
    st.integers(-2, 5).map(str),
    st.text(max_size=6),
).filter(lambda word: "\0" not in word and word != "--debug")  # no system passes a null character on
LINES = st.builds(
    lambda command, words: [command, *words], st.sampled_from(COMMANDS), st.lists(WORDS, max_size=5)
)


@contextlib.contextmanager
def nothing_runs(folder: Path):
    """In ``folder``, with tiny.toml: everything up to training and long checks, which are refused."""
    import arena.conformance
    import arena.grid.driver
    import arena.tuning

    def refuse(*_, **__):
        raise StoreError("nothing is trained here")

    (folder / "tiny.toml").write_text(to_toml(BASE))
    before = os.getcwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.object(arena.grid.driver, "train_runs", refuse),
            mock.patch.object(arena.tuning, "tune", refuse),
            mock.patch.object(arena.conformance, "examine", lambda subject: []),
        ):
            yield
    finally:
        os.chdir(before)


def train(folder: Path) -> Path:
    """A result folder of two runs."""
    from arena.grid import run_experiment

    (folder / "one.toml").write_text(to_toml({**BASE, "tasks": BASE["tasks"][:1], "seeds": [0]}))
    report = run_experiment(load_experiment(folder / "one.toml"), folder / "out", workers=1)
    assert report.stored == report.planned == 2
    return folder / "out"


def command(words: list[str]) -> str:
    """Run a command line in this process; how it ended."""
    from arena.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main(words)
        except SystemExit as end:
            status = end.code
    said = err.getvalue()
    assert "Traceback" not in out.getvalue() + said
    assert "internal error" not in said, said
    assert status in (0, 1, 2), (status, said)
    if status == 2 and said:
        assert said.count("\n") == 1, said
    return f"status {status}"


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 2**65), st.floats(), HOSTILE, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(HOSTILE, inner, max_size=3)),
    max_leaves=6,
)
FILES = (
    "plan.json", "experiment.toml", "runs/*/config.json", "runs/*/environment.json", "runs/*/rows.parquet",
    "runs/*/curve.parquet", "runs/*/model.safetensors", "runs/*/checksums.json", "fleets/*.json",
    "failures/0123456789abcdef.json", "runs",
)  # fmt: skip
ATTACKS = st.lists(
    st.tuples(
        st.sampled_from(FILES),
        st.sampled_from(["bytes", "truncate", "json", "key", "link", "folder", "remove", "rename"]),
        st.integers(0, 2**30),
        JSON_VALUES,
        st.binary(max_size=8),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


def attack(folder: Path, attacks: list) -> None:
    """Change a result folder; with ``True`` at the end of an attack, its checksum too.

    Nothing is ever written, renamed or removed through a link: links point at decoys beside the folder, which
    :func:`read_folder` finds unchanged.
    """
    decoy = folder.parent / "decoy"
    (decoy / "inside").mkdir(parents=True, exist_ok=True)
    (decoy / "file").write_text(DECOY)
    (decoy / "inside" / "config.json").write_text(DECOY)
    for pattern, how, number, value, data, sealed in attacks:
        found = sorted(folder.glob(pattern))
        path = found[number % len(found)] if found else folder / pattern.replace("*", "x")
        if _through_link(path, folder):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_bytes() if path.is_file() else b""
        if how == "bytes" and old:
            at = number % len(old)
            path.write_bytes(old[:at] + data + old[at + len(data) :])
        elif how == "truncate" and old:
            path.write_bytes(old[: number % len(old)])
        elif how == "json" and not path.is_dir():
            path.write_text(json.dumps(value))
        elif how == "key" and path.suffix == ".json" and not path.is_dir():
            path.write_text(json.dumps(_changed(old, number, value)))
        elif how in ("remove", "link", "folder"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if how == "link":
                path.symlink_to([decoy / "file", decoy, decoy / "absent", decoy / "inside"][number % 4])
            elif how == "folder":
                path.mkdir()
        elif how == "rename" and path.exists() and pattern != "runs":
            path.rename(path.with_name(["a b", "..x", "é", "x" * 70][number % 4]))
        if sealed and path.parent.parent.name == "runs" and path.name != "checksums.json":
            _seal(path, folder)


DECOY = "decoy"


def _through_link(path: Path, folder: Path) -> bool:
    """Whether a link lies between a result folder and a file of it, or is that file."""
    parts = [path, *path.parents]
    return any(part.is_symlink() for part in parts[: parts.index(folder)])


def untouched(folder: Path) -> None:
    """What lies beside a result folder is as it was."""
    decoy = folder.parent / "decoy"
    assert sorted(path.relative_to(decoy).as_posix() for path in decoy.rglob("*")) == [
        "file", "inside", "inside/config.json",
    ]  # fmt: skip
    assert (decoy / "file").read_text() == (decoy / "inside" / "config.json").read_text() == DECOY


def _changed(old: bytes, number: int, value: object) -> object:
    try:
        content = json.loads(old)
    except ValueError:
        return value
    place = content
    while isinstance(place, dict) and place:
        key = sorted(place)[number % len(place)]
        number //= len(place)
        if isinstance(place[key], dict) and place[key] and number % 3:
            place = place[key]
            continue
        if number % 2:
            place[key] = value
        else:
            place[str(value)] = place.pop(key)
        break
    return content


def _seal(path: Path, folder: Path) -> None:
    sums = path.parent / "checksums.json"
    if _through_link(path, folder) or _through_link(sums, folder) or not path.is_file():
        return
    with contextlib.suppress(OSError, ValueError, TypeError):
        content = json.loads(sums.read_text())
        content[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        sums.write_text(json.dumps(content))


def read_folder(folder: Path) -> str:
    """Read a result folder with everything that reads one; how it ended."""
    ended = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (load_results, load_curves, load_environments):
            try:
                read(folder)
                ended.append("read")
            except StoreError as error:
                one_line(error)
                ended.append("refused")
        names = os.listdir(folder / "runs") if (folder / "runs").is_dir() else []
        for run_id in sorted(names)[:2]:
            try:
                load_model(folder, run_id)
            except StoreError as error:
                one_line(error)
        try:
            with Store(folder) as store:
                store.recorded_fleets()
                store.finished([name for name in names if len(name) == 16])
        except StoreError as error:
            one_line(error)
    untouched(folder)
    return " ".join(sorted(set(ended)))
