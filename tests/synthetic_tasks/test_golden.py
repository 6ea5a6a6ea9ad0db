"""The samples of every task, pinned: a change here is a change of results and needs a bumped version.

`python tests/synthetic_tasks/test_golden.py` writes the file anew.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import synthetic_tasks

GOLDEN = Path(__file__).with_name("golden.json")


def digests():
    """For every task and version: a hash of samples of all splits at two lengths, default parameters."""
    found = {}
    for name in synthetic_tasks.names():
        task = synthetic_tasks.get(name)
        state = hashlib.blake2b(digest_size=8)
        for split in synthetic_tasks.SPLITS:
            for wanted in (1, 70):
                length = task.legal_length(wanted)
                batch = task.sample(3, length=length, seed=1, index=2**40, split=split)
                for tensor in batch:
                    state.update(tensor.numpy().astype("<i8").tobytes())
        found[f"{name} v{synthetic_tasks.RESULT_VERSION}.{task.version}"] = state.hexdigest()
    return found


@pytest.fixture(scope="module")
def now():
    return digests()


def test_samples_are_those_of_their_version(now):
    assert now == json.loads(GOLDEN.read_text())


def test_other_processes_make_the_same_samples(now):
    program = "import test_golden; print(test_golden.digests())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == now


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(digests(), indent=1) + "\n")
