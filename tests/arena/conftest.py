"""What the tests of the commands share."""

import pytest
from tiny import TINY


@pytest.fixture
def here(request, capsys, monkeypatch, tmp_path):
    """The command line in this process, to be quick: (arguments) -> exit status, output, errors.

    It runs where the experiment ``TINY`` of the test's file, else that of tiny.py, lies as tiny.toml.
    """
    from arena.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(getattr(request.module, "TINY", TINY))

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return run
