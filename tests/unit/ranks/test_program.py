"""How programs end."""

import subprocess
import sys

import pytest

from megalite.errors import ConfigError
from megalite.ranks.program import print_line


def test_a_line_of_an_error_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(ConfigError(f"{'x' * 5000}: must not be\nso long"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("x: must not be so long\n") and len(said) < 1100


def test_a_reader_that_has_gone_ends_a_program_without_a_word() -> None:
    script = """if True:
        from megalite.ranks.program import run_program

        def main(arguments):
            for _ in range(100_000):
                print("a line that nobody reads", flush=True)
            return 0

        run_program(main)
    """
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    program.stdout.readline()
    program.stdout.close()
    assert program.stderr is not None and program.stderr.read() == ""
    assert program.wait(30) == 141
