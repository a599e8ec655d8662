"""How programs end."""

import subprocess
import sys

import pytest

from megalite.errors import ConfigError
from megalite.ranks.run_program import print_line
from tests.programs import run_program
from tests.ranks import REPOSITORY


def test_a_line_of_an_error_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(ConfigError(f"{'x' * 5000}: must not be\nso long"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("x: must not be so long\n") and len(said) < 1100


def test_a_closed_pipe_ends_a_program_silently() -> None:
    script = """if True:
        from megalite.ranks.run_program import run_program

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


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("launcher/generate.py", ["--none"]),
        ("launcher/evaluate.py", []),
        ("megalite", ["pretrain"]),
    ],
)
def test_an_error_in_the_arguments_of_all_ranks_is_printed_by_one(
    program: str, words: list[str]
) -> None:
    for rank, lines in ((0, 1), (1, 0)):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        ended = run_program(program, *words, **world, LOCAL_WORLD_SIZE="2")
        # Only in this test.
        said = [line for line in ended.stderr.splitlines() if "runpy" not in line]
        assert (ended.returncode, len(said)) == (2, lines), ended.stderr


def test_a_result_that_does_not_fit_on_the_disk_is_reported() -> None:
    """Otherwise `config_reference.py > docs/config.md` on a full disk would write half of the file and succeed."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "tools/config_reference.py"]
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
    assert ended.returncode == 1
    assert ended.stderr.endswith("No space left on device\n") and ended.stderr.count("\n") == 1
